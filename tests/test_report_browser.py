"""The report and the comparison in a real browser: narrow, printed, without colour, nothing fetched and nothing of a model's text run."""
import json
import os

import pytest

from stages.report import ReportConfig, main
from stages.run.config import build_config
from stages.run.manifest import MANIFEST
from tests.report_runs import make_runs

pytestmark = pytest.mark.browser
SCHEMES = ("light", "dark")

# Text of these elements that is hard to read on its background: WCAG 2.1, 1.4.3 asks for 4.5 (axes: links, small print and verdicts alike).
CONTRAST = """() => {
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                       return .2126 * r + .7152 * g + .0722 * b; };
  const rgb = s => s.match(/[\\d.]+/g).map(Number);
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
                        if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
  return [...document.querySelectorAll('p, li, a, td, th, h1, h2, summary, figcaption, .caption, .source, .verdict, .why, .key, .reads')]
    .filter(e => e.innerText && e.innerText.trim() && e.checkVisibility())
    .map(e => { const a = light(rgb(getComputedStyle(e).color).slice(0, 3)), b = light(behind(e));
                return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.className || e.tagName, e.innerText.slice(0, 40)]; })
    .filter(found => found[0] < 4.5);
}"""


# Tables that the paper is too narrow for.
CUT = "[...document.querySelectorAll('table')].filter(t => t.getBoundingClientRect().right > 719).map(t => t.innerText.slice(0, 60))"


@pytest.fixture(scope="module")
def pages(chromium, tmp_path_factory):
    """A report with a stage missing and one that fails, and a comparison; texts of the made-up runs are hostile."""
    root = tmp_path_factory.mktemp("runs")
    stages = tuple(s for s in ReportConfig.PARENTS if s != "preferences")
    for name in ("first", "second"):
        make_runs(root / name, stages)
    for stage in stages[1:]:
        data = json.loads((root / "second" / stage / MANIFEST).read_text())
        (root / "second" / stage / MANIFEST).write_text(json.dumps(data | {"fingerprint": "sha256:" + "9" * 64}))
    data = json.loads((root / "first" / "ppo" / MANIFEST).read_text())
    data["metrics"]["gain/gold"] |= {"value": -0.1, "ci95": [-0.2, -0.05]}
    (root / "first" / "ppo" / MANIFEST).write_text(json.dumps(data))
    os.environ["PLUMBLINE_RUNS"] = str(root)
    try:
        return {kind: main(build_config(ReportConfig, given, recipe="first")).product("report")
                for kind, given in (("report", {}), ("against", {"against": "second"}))}
    finally:
        del os.environ["PLUMBLINE_RUNS"]


@pytest.fixture
def opened(chromium, pages):
    """Open a page; what its console says, what it fetches and what its text does fail the test."""
    contexts, wrong = [], []

    def open_page(kind, width=1200, **options):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)  # a busy machine
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: wrong.append(m.text))
        page.on("dialog", lambda d: wrong.append(d.message))
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("data:", pages[kind].as_uri())) else None)
        page.goto(pages[kind].as_uri())
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("[window.pwned === undefined, document.scripts.length, "
                                 "document.querySelectorAll('img:not([src^=data])').length]") == [True, 0, 0]
        context.close()
    assert wrong == []


@pytest.mark.parametrize("kind", ["report", "against"])
def test_nothing_scrolls_sideways_on_a_phone(opened, kind):
    page = opened(kind, 360)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    wide = page.evaluate("""[...document.querySelectorAll('body *')].filter(
        e => !e.parentElement.closest('.scroll') && e.getBoundingClientRect().right > 361).map(
        e => `${e.tagName}.${e.className}: ${e.textContent.slice(0, 60)}`)""")
    assert wide == [] and page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("[...document.querySelectorAll('img')].every(i => i.complete && i.naturalWidth > 0)")


def test_verdicts_read_without_colour(opened):
    page = opened("report")
    boxes = {key: (words, style) for key, words, style in page.evaluate("""[...document.querySelectorAll('.pipeline li')].map(e => [
        e.querySelector('a').getAttribute('href').slice(1), e.innerText,
        [getComputedStyle(e).borderLeftStyle, parseFloat(getComputedStyle(e).borderLeftWidth)]])""")}
    assert list(boxes) == list(ReportConfig.PARENTS)
    for key, word, look in (("pretrain", "\u2713 passes", "solid"), ("sft", "! warns", "double"), ("ppo", "\u2717 fails", "solid")):
        assert word in boxes[key][0].splitlines() and boxes[key][1][0] == look, key
    assert "preferences (missing)" in boxes["preferences"][0] and boxes["preferences"][1][0] == "dashed"
    assert boxes["ppo"][1][1] > boxes["pretrain"][1][1]  # a failure has the heavier edge
    page.click(".pipeline a[href='#ppo']")
    assert page.evaluate("Math.abs(document.getElementById('ppo').getBoundingClientRect().top)") < 400


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["report", "against"])
def test_text_stands_out_from_its_background(opened, kind, scheme):
    assert opened(kind, color_scheme=scheme).evaluate(CONTRAST) == []


@pytest.mark.parametrize("kind", ["report", "against"])
def test_it_prints_with_what_is_folded(opened, kind):
    page = opened(kind)
    folded = "getComputedStyle(document.querySelector('details:not([open])'), '::details-content').contentVisibility"
    assert page.evaluate(folded) == "hidden"
    page.emulate_media(media="print")
    assert page.evaluate(folded) == "visible"
    assert page.evaluate("[...document.querySelectorAll('figure, tr, .pipeline li')].every(e => "
                         "getComputedStyle(e).breakInside === 'avoid')")
    page.set_viewport_size({"width": 718, "height": 1000})  # what margins leave of A4
    assert page.evaluate(CUT) == []
    paper = page.pdf(format="A4")
    assert paper.startswith(b"%PDF") and paper.count(b"/Type /Page\n") + paper.count(b"/Type /Page ") > 3


@pytest.mark.slow
def test_the_page_of_a_real_pipeline_is_whole(opened, pages, smoke):
    pages["smoke"] = smoke.path("report") / "index.html"
    page = opened("smoke")
    road = [stage for stage in ReportConfig.PARENTS if stage not in ReportConfig.OPTIONAL]
    assert page.evaluate("[...document.querySelectorAll('section')].map(s => s.id)") == [*road, "samples", "costs", "records"]
    boxes = page.evaluate("""[...document.querySelectorAll('.pipeline li')].map(
        e => [e.querySelector('.verdict').innerText, e.querySelector('.key').innerText])""")
    assert len(boxes) == len(road) and all(verdict and key for verdict, key in boxes), boxes
    figures = page.evaluate("[...document.querySelectorAll('figure')].map(f => [f.innerText, f.querySelector('img').naturalWidth])")
    assert all(width > 0 for _, width in figures)
    for what in ("of every run of the ladder", "Loss against compute", "the prediction for the main model", "a gap that widens",
                 "Forgetting", "at each confidence", "Reward and gold score", "Distance from the SFT model",
                 "Both scores against the distance", "what accuracy costs in tokens"):
        assert any(what in text for text, _ in figures), what
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 718, "height": 1000})
    assert page.evaluate(CUT) == []
