"""The page beside another WSGI application, and a server for both, as on the daemon's port."""

from collections.abc import Callable, Iterable
from http import HTTPStatus
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import parse_qsl
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from ..threads import ReportedThread
from .site import DATA_PATH, HEADERS, PATH, Answer, Site

WsgiApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """No line for each request."""


def serve(app: WsgiApp, address: str, port: int) -> WSGIServer:
    """Answer requests from a thread of its own, until ``shutdown`` and ``server_close`` of what is returned.

    Args:
        port: 0 for any.

    Raises:
        OSError: the port cannot be had.
    """
    server = make_server(address, port, app, _Server, _Handler)
    ReportedThread(target=server.serve_forever, args=(0.1,), name="moe-offload-http", daemon=True).start()
    return server


def with_page(site: Site, others: WsgiApp) -> WsgiApp:
    """An application that answers the page's addresses itself, and leaves all others to ``others``."""

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path != PATH and not path.startswith(f"{PATH}/"):
            return others(environ, start_response)
        answer = _answer(site, environ["REQUEST_METHOD"], path, environ.get("QUERY_STRING", ""))
        headers = {**HEADERS, "Content-Type": answer.content_type, "Content-Length": str(len(answer.body))}
        start_response(f"{answer.status} {HTTPStatus(answer.status).phrase}", list(headers.items()))
        return [answer.body]

    return app


def _answer(site: Site, method: str, path: str, query: str) -> Answer:
    if method != "GET":
        return Answer(405, "text/plain; charset=utf-8", b"the page is only read\n")
    if path == DATA_PATH:
        return site.data(dict(parse_qsl(query)))
    return site.file(path.removeprefix(PATH).removeprefix("/"))
