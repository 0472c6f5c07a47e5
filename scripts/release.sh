#!/usr/bin/env bash
# Builds a release and checks it, up to the upload, whose command is printed: the quick tests run in the unpacked sdist, and
# with the wheel installed a run from a model to a loaded adapter.
# usage: scripts/release.sh
# Wanted: a clean tree; the version of p2d_peft/version.py as the topmost section of CHANGELOG.md, with its date; and a tag
# of that version, with a "v" before it, on this commit. PYTHON names an interpreter that has p2d_peft[release].
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
fail() { echo "release.sh: $*" >&2; exit 1; }

[ -z "$(git status --porcelain)" ] || fail "there are changes that are not committed; see git status"
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' p2d_peft/version.py)
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+((a|b|rc)[0-9]+)?$ ]] ||
    fail "p2d_peft/version.py has '$version', which is no version to release, such as 0.1.0 or 0.2.0rc1"
section=$(grep -m 1 '^## ' CHANGELOG.md || true)
[[ $section =~ ^"## [$version] - "[0-9]{4}-[0-9]{2}-[0-9]{2}$ ]] ||
    fail "the topmost section of CHANGELOG.md is '$section', not '## [$version] - ' and a date"
tagged=$(git rev-parse --quiet --verify "refs/tags/v$version^{commit}") ||
    fail "there is no tag v$version; git tag -a v$version -m v$version"
[ "$tagged" = "$(git rev-parse HEAD)" ] || fail "the tag v$version is on another commit"

rm -rf dist  # what an earlier build left would be uploaded, too
"$python" -m build
"$python" -m twine check --strict dist/*
for file in "dist/p2d_peft-$version-py3-none-any.whl" "dist/p2d_peft-$version.tar.gz"; do
    [ -f "$file" ] || fail "the build made no $file"
done

unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
tar -xzf "dist/p2d_peft-$version.tar.gz" -C "$unpacked"
sdist=$unpacked/p2d_peft-$version
# an environment of its own, in which the tests find no file that only this checkout has
VENV=.venv PYTHON=$(realpath "$(command -v "$python")") bash "$sdist/scripts/test.sh" -m "not slow" || fail "the quick tests fail in the unpacked sdist"
"$sdist/.venv/bin/python" -m pip install --quiet --no-deps --force-reinstall "dist/p2d_peft-$version-py3-none-any.whl"
"$sdist/.venv/bin/python" "$sdist/scripts/soak.py" --cycles 1 || fail "a run with the wheel installed fails"
echo "To upload: $python -m twine upload dist/p2d_peft-$version-py3-none-any.whl dist/p2d_peft-$version.tar.gz"
echo "Then: git push origin v$version"
