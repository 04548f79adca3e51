"""A browser for the session, and for each test a folder of reports, a server over it, and a tab."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.page.browser import CHROMIUM, FLAGS, Tab
from tests.page.server import PageServer
from tests.page.workers import Worker

NewTab = Callable[..., Tab]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the reports."""
    return tmp_path / "reports"


@pytest.fixture
def worker(folder: Path) -> Iterator[Worker]:
    """One that has served a few steps and reported twice."""
    worker = Worker(folder)
    worker.write(at=worker.report.started + 1)
    for _ in range(20):
        worker.step(seconds=0.5)
    yield worker
    worker.close()


@pytest.fixture
def server(folder: Path, worker: Worker) -> Iterator[PageServer]:
    server = PageServer(folder)
    worker.write()
    server.look()
    yield server
    server.close()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        assert "CI" not in os.environ, "the live page has to be tested in a browser"
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def new_tab(chromium: Browser) -> Iterator[NewTab]:
    contexts = []

    def make(**options: Any) -> Tab:
        contexts.append(chromium.new_context(**options))
        return Tab(contexts[-1].new_page())

    yield make
    for context in contexts:
        context.close()
