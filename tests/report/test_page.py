"""The page as text; test_page_in_browser.py has it drawn."""

import base64
import dataclasses
import hashlib
import re
from html.parser import HTMLParser

import pytest

from p2d_peft.heads import HeadSet
from p2d_peft.report.page import page, report_fragment, save_page
from p2d_peft.report.run_folder import Run

from .run_folders import HOSTILE, write_run
from .test_run_report import report


class Elements(HTMLParser):
    """What a browser would make of a page: its tags, their attributes, and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def bare(**changes):
    return Run(report(**changes), heads=HeadSet([(0, 1)]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run.read(write_run(tmp_path_factory.mktemp("run")))


def test_all_is_there_and_nothing_is_loaded(run):
    html = page(run)
    found = Elements(html)
    for said in (
        "0.0647", "15.4 \N{MULTIPLICATION SIGN}", "estimated from a few steps", "± 3 %", "score by affinity", "Kept by task", "98.3 %",
        "The 10 highest scores", "Row 900 of the pool", "Loss", "148", "2.05 GiB", "torch", "--learning_rate 0.002",
    ):  # fmt: skip
        assert said in found.text, said
    assert found.tags.count("svg") == 6 and found.tags.count("td") > 270
    assert "link" not in found.tags and "img" not in found.tags
    assert not {"src", "href"} & {name for name, _ in found.attributes}
    assert len(html) < 250_000


def test_the_policy_holds_the_one_script(run):
    html = page(run)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html


def test_what_others_wrote_stays_text(tmp_path, run):
    for name, text in (("nasty", HOSTILE), ("plain", "")):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, text)
    nasty, plain = (Elements(page(Run.read(tmp_path / name), run)) for name in ("nasty", "plain"))
    # the same elements with the same attributes, whatever the texts are
    extra = {"tr", "th", "td"}  # the hostile version is a row more
    assert [tag for tag in nasty.tags if tag not in extra] == [tag for tag in plain.tags if tag not in extra]
    assert {name for name, _ in nasty.attributes} == {name for name, _ in plain.attributes}
    assert nasty.text.count("<script>window.broken=1</script>") > 40
    assert "{{7*7}}" in nasty.text and not re.search(r"(?<!\d)49(?!\d)", nasty.text)


def test_any_text_can_be_written(tmp_path):
    save_page(tmp_path / "a.html", bare(model="\ud800 \0 \u202e"))
    assert (
        "\N{NULL}" not in (tmp_path / "a.html").read_text(encoding="utf-8").replace("\0", "")
        and (tmp_path / "a.html").stat().st_size
    )


def test_a_page_takes_the_place_of_no_other_kind_of_file(tmp_path):
    dear = tmp_path / "p2d_report.json"
    dear.write_text("dear")
    with pytest.raises(ValueError, match=r"must end in \.html, got '.*p2d_report\.json'"):
        save_page(dear, bare())
    assert dear.read_text() == "dear"


def test_a_report_alone_says_what_is_missing():
    text = Elements(page(Run(report(aer=None, speedup=None, reference_seconds=None, reference_source=None)))).text
    assert "There is no AER" in text and "no curves" in text and "no p2d_selection.json" in text
    text = Elements(page(bare(layer_heads=None))).text
    assert "does not tell how many heads each layer has" in text and "0: 1" in text
    assert "were given, so they have no scores" in Elements(page(bare(localize_method=None))).text
    assert "were drawn, so they have no scores" in Elements(page(bare(localize_method="random"))).text
    assert "measured in a run of its own" in Elements(page(bare(reference_source="measured"))).text


def test_heads_that_scored_and_are_not_trained_are_told(run):
    text = Elements(page(run)).text
    assert "The heads that scored the rows" in text and run.report.scoring_heads != run.report.heads
    assert "By the same scores, but of the first layers" in text
    drawn = dataclasses.replace(run, report=dataclasses.replace(run.report, localize_method="random"))
    assert "Drawn, too, but of the first layers" in Elements(page(drawn)).text
    for same in (bare(scoring_heads=None), bare(scoring_heads=bare().report.heads)):
        assert "The heads that scored the rows" not in Elements(page(same)).text


def test_numbers_that_make_no_sense_break_nothing():
    for changes in (
        {"stage_seconds": {"train": -1.0, "x": 3.0}, "total_parameters": 0, "epochs": -1e308},
        {"stage_seconds": {}, "stage_tokens": {}, "pool_rows": -5, "speedup": 1e308, "reference_seconds": -1.0},
        {"layer_heads": {"0": 10**9, "1": -3}, "n_heads": 10**30},
        {"layer_heads": {"decoder.0": 4}, "selected_tokens": 1, "pool_tokens": 0},
    ):
        assert "</html>" in page(bare(**changes))
        assert report_fragment(report(**changes))


def test_two_runs_have_their_heads_compared(tmp_path, run):
    other = Run.read(write_run(tmp_path, seed=1))
    text = Elements(page(run, other)).text
    both = len(run.heads & other.heads)
    assert f"have {both} heads in common, of 27 here and 27 there" in text and "2.7 on average" in text
    html = page(run, other)
    marks = [html.count(f'<td class="{mark}"') for mark in ("both", "other", "chosen")]
    assert marks == [both, 27 - both, 27 + 27 - both]  # the first map has our own alone


def test_a_notebook_shows_the_costs():
    found = Elements(report(model=HOSTILE)._repr_html_())
    assert "script" not in found.tags and "img" not in found.tags and "html" not in found.tags
    assert "0.1" in found.text and HOSTILE[:20] in found.text and found.tags.count("i") >= 4
