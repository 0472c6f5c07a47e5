"""
Hooks of MkDocs (`mkdocs.yml` names this file).

The pages link to files beside `docs/`: results, examples, scripts. On the site those are copies of them, so that no link
leads out of it, and a link to a file that does not exist ends the build. Pages such as `contributing.md` show a file of the
project's root, whose links are made for there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File


ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)")
ROOT_FILE = re.compile(r'^--8<-- "([A-Z]+\.md)"$', re.MULTILINE)
ROOT_LINK = re.compile(r"(?<=\]\()(?:docs/)?([\w-]+\.md)")


def on_page_markdown(markdown: str, /, *, page: Any, config: Any, files: Any) -> str:
    """Put in the files of the root, and replace links out of `docs/` by links to copies in the folder `source` of the site."""

    def copied(match: re.Match[str]) -> str:
        folder = posixpath.dirname(page.file.src_uri)
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if not target.startswith("../"):  # from a folder in `docs/` to another
            return match[1]
        name = target.removeprefix("../")
        if not (ROOT / name).is_file() or name.endswith(".md"):  # MkDocs would take Markdown for a page
            raise PluginError(f"'{page.file.src_uri}' links to '{match[1]}', which is no file that can be copied.")
        uri = f"source/{name}"
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
        return posixpath.relpath(uri, folder or ".")

    markdown = ROOT_FILE.sub(lambda match: root_file(match[1]), markdown)
    return LINK.sub(copied, markdown)


def root_file(name: str) -> str:
    """A file of the project's root, with links to pages: `SECURITY.md` has the page `security.md`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return ROOT_LINK.sub(lambda match: match[1].lower(), text)
