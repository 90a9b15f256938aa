"""The doctor's pages in a real browser: headless Chromium, where it and playwright are installed."""

import dataclasses
import os
import re
import shutil

import pytest
from check_records import make_channels, make_check, make_finding, make_fix, make_row

from normscope.report import html
from normscope.report.comparison import compare

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

HOSTILE = "\"'><img src=x onerror=alert(1)></script><script>alert(2)</script><b>{{7*7}}"
PAGES = ("check", "fix", "healthy", "hostile", "large", "diff")
LAYERS = [f"stage{k // 50}.{k // 2 % 25}.attention.output.norm{k % 2}" for k in range(200)]


def page_of(name):
    if name == "fix":
        return html.render_check(make_check(), make_fix())
    if name == "healthy":
        return html.render_check(make_check(()))
    if name == "hostile":
        finding = make_finding("NRM103", words=HOSTILE, layers=(HOSTILE, f"a.{HOSTILE}"), message=HOSTILE)
        channels = (make_channels(HOSTILE),)
        return html.render_check(make_check((finding,), words=HOSTILE, reading=HOSTILE, channels=channels))
    if name == "large":
        rows = tuple(make_row(layer, k, ("NRM103",) if k < 60 else ()) for k, layer in enumerate(LAYERS))
        record = make_check((make_finding("NRM103", "E", "stale-statistics", LAYERS[:60]),))
        return html.render_check(dataclasses.replace(record, layers=rows))
    if name == "diff":
        other = make_check((make_finding("NRM103", words=HOSTILE, layers=(HOSTILE,)),), words=HOSTILE)
        return html.render_comparison(compare(make_check(), other))
    channels = tuple(make_channels(name) for name in ("encoder.bn1", "encoder.bn2"))
    return html.render_check(make_check(channels=channels))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name in PAGES:
        (folder / f"{name}.html").write_text(page_of(name), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser():
    # Chromium's sandbox refuses to run as root, as containers do.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, folder):
    """Open a page of ours; when the test is over, nothing was requested, logged or popped up."""
    contexts, troubles = [], []

    def visit(name, anchor="", **options):
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        own = re.compile(re.escape((folder / f"{name}.html").as_uri()) + "(#.*)?")
        page.on("console", lambda message: troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: own.fullmatch(request.url) or troubles.append(f"request: {request.url}"))
        page.goto((folder / f"{name}.html").as_uri() + anchor)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_and_are_quiet(visit, name, width):
    page = visit(name, viewport={"width": width, "height": 900})
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("img, iframe, object, link").count() == 0
    assert page.locator("script").count() == 2


def test_hostile_names_are_shown_as_they_are(visit):
    page = visit("hostile")
    assert page.locator("h1").inner_text().startswith(HOSTILE)
    assert HOSTILE in page.locator("#normalizers tbody th").all_inner_texts()
    assert page.locator("figure.channel figcaption code").first.inner_text() == HOSTILE


def test_the_first_screen_says_what_is_wrong_what_it_costs_and_what_to_type(visit):
    page = visit("check")
    screen = page.viewport_size["height"]
    for shown in ("text=Normalization trouble costs 5.5 pp", "header pre.copy", "table.decisions tbody tr >> nth=0"):
        box = page.locator(shown).first.bounding_box()
        assert box["y"] + box["height"] <= screen, shown


# --- sorting and filtering ------------------------------------------------------------------------------------------


def column(page, k):
    return page.locator(f"#normalizers tbody tr:visible > :nth-child({k + 1})").all_inner_texts()


def unfold(page):
    page.evaluate("document.querySelector('#map ~ details').open = true")


def test_sort_buttons_sort(visit):
    page = visit("large")
    unfold(page)
    original = column(page, 0)
    head = page.locator("#normalizers th", has_text="δ")
    for turn in ("descending", "ascending", None):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == turn
        values = [float(text) for text in column(page, 5)]
        if turn is not None:
            assert values == sorted(values, reverse=turn == "descending")
            assert len(set(values)) > 100
    assert column(page, 0) == original
    page.get_by_role("button", name="normalizer", exact=True).click()
    names = column(page, 0)
    assert page.locator("#normalizers th[aria-sort]").count() == 1
    # Numbers inside names count as numbers: stage0.2 comes before stage0.10.
    assert names.index(LAYERS[4]) < names.index(LAYERS[20])


def test_what_was_not_measured_sorts_last(visit):
    page = visit("check")
    share = page.get_by_role("button", name="share")
    for _ in range(2):
        share.click()
        shown = column(page, 9)
        assert shown[-1] == "–"
        assert shown[0] == "50%"


def test_the_filter_filters(visit):
    page = visit("large")
    unfold(page)
    form = page.locator("form.filter")
    assert form.locator("output").inner_text() == "200 of 200 shown"
    form.get_by_role("searchbox").fill("STAGE1 norm0")
    assert len(column(page, 0)) == 25
    assert all(name.startswith("stage1.") and name.endswith("norm0") for name in column(page, 0))
    form.get_by_role("checkbox").check()
    assert form.locator("output").inner_text() == f"{len(column(page, 0))} of 200 shown"
    assert set(column(page, 10)) == {"NRM103"}
    form.get_by_role("searchbox").fill("")
    assert sorted(column(page, 0)) == sorted(LAYERS[:60])


# --- anchors, keyboard, clipboard -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [True, False])
def test_every_link_leads_somewhere_that_can_be_seen(visit, script):
    page = visit("large", java_script_enabled=script)
    targets = {link.get_attribute("href") for link in page.locator("main a").all()}
    assert {"#NRM103", "#n0", "#n199"} <= targets
    page.locator("ul.tree a", has_text="norm1").last.click()
    page.locator("#n199").wait_for(state="visible")
    for target in ("#n7", "#NRM103"):
        page.locator(f"a[href='{target}']").first.click()
        page.locator(target).wait_for(state="visible")
        box = page.locator(target).bounding_box()
        assert 0 <= box["y"] < page.viewport_size["height"]


def test_an_address_with_an_anchor_opens_what_is_folded(visit):
    for name, anchor in (("large", "#n150"), ("check", "#NRM106")):
        visit(name, anchor).locator(anchor).wait_for(state="visible")


def test_older_browsers_unfold_too(visit):
    """Where the browser does not unfold by itself what a link leads to, or what it prints, the script does."""
    page = visit("large")
    page.evaluate("history.replaceState(null, '', '#n7'); dispatchEvent(new Event('hashchange'))")
    assert page.locator("#n7").is_visible()
    folded = page.locator("details:not([open])")
    before = folded.count()
    assert before > 3
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert folded.count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert folded.count() == before


def test_a_link_to_a_filtered_row_shows_it(visit):
    page = visit("large")
    unfold(page)
    page.get_by_role("searchbox").fill("nothing is called so")
    assert column(page, 0) == []
    page.locator("ul.tree a").first.click()
    page.locator("#n0").wait_for(state="visible")


def focused(page):
    return page.evaluate("document.activeElement.textContent.trim()")


def test_the_keyboard_is_enough(visit):
    page = visit("large")
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the findings"
    assert page.locator("a.jump").bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    assert page.url.endswith("#decisions")
    page.keyboard.press("Tab")
    assert focused(page) == "NRM103 stale-statistics"
    page.locator("nav a", has_text="All normalizers").focus()
    page.keyboard.press("Enter")
    for wanted in ("200 normalizers, in the order of the model", "δ"):
        while focused(page) != wanted:
            page.keyboard.press("Tab")
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        page.keyboard.press("Enter")
    assert page.locator("#normalizers th", has_text="δ").get_attribute("aria-sort") == "descending"
    assert page.locator("a.jump").bounding_box()["y"] < 0


def test_commands_can_be_copied(visit):
    page = visit("check", permissions=["clipboard-read", "clipboard-write"])
    block = page.locator("header pre.copy")
    block.get_by_role("button", name="Copy").click()
    page.wait_for_function("document.querySelector('header pre.copy button').textContent === 'Copied'")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == block.locator("code").inner_text() == "normscope fix SegNet --data SegNet -o fixed.pt"


# --- without a script, on paper, in both colours --------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_lost_without_a_script(visit, name):
    with_script, without = visit(name), visit(name, java_script_enabled=False)
    assert without.locator("button:visible, form:visible").count() == 0
    read = [page.locator("main").text_content() for page in (with_script, without)]
    read[0] = re.sub(r"Copy(?=\s)", "", read[0])
    read = [re.sub(r"\d+ of \d+ shown|\s+", "", text) for text in read]
    assert read[0] == read[1]
    for folded in without.query_selector_all("details:not([open])"):
        if folded.is_visible():
            folded.query_selector("summary").click()
            assert folded.evaluate("e => e.open")


@pytest.mark.parametrize("name", ["check", "fix", "large", "diff"])
def test_paper_shows_everything_in_light(visit, name):
    page = visit(name, color_scheme="dark", viewport={"width": 688, "height": 1017})  # A4 less margins of 14 mm
    page.emulate_media(media="print")
    cells = page.evaluate("[...document.querySelectorAll('td, th')].map(e => e.getBoundingClientRect().right)")
    assert max(cells) <= 688
    assert page.locator("form:visible, pre button:visible, nav:visible").count() == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = page.evaluate("""[...document.querySelectorAll("details > :not(summary, form)")]
        .filter(e => !e.checkVisibility({contentVisibilityAuto: true}) || !e.getBoundingClientRect().height).length""")
    assert page.locator("details").count() > 0
    assert hidden == 0


# Every element with text of its own: its colour against the first opaque background behind it, by WCAG 2.
CONTRASTS = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => { const [r, g, b] = c.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                         return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (e) => { for (; e; e = e.parentElement) {
      const c = channels(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] === 1) return c.slice(0, 3); }
      return [255, 255, 255]; };
  for (const details of document.querySelectorAll("details")) details.open = true;
  return [...document.querySelectorAll("body *")]
    .filter(e => e.checkVisibility() && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
    .map(e => { const [a, b] = [channels(getComputedStyle(e).color), behind(e)].map(c => light(c.slice(0, 3)));
                return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 120)]; });
}"""


@pytest.mark.parametrize("name", ["fix", "check", "diff"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_colours(visit, name, scheme):
    page = visit(name, color_scheme=scheme)
    found = page.evaluate(CONTRASTS)
    assert len(found) > 50
    assert min(found)[0] >= 4.5, min(found)  # WCAG 2.1, level AA
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
