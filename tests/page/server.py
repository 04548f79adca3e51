"""The page over a folder of reports, on a real port, with or without an API key."""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from vllm_moe_offload.page import Model, Observer, Series, Site, models_of_reports
from vllm_moe_offload.page.wsgi import with_page
from vllm_moe_offload.report import read_reports


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    allow_reuse_address = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


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
        self._server = make_server(
            "127.0.0.1", port, _guarded(with_page(Site(self._series), _nothing), key), _Server, _Quiet
        )
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
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
        self._thread.join()
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
