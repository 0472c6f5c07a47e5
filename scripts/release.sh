#!/usr/bin/env bash
# Builds a release and checks it, up to the upload, whose command is printed.
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
echo "To upload: $python -m twine upload dist/p2d_peft-$version-py3-none-any.whl dist/p2d_peft-$version.tar.gz"
echo "Then: git push origin v$version"
