"""Debian's Chromium, or a Chrome that is there, without a window and without a network but this machine's."""

import shutil
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from playwright.sync_api import ConsoleMessage, Page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
POLL_MS = 2100
"""A little more than the page waits between two questions."""


@dataclass
class Tab:
    """One page, and what it has done besides."""

    page: Page
    errors: list[str] = field(default_factory=list)
    """Of its scripts and on its console."""
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)
        self.page.on("request", lambda request: self.requests.append(request.url))

    @property
    def hosts(self) -> set[str]:
        return {urlsplit(url).netloc for url in self.requests}

    @property
    def questions(self) -> list[str]:
        """Requests for data."""
        return [url for url in self.requests if urlsplit(url).path.endswith("/data")]

    def open(self, url: str) -> None:
        """Load the page, whose clock stands still but for ``poll``."""
        self.page.clock.install()
        self.page.goto(url)

    def poll(self) -> None:
        """Let the page ask once more, and show the answer."""
        asked = len(self.questions)
        with self.page.expect_event("requestfinished", lambda request: "/data" in request.url):
            self.page.clock.run_for(POLL_MS)
        assert len(self.questions) > asked

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)
