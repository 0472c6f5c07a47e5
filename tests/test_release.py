"""scripts/release.sh stops at each fault, and before the upload."""

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
# stands in for `python -m build` and `python -m twine`, which need the network, and for the interpreter of the sdist's
# environment; the sdist that it builds is the archive of the name in SDIST
PYTHON = """#!/bin/sh
echo "ran: $*"
if [ "$2" = build ]; then
    mkdir dist
    touch dist/p2d_peft-1.2.0-py3-none-any.whl
    cp "$SDIST" dist/p2d_peft-1.2.0.tar.gz
fi
case "$1" in */soak.py) exit "${SOAK:-0}" ;; esac
"""

pytestmark = pytest.mark.skipif(
    not (shutil.which("git") and shutil.which("bash")), reason="the script needs git and bash"
)


def git(folder, *arguments):
    names = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"]
    subprocess.run(["git", *names, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def release(tmp_path):
    """Makes a repository with this version and topmost section, tags it, and runs the script there after `change`."""

    def run(version="1.2.0", section="## [1.2.0] - 2026-01-31", tag="v1.2.0", change=None, **codes):
        folder = tmp_path / "checkout"
        (folder / "scripts").mkdir(parents=True)
        (folder / "p2d_peft").mkdir()
        shutil.copy(ROOT / "scripts" / "release.sh", folder / "scripts")
        (folder / "p2d_peft" / "version.py").write_text(f'__version__ = "{version}"\n')
        (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n{section}\n\n## [1.1.0] - 2025-01-31\n")
        (folder / ".gitignore").write_text("dist/\n")
        python = tmp_path / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        unpacked = tmp_path / "p2d_peft-1.2.0"
        (unpacked / "scripts").mkdir(parents=True)
        (unpacked / "scripts" / "test.sh").write_text('echo "ran: tests $*"; exit "${TESTS:-0}"\n')
        (unpacked / ".venv" / "bin").mkdir(parents=True)
        shutil.copy(python, unpacked / ".venv" / "bin")
        with tarfile.open(tmp_path / "sdist.tar.gz", "w:gz") as archive:
            archive.add(unpacked, unpacked.name)
        git(folder, "init", "-q")
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", "one")
        if tag:
            git(folder, "tag", tag)
        if change:
            change(folder)
        return subprocess.run(
            ["bash", str(folder / "scripts" / "release.sh")],
            env={**os.environ, "PYTHON": str(python), "SDIST": f"{tmp_path}/sdist.tar.gz", **codes},
            capture_output=True,
            text=True,
        )

    return run


def test_builds_checks_and_tells_how_to_upload(release):
    done = release()
    assert done.returncode == 0, done.stderr
    files = "dist/p2d_peft-1.2.0-py3-none-any.whl dist/p2d_peft-1.2.0.tar.gz"
    ran = [re.sub(r"\S+/p2d_peft-1.2.0/", "", line) for line in done.stdout.splitlines() if line.startswith("ran: ")]
    assert ran == [
        "ran: -m build",
        f"ran: -m twine check --strict {files}",
        "ran: tests -m not slow",
        "ran: -m pip install --quiet --no-deps --force-reinstall dist/p2d_peft-1.2.0-py3-none-any.whl",
        "ran: scripts/soak.py --cycles 1",
    ]  # and no upload
    assert f"-m twine upload {files}\n" in done.stdout


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ({"TESTS": "1"}, "the quick tests fail in the unpacked sdist"),
        ({"SOAK": "1"}, "a run with the wheel installed fails"),
    ],
)
def test_what_was_built_has_to_work(codes, message, release):
    done = release(**codes)
    assert done.returncode == 1 and message in done.stderr
    assert "upload" not in done.stdout


def later_commit(folder):
    git(folder, "commit", "-q", "--allow-empty", "-m", "two")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"change": lambda folder: (folder / "new.py").touch()}, "changes that are not committed"),
        ({"version": "1.2.0.dev0"}, "'1.2.0.dev0', which is no version to release"),
        ({"section": "## [Unreleased]"}, r"is '## [Unreleased]', not '## [1.2.0] - ' and a date"),
        ({"section": "## [1.2.0]"}, "is '## [1.2.0]', not '## [1.2.0] - ' and a date"),
        ({"section": "## [1x2.0] - 2026-01-31"}, "not '## [1.2.0] - ' and a date"),
        ({"tag": None}, "there is no tag v1.2.0"),
        ({"tag": "v1.1.0"}, "there is no tag v1.2.0"),
        ({"change": later_commit}, "the tag v1.2.0 is on another commit"),
    ],
    ids=["dirty", "dev", "unreleased", "undated", "similar", "untagged", "other tag", "moved on"],
)
def test_faults_are_named_before_anything_is_built(changes, message, release):
    done = release(**changes)
    assert done.returncode == 1 and message in done.stderr
    assert "ran: " not in done.stdout
