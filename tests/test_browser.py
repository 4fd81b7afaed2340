"""The report's page in a real browser: Chromium, headless, from a file, without network.

`make test-browser` runs these; without a browser they fail. Driven by Playwright with the system's own Chromium where
there is one; the accessibility audit is axe-core's.
"""

from __future__ import annotations

import os
import re
import shutil
from urllib.parse import unquote

import pytest
import report_records as made

from copra_llm.report.palette import SERIES
from copra_llm.report.records import Found
from copra_llm.report.write import report_page

pytestmark = pytest.mark.browser
PHONE, DESK = (360, 740), (1280, 800)
THEMES = ("light", "dark")
INTERACTIVE = "a[href], button, summary, [tabindex='0']"


@pytest.fixture(scope="session")
def chromium():
    """The system's Chromium, else Playwright's own; where there is none, starting it fails and says what to install."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    # Chromium's own sandbox refuses to start as root, as in a container.
    args = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=args)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, str]:
    """Addresses of pages: all records; one of each protocol; two protocols; hostile and long names."""
    folder = tmp_path_factory.mktemp("pages")
    hostile = "</style></script><script>document.title='run'</script>\"'&<img src=x onerror=\"document.title='run'\">"
    records = {
        "all": made.everything(),
        "each": list({r.protocol: r for r in made.everything()}.values()),
        "small": made.runs(("lora", "copra"), ("sst2",)) + made.lines(("lora", "copra"), ("sst2",)),
        "hostile": made.hostile(hostile),
        "long": made.hostile("a" * 300) + made.hostile("several words " * 20),
    }
    for name, found in records.items():
        (folder / f"{name}.html").write_text(report_page(Found(found, 0)), encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in records}


@pytest.fixture
def show(chromium, files):
    """Open a page; the test fails on anything in the console, any error, any request but for the file."""
    contexts, wrong = [], []

    def opened(name="all", size=DESK, theme="light", **options):
        context = chromium.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=theme, reduced_motion="reduce", **options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("request", lambda r: wrong.append(f"request: {r.url[:90]}") if not _own(r.url, files[name]) else None)
        page.goto(files[name])
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def _own(address: str, page: str) -> bool:
    return address.split("#")[0] == page or address.startswith("data:text/csv")


# --- it opens, and fits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["all", "hostile", "long"])
@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_nothing_is_wider_than_the_screen(show, name, width):
    """Tables scroll inside their own frame; every plot is as wide as its column."""
    page = show(name, (width, 740))
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beyond = page.evaluate(
        """width => [...document.querySelectorAll('body *')].filter(node => {
            const box = node.getBoundingClientRect();
            return box.width && box.right > width + 1 && !node.closest('.scroll, .hidden');
        }).map(node => node.outerHTML.slice(0, 90))""",
        width,
    )
    assert beyond == []


def test_hostile_names_run_nothing(show):
    page = show("hostile")
    assert page.title() != "run" and page.evaluate("document.querySelectorAll('main script, img').length") == 0


def test_it_is_read_without_scripts(show):
    page = show("all", java_script_enabled=False)
    assert page.locator("svg.plot").count() > 30 and page.locator("h1").inner_text()
    details = page.locator("figure details").nth(1)
    assert page.locator("figure table").first.is_visible()
    table = details.locator("table")
    assert not table.is_visible()
    details.locator("summary").click()
    assert table.is_visible()


def test_every_plot_is_drawn(show):
    """Each has a size, and its text is large enough to be read on a phone: at least 9 pixels."""
    page = show("all", PHONE)
    sizes = page.evaluate(
        """[...document.querySelectorAll('svg.plot')].map(s => {
            const box = s.getBoundingClientRect();
            return [box.width, box.height, 10.5 * box.width / s.viewBox.baseVal.width];
        })"""
    )
    assert all(width > 280 and height > 60 and text >= 9 for width, height, text in sizes)
    cut = page.evaluate(
        """[...document.querySelectorAll('svg.plot')].flatMap(svg => {
            const box = svg.viewBox.baseVal;
            return [...svg.querySelectorAll('text')].filter(t => {
                const b = t.getBBox();
                return b.x < -1 || b.x + b.width > box.width + 1 || b.y + b.height > box.height + 1;
            }).map(t => `${svg.ariaLabel.slice(0, 40)}: ${t.textContent}`);
        })"""
    )
    assert cut == []


# --- light and dark ---------------------------------------------------------------------------------------


def test_dark_is_another_picture(show):
    light, dark = (show("small", theme=theme) for theme in THEMES)
    assert light.screenshot() != dark.screenshot()
    backgrounds = [p.evaluate("getComputedStyle(document.body).backgroundColor") for p in (light, dark)]
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in backgrounds]
    assert brightness[0] > 700 and brightness[1] < 120


def test_print_is_light(show):
    page = show("small", theme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")


CONTRASTS = """() => {
    const channels = colour => colour.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const solid = colour => { const c = channels(colour); return c.length < 4 || c[3] > 0.99; };
    const behind = node => {
        for (let n = node; n; n = n.parentElement) {
            const colour = getComputedStyle(n).backgroundColor;
            if (solid(colour)) return colour;
        }
        return 'rgb(255, 255, 255)';
    };
    const found = [];
    const own = node => [...node.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    for (const node of document.querySelectorAll('body *')) {
        if (!own(node) || !node.getClientRects().length || node.closest('title, script, .hidden, .skip')) continue;
        const style = getComputedStyle(node), svg = node.closest('svg');
        const onCell = svg && /^t\\d+$/.test(node.getAttribute('class') || '');
        const colour = svg ? style.fill : style.color;
        const back = onCell ? getComputedStyle(node.previousElementSibling).fill : behind(node);
        const [low, high] = [luminance(channels(colour)), luminance(channels(back))].sort((a, b) => a - b);
        found.push([(high + 0.05) / (low + 0.05), node.textContent.slice(0, 30), colour, back]);
    }
    return found;
}"""


@pytest.mark.parametrize("theme", THEMES)
def test_text_can_be_read(show, theme):
    """WCAG AA: 4.5 for every text, also in plots and on the cells of heat maps, from the colours as computed."""
    page = show("all", theme=theme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 2000
    assert [f for f in found if f[0] < 4.5] == []


@pytest.mark.parametrize("theme", THEMES)
def test_series_have_the_themes_colours(show, theme):
    page = show("small", theme=theme)
    for i in (0, 2):
        shown = page.evaluate(f"getComputedStyle(document.querySelector('svg.plot .c{i}')).color")
        assert "#" + "".join(f"{int(c):02x}" for c in re.findall(r"\d+", shown)) == SERIES[theme][i]


# --- by keyboard, by ear ----------------------------------------------------------------------------------


def test_tab_reaches_everything_in_order_and_shows_where_it_is(show):
    page = show("small", PHONE)
    wanted = page.evaluate(
        f"""[...document.querySelectorAll("{INTERACTIVE}")].filter(n => n.checkVisibility())
            .map((n, i) => (n.dataset.order = i))"""
    )
    assert len(wanted) > 10
    reached = []
    for _ in wanted:
        page.keyboard.press("Tab")
        order, outline, on_screen = page.evaluate(
            """() => {
                const n = document.activeElement, s = getComputedStyle(n), b = n.getBoundingClientRect();
                const seen = b.bottom > 0 && b.top < innerHeight;
                return [n.dataset.order, s.outlineStyle + parseFloat(s.outlineWidth), seen];
            }"""
        )
        assert re.fullmatch(r"solid[2-9]", outline) and on_screen, order
        reached.append(int(order))
    assert reached == wanted


def test_the_first_tab_skips_to_the_results(show):
    page = show("small")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "results"


def test_details_open_by_keyboard_and_hold_the_numbers(show):
    page = show("small")
    page.locator("figure summary").nth(1).focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "scroll"
    page.set_viewport_size({"width": 360, "height": 740})
    scrolled = "document.activeElement.scrollLeft"
    before = page.evaluate(scrolled)
    for _ in range(20):  # a key's scrolling takes effect in a later frame
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(20)
    assert page.evaluate(scrolled) > before


@pytest.mark.parametrize("size, theme", [(PHONE, "light"), (DESK, "dark")], ids=["phone, light", "desk, dark"])
def test_axe_finds_nothing(show, theme, size):
    """axe-core's audit: names, roles, structure, the order of headings, scrolling by keyboard.

    Without its contrast rule, which takes minutes: `test_text_can_be_read` looks at every text, in plots too.
    """
    from axe_playwright_python.sync_playwright import Axe

    page = show("each", size, theme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    violations = Axe().run(page, options={"rules": {"color-contrast": {"enabled": False}}}).response["violations"]
    assert [(v["id"], [n["html"][:100] for n in v["nodes"][:3]]) for v in violations] == []


# --- what one can do --------------------------------------------------------------------------------------


def test_csv_is_saved_from_a_file(show, tmp_path):
    """The link of the table of single runs, clicked: the file that the browser saves is the one the link holds."""
    page = show("small", accept_downloads=True)
    link = page.locator("a[download='single-runs.csv']")
    with page.expect_download() as waiting:
        link.click()
    download = waiting.value
    download.save_as(tmp_path / "saved.csv")
    saved = (tmp_path / "saved.csv").read_text(encoding="utf-8")
    assert download.suggested_filename == "single-runs.csv"
    assert saved == unquote(link.get_attribute("href").split(",", 1)[1])
    assert saved.startswith("model,task,method,learning rate,") and "86.0,81.03" in saved


def test_tables_sort_by_a_click_or_a_key(show):
    page = show("all")
    table = page.locator("table", has=page.locator("caption", has_text="Single runs"))
    column = 1 + table.locator("thead th").all_inner_texts().index(
        next(t for t in table.locator("thead th").all_inner_texts() if t.startswith("test acc."))
    )
    heading = table.locator(f"thead th:nth-child({column})")

    def values() -> list[float]:
        return [float(t.split(" [")[0]) for t in table.locator(f"tbody td:nth-child({column})").all_inner_texts()]

    before = values()
    heading.locator("button").click()
    assert values() == sorted(before) and heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").press("Enter")
    assert values() == sorted(before, reverse=True) and heading.get_attribute("aria-sort") == "descending"
    table.locator("thead th button").first.click()
    assert heading.get_attribute("aria-sort") is None
