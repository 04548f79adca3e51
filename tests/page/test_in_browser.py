"""The page in Chromium, over a real server and real report files."""

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.page.browser import Tab
from tests.page.server import PageServer
from tests.page.workers import Worker
from vllm_moe_offload.report import Residency

NewTab = Callable[..., Tab]


def open_all(tab: Tab) -> None:
    """Unfold what is folded."""
    tab.page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    expect(tab.page.locator("#requests tbody tr")).not_to_have_count(0)


def complaints(tab: Tab) -> list[str]:
    """What axe finds wrong for people who cannot see well, or use no pointer."""
    found = Axe().run(tab.page).response["violations"]
    return [f"{each['id']}: {node['html']}" for each in found for node in each["nodes"]]


def test_it_shows_what_is_reported_and_asks_nobody_else(server: PageServer, worker: Worker, new_tab: NewTab) -> None:
    tab = new_tab()
    tab.open(server.url)
    expect(tab.page.locator("#connection")).to_have_text("Live")
    hits, misses = worker.stats.hits, worker.stats.misses
    assert tab.text("#model") == "model-moe"
    assert re.match(r"\d+\s% of experts were found in memory; tokens ", tab.text("#sentence"))
    assert tab.text(".card[data-name=hits] p") == f"{round(100 * hits / (hits + misses))}\N{NO-BREAK SPACE}%"
    assert tab.page.get_attribute(".card[data-name=hits] .curve", "d")
    assert f"{int(worker.resident().sum())} of {6 * 16} are in memory" in tab.text("#experts-text")
    assert "412 requests remembered" in tab.text("#prefetch-text")
    open_all(tab)
    layer = [cell.inner_text() for cell in tab.page.locator("#layers tbody tr").nth(3).locator("th, td").all()]
    assert layer[:2] == ["3", str(int(worker.resident()[3].sum()))]
    assert layer[3] == str(int(worker.misses[3]))
    assert str(worker.uses[3].argmax()) in layer[5]
    assert tab.text("#requests tbody th") == "cmpl-7a51"
    assert tab.hosts == {urlsplit(server.url).netloc}
    assert not tab.errors


def test_the_map_paints_what_is_in_memory(server: PageServer, worker: Worker, new_tab: NewTab) -> None:
    tab = new_tab()
    tab.open(server.url)
    expect(tab.page.locator("#connection")).to_have_text("Live")
    colours = tab.page.evaluate(
        """() => {
            const canvas = document.getElementById("map");
            const context = canvas.getContext("2d");
            const cell = Math.min(34, Math.floor((canvas.clientWidth - 30 - canvas.clientWidth * 0.06) / 16));
            const middle = (row, column) => [30 + (column + 0.4) * cell, 16 + (row + 0.4) * 22];
            return [...Array(6 * 16).keys()].map((at) => {
                const [x, y] = middle(Math.floor(at / 16), at % 16);
                return [...context.getImageData(x, y, 1, 1).data.slice(0, 3)];
            });
        }"""
    )
    greenish = [green > red for red, green, _ in colours]
    used = worker.uses.ravel() > 0.5
    resident = worker.resident().ravel()
    assert [bool(each) for each in resident[used]] == [
        each for each, is_used in zip(greenish, used, strict=True) if is_used
    ]


def test_it_follows_the_load(server: PageServer, worker: Worker, new_tab: NewTab) -> None:
    tab = new_tab()
    tab.open(server.url)
    expect(tab.page.locator("#connection")).to_have_text("Live")
    misses = "#workers tbody td:nth-child(4)"
    open_all(tab)
    for _ in range(2):
        worker.step(tokens=8)
        worker.write()
        server.look()
        tab.poll()
        expect(tab.page.locator(misses)).to_have_text(f"{worker.stats.misses:,}")
    assert all("since=0" not in url for url in tab.questions[1:]), "samples it has are sent again"
    assert not tab.errors


