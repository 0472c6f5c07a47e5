"""What scripts/site adds to MkDocs, and the picture."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts" / "site"))  # no package: MkDocs loads its files by their path


@pytest.mark.parametrize(("name", "narrow"), [("p2d.svg", False), ("p2d-narrow.svg", True)])
def test_the_picture_is_that_of_the_record(name, narrow):
    picture = importlib.import_module("picture")
    record = json.loads((ROOT / "benchmarks" / "results" / "quickstart_family.json").read_text(encoding="utf-8"))
    assert picture.draw(record["report"], narrow) == (ROOT / "docs" / "assets" / name).read_text(encoding="utf-8")


def test_docstrings_in_hugging_faces_style_become_googles():
    pytest.importorskip("griffe")
    as_google = importlib.import_module("docstrings").as_google
    assert (
        as_google("""
    Uses [`HeadSet`] and [`~trl.SFTConfig`] with [`P2DTrainer.train`].

    Args:
        heads ([`HeadSet`], *optional*, defaults to `None`): Heads, see [`Scorer`].
        q, k (`Callable[[int], int]`):
            What `k` is.

    Returns:
        [`HeadScores`]: the table.

    Raises:
        `ValueError`: if `heads` is empty.
    """)
        == """
    Uses [`HeadSet`][p2d_peft.heads.head_set.HeadSet] and `SFTConfig` with [`P2DTrainer.train`][p2d_peft.trainer.p2d_trainer.P2DTrainer].

    Args:
        heads: Heads, see [`Scorer`][p2d_peft.selection.scoring.Scorer].
        q, k:
            What `k` is.

    Returns:
        HeadScores: the table.

    Raises:
        ValueError: if `heads` is empty.
    """
    )


def test_links_out_of_the_docs_lead_to_copies():
    pytest.importorskip("mkdocs")
    hooks = importlib.import_module("hooks")
    from mkdocs.exceptions import PluginError
    from mkdocs.structure.files import Files

    files = Files([])
    config = SimpleNamespace(
        site_dir="site", use_directory_urls=True, plugins=SimpleNamespace(_current_plugin="hooks")
    )

    def rewritten(markdown, uri="serving.md"):
        page = SimpleNamespace(file=SimpleNamespace(src_uri=uri))
        return hooks.on_page_markdown(markdown, page=page, config=config, files=files)

    assert rewritten("[a](../examples/quickstart.py) [b](aer.md)") == "[a](source/examples/quickstart.py) [b](aer.md)"
    assert rewritten("[a](../aer.md)", "api/heads.md") == "[a](../aer.md)"
    assert [file.src_uri for file in files] == ["source/examples/quickstart.py"]
    with pytest.raises(PluginError, match="no file that can be copied"):
        rewritten("[a](../benchmarks)")
    assert "](how-it-works.md)" in rewritten('--8<-- "CONTRIBUTING.md"')
