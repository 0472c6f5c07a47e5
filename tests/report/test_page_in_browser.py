"""
The page in a real browser, headless Chromium: `bash scripts/browser_tests.sh` installs what this needs and runs it.

Elsewhere these tests are skipped, and say what is missing.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from p2d_peft.report import page as pages
from p2d_peft.report.run_folder import Run

from .run_folders import HOSTILE, write_run
from .test_run_report import report


pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
AXE = Path(os.environ.get("AXE_CORE", Path(__file__).parents[2] / ".browser/node_modules/axe-core/axe.min.js"))
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1200, "height": 900}


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing (scripts/browser_tests.sh)")
    if CHROMIUM is None:
        pytest.skip("chromium is missing (scripts/browser_tests.sh)")
    with sync_api.sync_playwright() as playwright:
        # no sandbox: containers, where root runs this, have no right to make one
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A page of a run, one of two runs, one of a run that tells little, and one of a run that wants to break out."""
    folder = tmp_path_factory.mktemp("pages")
    runs = {}
    for name, changes in {
        "run": {},
        "other": {"seed": 1},
        "hostile": {"text": HOSTILE},
        "poor": {"aer": None, "speedup": None, "reference_seconds": None, "reference_source": None, "model": None},
    }.items():
        (folder / name).mkdir()
        write_run(folder / name, **changes)
        runs[name] = folder / name
    for name in ("p2d_selection.json", "_p2d_samples.json", "p2d_head_scores.json", "trainer_state.json"):
        (runs["poor"] / name).unlink()
    for name, others in {"run": [], "two": ["other"], "hostile": ["hostile"], "poor": []}.items():
        read = [Run.read(runs[of]) for of in (name if name != "two" else "run", *others)]
        pages.save_page(folder / f"{name}.html", *read)
    return folder


@pytest.fixture
def open_page(browser, files):
    """Opens a file of the above; at the end, nothing may have gone to the console or to the network."""
    wrong, contexts = [], []

    def opened(name, scheme="light", viewport=DESK, content=None):
        context = browser.new_context(color_scheme=scheme, viewport=viewport)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"{name}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"{name}: {error}"))
        own = (files / f"{name}.html").as_uri()
        page.on("request", lambda request: wrong.append(request.url) if request.url != own else None)
        page.goto(own)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def unfold(page):
    page.evaluate("document.querySelectorAll('details').forEach(element => { element.open = true; })")


def hover(page, place):
    """Scroll there first and let that be over: the page hides the number when it scrolls."""
    place.scroll_into_view_if_needed()
    page.evaluate(
        "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))"
    )
    place.hover()


@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("name", ["run", "two", "poor", "hostile"])
def test_the_page_renders_and_is_no_wider_than_the_screen(name, viewport, open_page):
    page = open_page(name, viewport=viewport)
    assert page.locator("h1").inner_text() == "P2D run"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expected = 0 if name == "poor" else 6  # two histograms and the curves
    assert page.locator("svg").count() == expected
    for box in (page.locator("svg").nth(i).bounding_box() for i in range(page.locator("svg").count())):
        assert box["width"] > 250 and box["height"] > 140
    shown = page.locator(".map td").first.bounding_box()
    assert shown["width"] >= 10 and shown["height"] >= 10


def test_what_others_wrote_stays_text(open_page):
    page = open_page("hostile")
    page.mouse.move(300, 300)
    for place in (".map td.both >> nth=0", "svg .hover >> nth=3"):
        hover(page, page.locator(place))
    unfold(page)
    assert page.evaluate("window.broken === undefined")
    assert page.evaluate("document.scripts.length") == 1 and page.locator("img").count() == 0
    assert "<script>window.broken=1</script>" in page.locator(".samples pre").first.inner_text()
    assert "<img src=x" in page.locator("header p").inner_text()
    # and where an attribute, a column's name or a value of it holds the same
    assert page.evaluate(
        "[...document.querySelectorAll('*')].every(e => e.getAttributeNames().every(n => !n.startsWith('on')))"
    )
    assert "<img src=x" in page.locator("h3 bdi").first.inner_text()