def test_it_says_that_the_server_has_gone_and_goes_on_when_it_is_back(
    server: PageServer, worker: Worker, folder: Path, new_tab: NewTab
) -> None:
    tab = new_tab()
    tab.open(server.url)
    expect(tab.page.locator("#connection")).to_have_text("Live")
    port = server.port
    server.close()
    tab.page.clock.run_for(2100)
    expect(tab.page.locator("#connection")).to_contain_text("Server not reachable since")
    assert re.match(r"\d+\s% of experts", tab.text("#sentence")), "what was known stays"
    worker.report.served_model = "another-moe"
    worker.write()
    again = PageServer(folder, port)
    try:
        tab.poll()
        expect(tab.page.locator("#connection")).to_have_text("Live")
        expect(tab.page.locator("#model")).to_have_text("another-moe")
    finally:
        again.close()


def test_it_says_that_workers_have_stopped_reporting(server: PageServer, worker: Worker, new_tab: NewTab) -> None:
    worker.report.served_model = "silent-moe"
    worker.write(at=worker.report.time - 60)
    server.look()
    tab = new_tab()
    tab.open(server.url)
    expect(tab.page.locator("#sentence")).to_have_text(re.compile("The workers have not reported for 6. s."))


def test_it_waits_for_the_first_report(folder: Path, new_tab: NewTab) -> None:
    server = PageServer(folder)
    tab = new_tab()
    tab.open(server.url)
    expect(tab.page.locator("#sentence")).to_have_text("No worker has reported yet.")
    expect(tab.page.locator("#experts")).to_be_hidden()
    worker = Worker(folder)
    worker.write()
    server.look()
    tab.poll()
    expect(tab.page.locator("#sentence")).to_have_text("No request has been served yet.")
    expect(tab.page.locator("#experts")).to_be_visible()
    assert not tab.errors
    worker.close()
    server.close()


def test_the_keyboard_reaches_everything(server: PageServer, worker: Worker, new_tab: NewTab) -> None:
    tab = new_tab()
    tab.open(server.url)
    expect(tab.page.locator("#connection")).to_have_text("Live")
    reached = []
    for _ in range(7):
        tab.page.keyboard.press("Tab")
        reached.append(tab.page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert reached[:4] == ["Skip to the figures", "pause", "map", "Layers as a table"]
    assert reached[4:6] == ["Requests", "Workers"]
    tab.page.focus("#map")
    for key in ("End", "PageDown", "ArrowLeft", "ArrowUp"):
        tab.page.keyboard.press(key)
    state = "in memory" if worker.resident()[4, 14] else "not in memory"
    assert tab.text("#cell").startswith(f"Layer 4, expert 14: {state}, ")
    tab.page.focus("#requests-details summary")
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator("#requests tbody th").first).to_have_text("cmpl-7a51")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible(scheme: str, server: PageServer, new_tab: NewTab) -> None:
    tab = new_tab(color_scheme=scheme)
    tab.open(server.url)
    expect(tab.page.locator("#connection")).to_have_text("Live")
    open_all(tab)
    tab.page.focus("#map")
    assert complaints(tab) == []
    server.close()
    tab.page.clock.run_for(2100)
    expect(tab.page.locator("#connection")).to_contain_text("Server not reachable since")
    assert complaints(tab) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_asking_for_the_key_is_accessible(scheme: str, folder: Path, new_tab: NewTab) -> None:
    server = PageServer(folder, key="sesame")
    tab = new_tab(color_scheme=scheme)
    tab.open(server.url)
    tab.page.fill("#key", "wrong")
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator("#refused")).to_have_text("The server refused this key.")
    assert complaints(tab) == []
    server.close()


