"""The page over a folder of reports, on a real port, with or without an API key."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vllm_moe_offload.page import Model, Observer, Series, Site, models_of_reports
from vllm_moe_offload.page.wsgi import serve, with_page
from vllm_moe_offload.report import read_reports


class PageServer:
    """Serves until ``close``.

    Args:
        port: 0 for any.
        key: asked for by the data.
    """

    def __init__(self, folder: Path, port: int = 0, key: str = ""):
        self._folder = folder
        self._series = Series()
        self._observer = Observer(self._series, self._models)
        self._server = serve(_guarded(with_page(Site(self._series), _nothing), key), "127.0.0.1", port)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/moe-offload"

    def look(self) -> None:
        """See what has been reported by now, rather than up to a second later."""
        self._series.observe(self._models())

    def _models(self) -> list[Model]:
        return models_of_reports(read_reports(self._folder))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._observer.close()


def _nothing(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("404 Not Found", [])
    return []


def _guarded(app: Callable[..., Any], key: str) -> Callable[..., Any]:
    def guard(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        asked = key and environ["PATH_INFO"].endswith("/data")
        if asked and environ.get("HTTP_AUTHORIZATION") != f"Bearer {key}":
            start_response("401 Unauthorized", [])
            return []
        return app(environ, start_response)

    return guard
