"""The page in a real Chromium: everything is drawn, answers, fits a telephone, and asks nobody for anything."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, open_browser
from made_up_run import make_history, make_results, make_rows

from fedl2p.report.page import write_page
from fedl2p.report.saved_run import SavedRun, plain_records
from fedl2p.report.split import ClientSplit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section, of clients that have results, recipes, inputs and data."""
    rows = make_rows()
    for row in rows:
        row["client"] = f"{row['pool']}-{int(row['client'][-2:]) % 8:02d}"
    random = np.random.default_rng(3)
    inputs = [
        {**row, "kind": kind, "layer": row["layer"], "value": float(random.normal())}
        for row in rows
        if row["kind"] == "beta"
        for kind in ("xi", "mean", "sd")
    ]
    who = {row["client"]: (row["pool"], row["domain"]) for row in rows}
    clients = [
        ClientSplit(
            name=name, pool=pool, domain=domain, counts=random.integers(0, 9, (3, 4)), details={"severity": 0.5}
        )
        for name, (pool, domain) in who.items()
    ]
    run = SavedRun(
        name="a-run-of-a-long-name",
        results=make_results(),
        history=plain_records(make_history()),
        recipes=rows,
        net_inputs=inputs,
        clients=clients,
        classes=["zero", "one", "two", "three"],
    )
    return write_page(tmp_path_factory.mktemp("page") / "report.html", [run])


def test_nothing_is_asked_for_and_nothing_goes_wrong(browser: Browser, page: Path) -> None:
    browser.problems.clear()
    browser.requests.clear()
    browser.open(page)
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith("data:image/")] == [page.resolve().as_uri()]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_every_figure_is_drawn_and_nothing_sticks_out(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach((e) => { e.open = true })")
    boxes = browser.run(
        "[...document.querySelectorAll('figure svg')].map((e) => { const b = e.getBoundingClientRect();"
        "return [b.width, b.height, e.querySelectorAll('path, use, image').length] })"
    )
    assert len(boxes) == 15
    assert all(w > 250 and h > 80 and parts > 3 for w, h, parts in boxes), boxes
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    sizes = browser.run(
        "[...document.querySelectorAll('figure svg text')].map((e) => e.getBoundingClientRect().height)"
        ".filter((height) => height)"
    )
    assert min(sizes) >= 9  # pixels; letters of 8 or more


def test_the_colours_follow_the_night(browser: Browser, page: Path) -> None:
    """Text of figures has the page's ink, and differs from its paper by day and by night."""
    seen = []
    for dark in (False, True):
        browser.open(page, dark=dark)
        seen.append(
            browser.run(
                "[getComputedStyle(document.querySelector('figure svg text')).fill,"
                "getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
            )
        )
    for text, ink, paper in seen:
        assert text == ink != paper
    assert seen[0][2] != seen[1][2]


def test_a_click_on_a_header_sorts_and_another_turns_around(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.run("document.querySelectorAll('#clients details').forEach((e) => { e.open = true })")
    column = "[...document.querySelectorAll('#clients table')[0].tBodies[0].rows].map((r) => r.cells[2].textContent)"
    header = "#clients table thead th:nth-child(3) button"
    before = browser.run(column)
    browser.click(header)
    rising = browser.run(column)
    browser.click(header)
    falling = browser.run(column)
    assert rising == sorted(before, key=float) != before
    assert falling == sorted(before, key=float, reverse=True)
    assert browser.run("document.querySelectorAll('#clients th[aria-sort=descending]').length") == 1


def test_the_pointer_is_told_whose_dot_it_is_on(browser: Browser, page: Path) -> None:
    browser.open(page)
    mark = "#gain-by-client use[data-client]"
    browser.move_to(mark)
    tip = browser.run("document.querySelector('.tip').textContent")
    client = json.loads(browser.run("document.getElementById('data').textContent"))["clients"]
    owner = client[int(browser.run(f"document.querySelector('{mark}').dataset.client"))]
    assert tip.startswith(f"{owner['name']} ({owner['domain']}, {owner['pool']}): ") and "points" in tip
    assert browser.run("!document.querySelector('.tip').hidden")
    browser.move_to("h1")
    assert browser.run("document.querySelector('.tip').hidden")


def test_clients_are_picked_by_dot_by_name_and_by_text(browser: Browser, page: Path) -> None:
    browser.open(page)
    cards = "[...document.querySelectorAll('#cards article')].map((e) => e.querySelector('h3').textContent)"
    mark = "#gain-by-client use[data-client]"
    number = browser.run(f"document.querySelector('{mark}').dataset.client")
    browser.click(mark)
    (first,) = browser.run(cards)
    picked = browser.run("document.querySelectorAll('use.picked').length")
    assert picked == browser.run(f"document.querySelectorAll('use[data-client=\"{number}\"]').length") > 5
    browser.run("document.querySelectorAll('#clients details').forEach((e) => { e.open = true })")
    browser.click("#clients details:last-of-type tbody tr th button")
    browser.run(
        "(() => { const e = document.getElementById('pick'); e.value = 'seen-06';"
        "e.dispatchEvent(new Event('input')) })()"
    )
    names = browser.run(cards)
    assert len(names) == 3 and names[0] == first and names[2].startswith("seen-06")
    text = browser.run("document.querySelector('#cards article:last-child').innerText")
    for part in ("to train", "severity 0.5", "FT (BN C)", "layer2.0.bn1", "fc.weight", "three"):
        assert part in text
    assert browser.run("document.querySelectorAll('#bar a').length") == 3
    browser.click("#cards article:first-child h3 button")
    assert browser.run(cards) == names[1:]
    browser.click("#clear")
    assert browser.run(cards) == []
    assert browser.run("document.querySelector('nav li:last-child a').getAttribute('href')") == "#picked"
    assert browser.run("document.querySelectorAll('.picked').length") == 0
    assert browser.run("document.getElementById('bar').hidden")


def test_picked_clients_fit_a_telephone_too(browser: Browser, page: Path) -> None:
    browser.open(page, width=390)
    browser.click("#gain-by-client use[data-client]")
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_page_can_be_read_without_its_script(browser: Browser, page: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        size = browser.call("Page.getLayoutMetrics")["cssContentSize"]
        assert size["height"] > 3000
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