def test_it_fits_a_phone(folder: Path, new_tab: NewTab) -> None:
    worker = Worker(folder, layers=60, experts=256)
    worker.write(at=worker.report.started)
    server = PageServer(folder)
    worker.step(tokens=50)
    worker.write()
    server.look()
    tab = new_tab(viewport={"width": 320, "height": 640}, device_scale_factor=3, has_touch=True, is_mobile=True)
    tab.open(server.url)
    expect(tab.page.locator("#connection")).to_have_text("Live")
    open_all(tab)
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 320
    assert tab.page.evaluate("document.getElementById('map').clientHeight") >= 60 * 5
    worker.close()
    server.close()


def test_nothing_moves_for_those_who_do_not_want_it(server: PageServer, new_tab: NewTab) -> None:
    durations = """[...document.querySelectorAll("*")]
        .flatMap((each) => ["", "::before"].map((part) => getComputedStyle(each, part).transitionDuration))
        .filter((each) => each != "0s")"""
    moving, still = new_tab(reduced_motion="no-preference"), new_tab(reduced_motion="reduce")
    for tab in (moving, still):
        tab.open(server.url)
        expect(tab.page.locator("#connection")).to_have_text("Live")
    assert moving.page.evaluate(durations)
    assert not still.page.evaluate(durations)


def test_the_key_is_asked_for_kept_in_the_tab_and_never_in_an_address(
    folder: Path, worker: Worker, new_tab: NewTab
) -> None:
    worker.write()
    server = PageServer(folder, key="sesame")
    tab = new_tab()
    tab.open(server.url)
    expect(tab.page.locator("#login")).to_be_visible()
    expect(tab.page.locator("#figures")).to_be_hidden()
    tab.page.fill("#key", "sesame")
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator("#model")).to_have_text("model-moe")
    expect(tab.page.locator("#login")).to_be_hidden()
    tab.page.reload()
    expect(tab.page.locator("#model")).to_have_text("model-moe")
    assert not [url for url in tab.requests if "sesame" in url]
    server.close()


def test_a_paused_page_asks_nothing(server: PageServer, new_tab: NewTab) -> None:
    tab = new_tab()
    tab.open(server.url)
    expect(tab.page.locator("#connection")).to_have_text("Live")
    tab.page.click("#pause")
    expect(tab.page.locator("#connection")).to_have_text("Paused")
    asked = len(tab.questions)
    tab.page.clock.run_for(10_000)
    assert len(tab.questions) == asked
    tab.page.click("#pause")
    expect(tab.page.locator("#connection")).to_have_text("Live")


def test_a_model_and_a_worker_can_be_chosen(server: PageServer, worker: Worker, folder: Path, new_tab: NewTab) -> None:
    second = Worker(folder, rank=1)
    other = Worker(folder, layers=2, experts=8, engine="c0ffee")
    other.report.served_model = "a-small-moe"
    for each in (second, other):
        each.step()
        each.write()
    server.look()
    tab = new_tab()
    tab.open(server.url)
    expect(tab.page.locator("#model")).to_have_text("a-small-moe")
    tab.page.select_option("#choose-model select", "model-moe")
    expect(tab.page.locator("#model")).to_have_text("model-moe")
    expect(tab.page.locator("#experts-text")).to_contain_text("6 layers of 16")
    tab.page.select_option("#choose-worker select", label="rank 1")
    expect(tab.page.locator("#layers tbody tr:nth-child(1) td:nth-child(4)")).to_have_text(str(int(second.misses[0])))
    assert not tab.errors
    second.close()
    other.close()


def test_what_a_device_decides_is_not_guessed(folder: Path, new_tab: NewTab) -> None:
    worker = Worker(folder, known=False)
    worker.step()
    worker.write()
    server = PageServer(folder)
    tab = new_tab()
    tab.open(server.url)
    expect(tab.page.locator("#experts-text")).to_contain_text("the device decides which are in its slots")
    tab.page.focus("#map")
    assert "in memory" not in tab.text("#cell")
    assert Residency.ABSENT == 0
    worker.close()
    server.close()
