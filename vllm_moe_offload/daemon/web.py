"""The daemon's port for Prometheus and browsers, on this machine's own address only. It must never change anything."""

import logging
from collections.abc import Callable
from contextlib import ExitStack

from prometheus_client import CollectorRegistry, make_wsgi_app

from ..errors import ConfigError
from ..ipc.protocol import StatusReport
from ..page import PATH, Observer, Series, Site
from ..page.wsgi import serve, with_page
from ..report import read_reports
from .metrics import DaemonCollector
from .page import models_of_daemon

logger = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"


def serve_metrics(port: int, status: Callable[[], StatusReport]) -> ExitStack:
    """Answer scrapes, and show the live page, from threads of its own.

    Returns:
        What ends it when it is closed.

    Raises:
        ConfigError: the port cannot be had.
    """
    registry = CollectorRegistry()
    registry.register(DaemonCollector(status))
    series = Series()
    try:
        server = serve(with_page(Site(series), make_wsgi_app(registry)), ADDRESS, port)
    except OSError as error:
        raise ConfigError(f"--metrics-port {port}: cannot listen at {ADDRESS}:{port}: {error.strerror}") from None
    with ExitStack() as stack:
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        stack.callback(Observer(series, lambda: models_of_daemon(status(), read_reports())).close)
        logger.info("metrics: http://%s:%d/metrics, live page: http://%s:%d%s", ADDRESS, port, ADDRESS, port, PATH)
        return stack.pop_all()