def test_no_script_but_its_own_may_run(files, browser, tmp_path):
    # even if something got through the escaping
    html = pages.page(Run.read(files / "run")).replace(
        "<h1>", "<script>window.broken=1</script><img src=x onerror='broken=1'><h1>"
    )
    (tmp_path / "page.html").write_text(html)
    opened = browser.new_page()
    refused = []
    opened.on("console", lambda message: refused.append(message.text))
    opened.goto((tmp_path / "page.html").as_uri())
    assert opened.evaluate("window.broken === undefined") and opened.locator("#theme").is_visible()
    assert any("Content Security Policy" in text for text in refused)
    opened.close()


def test_hovering_tells_the_numbers(open_page, files):
    page = open_page("run")
    run = Run.read(files / "run")
    tip = page.locator("#tip")
    assert tip.is_hidden()

    def said(place):
        hover(page, page.locator(place))
        assert tip.is_visible()
        box = tip.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= DESK["width"]
        return tip.inner_text()

    layer, head = next(iter(run.heads))
    score = f"{float(run.scores.values[layer, head]):,.4g}"
    place = f".map tbody tr >> nth={layer} >> td >> nth={head}"
    assert said(place) == f"layer {layer}, head {head}\n{score}, chosen"
    assert page.locator("svg >> nth=0 >> .hover").count() == 40
    assert re.fullmatch(r"score 0 to 0\.05\n\d+ of \d+ rows kept", said("svg >> nth=0 >> .hover >> nth=20"))
    assert re.fullmatch(
        r"step 31\ntraining: .*\nevaluation: .*\nevaluation, a: 1", said("svg[aria-label^=Loss] .hover >> nth=15")
    )
    assert said(".bar .select >> nth=0") == "select\n51.1 s, 34.1 % of the run"
    page.mouse.move(2, 2)
    assert tip.is_hidden()


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_light_and_dark_follow_the_system_and_the_button(open_page):
    light, dark = open_page("run"), open_page("run", scheme="dark")
    of_light, of_dark = background(light), background(dark)
    assert of_light != of_dark
    for page, names, colors in (
        (light, ("Dark", "Light"), (of_dark, of_light)),
        (dark, ("Light", "Dark"), (of_light, of_dark)),
    ):
        button = page.locator("#theme")
        assert button.inner_text() == names[0]
        button.press("Enter")
        assert background(page) == colors[0] and button.inner_text() == names[1]
        button.click()
        assert background(page) == colors[1]


@pytest.mark.parametrize(
    ("name", "scheme", "viewport"),
    [
        ("two", "light", DESK),
        ("two", "dark", DESK),
        ("two", "light", PHONE),
        ("poor", "light", DESK),
        ("hostile", "dark", PHONE),
    ],
    ids=["light", "dark", "phone", "poor", "hostile"],
)
def test_axe_finds_no_serious_fault(name, scheme, viewport, open_page):
    if not AXE.is_file():
        pytest.skip(f"axe-core is missing at {AXE} (scripts/browser_tests.sh)")
    page = open_page(name, scheme, viewport)
    unfold(page)
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    serious = [fault for fault in found if fault["impact"] in ("serious", "critical")]
    assert not serious, [(fault["id"], [node["html"][:200] for node in fault["nodes"][:3]]) for fault in serious]


def test_a_notebook_shows_a_report(browser):
    opened = browser.new_page()
    opened.set_content(f"<div style='width:700px'>{pages.report_fragment(report(model=HOSTILE))}</div>")
    assert opened.evaluate("window.broken === undefined && document.scripts.length === 0")
    assert opened.locator(".figures dd").first.inner_text().startswith("0.1")
    assert opened.locator(".bar .train").first.bounding_box()["width"] > 20
    opened.close()
