"""The documentation is built without a warning, asks no other host for anything, and says what the code says."""

import ast
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCES = ("vllm_moe_offload", "examples")
OF_OTHERS = (
    "Unknown vLLM environment variable",
    "Engine core initialization failed. See root cause above",
    "operator torchvision::nms does not exist",
)
"""Messages that are not ours."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built strictly: a link or an anchor that leads nowhere fails."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        build, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return folder


class Requested(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self, page: Path):
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        fetched = given.get("href") if tag == "link" else given.get("src")
        if fetched:
            self.addresses.append(fetched)


def test_no_page_asks_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= len(list(DOCS.glob("*.md")))
    for page in pages:
        addresses = Requested(page).addresses
        assert addresses, page
        assert not [address for address in addresses if re.match(r"(\w+:)?//", address)], page


def test_every_page_is_in_the_navigation(site: Path) -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert {page.name for page in DOCS.glob("*.md")} == set(re.findall(r"[\w-]+\.md", navigation))


def test_the_page_of_settings_is_up_to_date() -> None:
    generated = runpy.run_path(str(DOCS / "tools" / "settings.py"))["page"]()
    assert (DOCS / "settings.md").read_text() == generated, "run python docs/tools/settings.py"


def messages() -> Iterator[str]:
    """Every text in the code, with what varies as ``…``."""
    for source in SOURCES:
        for path in (ROOT / source).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield re.sub(r"%[sdr]|%\.\df", "…", node.value)


def quoted() -> list[str]:
    """The messages that the page of symptoms explains."""
    page = (DOCS / "troubleshooting.md").read_text()
    return re.findall(r"^``(.+) ``\n:  |^`(.+)`\n:  ", page, re.MULTILINE)


def test_every_message_that_is_explained_exists_in_the_code() -> None:
    explained = ["".join(groups) for groups in quoted()]
    assert len(explained) > 30
    known = [*messages(), *OF_OTHERS]
    unknown = [message for message in explained if not any(message in text for text in known)]
    assert not unknown
