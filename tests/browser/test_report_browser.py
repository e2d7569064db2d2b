"""The report in a real browser: loads nothing, runs nothing but its own script, works by mouse, keyboard and phone."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.browser.cdp import Page, find_chromium, open_page
from tests.report_artefacts import ordinary_run, write_report
from tests.unit.test_report import ATTACKS, attacked_run

CHROMIUM = find_chromium()

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]

T = TypeVar("T")

CONTRAST = """
(() => {
  const linear = (share) => share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  const channel = (value) => linear(value / 255);
  const luminance = (rgb) => 0.2126 * channel(rgb[0]) + 0.7152 * channel(rgb[1]) + 0.0722 * channel(rgb[2]);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (element) => {
    for (let at = element; at !== null; at = at.parentElement) {
      const rgb = parse(getComputedStyle(at).backgroundColor);
      if (rgb.length === 3 || rgb[3] > 0) return rgb;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (walker.currentNode.data.trim() === '' || element.closest('script, style, title, [hidden]') !== null) continue;
    const style = getComputedStyle(element);
    const inChart = element.closest('svg') !== null;
    const pair = [parse(inChart ? style.fill : style.color), ground(element)].map(luminance).sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (contrast < 4.5) found.push([element.tagName, walker.currentNode.data.trim().slice(0, 40), contrast]);
  }
  return found;
})()
"""

VISIBLE_ROWS = "[...document.querySelectorAll('#rows > li')].filter((row) => row.getClientRects().length > 0).length"

FOREIGN = "img, iframe, form, input, object, embed, base, video"

FOCUSED = "document.activeElement.matches({selector!r})"


def in_browser(file: Path, check: Callable[[Page], Awaitable[T]]) -> T:
    """Open a file in a fresh browser and run a check on it."""

    async def drive() -> T:
        assert CHROMIUM is not None
        async with open_page(CHROMIUM) as page:
            await page.open(file)
            return await check(page)

    return asyncio.run(drive())


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ordinary")
    write_report(ordinary_run(), folder)
    return folder / "report" / "report.html"


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attacked")
    write_report(attacked_run(), folder, sample_rows=2 * len(ATTACKS))
    return folder / "report" / "report.html"


def complaints(page: Page) -> list[str]:
    """Console messages, exceptions, log entries and issues that the browser reported."""
    kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Audits.issueAdded")
    return [f"{name}: {fields}" for name, fields in page.events if name in kinds]


def requests(page: Page) -> list[str]:
    """Addresses that the page asked for."""
    return [fields["request"]["url"] for name, fields in page.events if name == "Network.requestWillBeSent"]


async def press_until(page: Page, selector: str) -> None:
    """Press Tab until an element that matches has the focus."""
    for _ in range(200):
        if await page.evaluate(FOCUSED.format(selector=selector)):
            return
        await page.press("Tab", 9)
    raise AssertionError(f"Tab never reached {selector}")


def test_the_page_asks_for_nothing_but_itself_and_the_browser_has_no_complaint(ordinary: Path) -> None:
    async def check(page: Page) -> None:
        await page.evaluate("document.getElementById('unfold').click()")
        remote = [url for url in requests(page) if not url.startswith("data:")]
        assert remote == [ordinary.as_uri()]
        assert complaints(page) == []

    in_browser(ordinary, check)


def test_nothing_from_the_data_runs_loads_or_becomes_an_element(attacked: Path) -> None:
    async def check(page: Page) -> None:
        await page.evaluate("document.getElementById('unfold').click()")
        await asyncio.sleep(0.5)
        assert await page.evaluate("document.title") == "made-up – distillation report"
        assert await page.evaluate("document.scripts.length") == 1
        assert (
            await page.evaluate("document.querySelectorAll('img, iframe, form, input, object, embed, base').length")
            == 0
        )
        handlers = (
            "[...document.querySelectorAll('*')].flatMap((e) => e.getAttributeNames()).filter((n) => /^on/.test(n))"
        )
        assert await page.evaluate(handlers) == []
        links = (
            "[...document.querySelectorAll('a')].map((a) => a.getAttribute('href')).filter((h) => !h.startsWith('#'))"
        )
        assert await page.evaluate(links) == []
        assert [url for url in requests(page) if not url.startswith("data:")] == [attacked.as_uri()]
        assert complaints(page) == []

    in_browser(attacked, check)


def test_the_policy_stops_a_script_that_got_in_all_the_same(ordinary: Path, tmp_path: Path) -> None:
    tampered = tmp_path / "tampered.html"
    text = ordinary.read_text("utf-8")
    tampered.write_text(text.replace("<main>", "<main><script>document.title = 'owned'</script>"), "utf-8")

    async def check(page: Page) -> None:
        assert await page.evaluate("document.title") == "made-up – distillation report"
        assert any("Content Security Policy" in complaint for complaint in complaints(page))

    in_browser(tampered, check)


def test_chips_filter_by_mouse(ordinary: Path) -> None:
    async def check(page: Page) -> None:
        assert await page.evaluate(VISIBLE_ROWS) == 40
        await page.click('button[data-show="0"]')
        assert await page.evaluate(VISIBLE_ROWS) == 20
        assert await page.evaluate("document.getElementById('shown').textContent") == "20 rows"
        assert await page.evaluate("document.querySelectorAll('button[aria-pressed=true]').length") == 1
        await page.click('button[data-show=""]')
        assert await page.evaluate(VISIBLE_ROWS) == 40

    in_browser(ordinary, check)


def test_everything_works_by_keyboard(ordinary: Path) -> None:
    async def check(page: Page) -> None:
        await press_until(page, 'button[data-show="1"]')
        await page.press(" ", 32, " ")
        assert await page.evaluate(VISIBLE_ROWS) == 2
        await press_until(page, "#order")
        await page.press("ArrowDown", 40)
        await press_until(page, "#unfold")
        await page.press("Enter", 13, "\r")
        assert await page.evaluate("document.querySelectorAll('#rows details[open]').length") == 40
        await page.press("Enter", 13, "\r")
        await press_until(page, "#rows summary")
        await page.press("Enter", 13, "\r")
        assert await page.evaluate("document.querySelectorAll('#rows details[open]').length") == 1

    in_browser(ordinary, check)


def test_rows_are_ordered_by_length_on_demand_and_back(ordinary: Path) -> None:
    lengths = "[...document.querySelectorAll('#rows > li')].map((row) => Number(row.dataset.length))"
    choose = "(() => {{ order.value = '{}'; order.dispatchEvent(new Event('change')) }})()"

    async def check(page: Page) -> None:
        before = await page.evaluate(lengths)
        await page.evaluate(choose.format("longest"))
        assert await page.evaluate(lengths) == sorted(before, reverse=True)
        await page.evaluate(choose.format("place"))
        assert await page.evaluate(lengths) == before

    in_browser(ordinary, check)


@pytest.mark.parametrize("which", ["ordinary", "attacked"])
def test_a_telephone_shows_it_without_sideways_scrolling(which: str, request: pytest.FixtureRequest) -> None:
    async def check(page: Page) -> None:
        await page.resize(360)
        await page.evaluate("document.getElementById('unfold').click()")
        assert await page.evaluate("document.documentElement.scrollWidth") == 360
        assert (
            await page.evaluate("Math.min(...[...document.querySelectorAll('.chart')].map((e) => e.clientWidth))") > 240
        )

    in_browser(request.getfixturevalue(which), check)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_aa_asks_for(ordinary: Path, scheme: str) -> None:
    async def check(page: Page) -> None:
        await page.prefer(scheme)
        await page.evaluate("document.getElementById('unfold').click()")
        dark = await page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        assert dark is (scheme == "dark")
        assert await page.evaluate(CONTRAST) == []

    in_browser(ordinary, check)


def test_paper_shows_the_rows_unfolded_and_without_controls(ordinary: Path) -> None:
    async def check(page: Page) -> None:
        await page.prefer("light", "print")
        assert await page.evaluate("document.getElementById('tools').getClientRects().length") == 0
        assert await page.evaluate("document.querySelector('#rows pre').getBoundingClientRect().height") > 0

    in_browser(ordinary, check)


def test_without_scripts_all_rows_are_there_and_the_controls_are_not(ordinary: Path) -> None:
    async def check(page: Page) -> None:
        await page.send("Emulation.setScriptExecutionDisabled", value=True)
        await page.open(ordinary)
        assert await page.evaluate(VISIBLE_ROWS) == 40
        assert await page.evaluate("document.getElementById('tools').hidden") is True

    in_browser(ordinary, check)


def test_charts_and_scrolling_tables_have_names(ordinary: Path) -> None:
    async def check(page: Page) -> None:
        tree = (await page.send("Accessibility.getFullAXTree"))["nodes"]
        named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if "role" in node]
        images = [name for role, name in named if role == "image"]
        regions = [name for role, name in named if role == "region"]
        assert len(images) == 5
        assert len(regions) >= 6 + 7
        assert all(images)
        assert all(regions)

    in_browser(ordinary, check)
