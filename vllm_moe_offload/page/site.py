"""What is answered at each address of the page, whichever server was asked."""

import time
from collections.abc import Mapping
from importlib.resources import files
from typing import NamedTuple

import msgspec

from .series import Series
from .view import Query, view

PATH = "/moe-offload"
DATA_PATH = f"{PATH}/data"

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every answer: a browser takes nothing from elsewhere, and sends nothing there."""

_STATIC = {
    "page.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "expert_map.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "figures.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


class Answer(NamedTuple):
    status: int
    content_type: str
    body: bytes


class Site:
    """Files and data. Thread-safe."""

    def __init__(self, series: Series):
        self._series = series
        folder = files(__package__) / "static"
        self._files = {name: Answer(200, kind, (folder / name).read_bytes()) for name, kind in _STATIC.items()}

    def file(self, name: str) -> Answer:
        """One of the static files; the page itself without a name."""
        return self._files.get(name or "page.html", Answer(404, "text/plain; charset=utf-8", b"no such file\n"))

    def data(self, parameters: Mapping[str, str]) -> Answer:
        """The fields of ``Query``, as a URL has them."""
        try:
            query = msgspec.convert(dict(parameters), Query, strict=False)
        except msgspec.ValidationError as error:
            return Answer(400, "text/plain; charset=utf-8", f"{error}\n".encode())
        answer = view(self._series.models(), query, time.time())
        return Answer(200, "application/json", msgspec.json.encode(answer))
