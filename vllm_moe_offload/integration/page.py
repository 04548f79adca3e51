"""The live page on vLLM's OpenAI-compatible server: an endpoint plugin, served where ``page`` is asked for.

vLLM loads the endpoint plugins that ``VLLM_PLUGINS`` names; asking for the page does the same for this one.
"""

import logging
import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from ..config import resolve
from ..page import DATA_PATH, PATH, Model, Observer, Series, models_of_reports
from ..report import read_reports
from ..report.engine import engine_id
from . import seams

logger = init_logger(__name__)


def install() -> None:
    seams.ENDPOINT_PLUGINS.wrap(_with_page)


class PagePlugin:
    """What vLLM calls an endpoint plugin."""

    name = "moe-offload-page"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the page's routes to the application, if its settings ask for the page."""
        config, _ = resolve(app.state.args.additional_config, os.environ)
        if config is None or not config.page:
            return
        from .page_routes import add_routes  # a worker never needs it, nor what it imports

        app.state.moe_offload_series = Series()
        add_routes(app, app.state.moe_offload_series)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Begin to read what the engine's workers report, and say where the page is."""
        series = getattr(state, "moe_offload_series", None)
        if series is None or engine_client is None:
            return
        config = engine_client.vllm_config
        engine = engine_id()
        state.moe_offload_observer = Observer(series, lambda: models_of_engine(engine))
        logging.getLogger("uvicorn.access").addFilter(_is_worth_a_line)
        if config.parallel_config._api_process_rank <= 0:
            logger.info("live page: %s", url(args))


def models_of_engine(engine: str) -> list[Model]:
    """What the workers of one engine report."""
    return models_of_reports(report for report in read_reports() if report.engine == engine)


def url(args: Namespace) -> str:
    """Where a browser finds the page."""
    path = f"{(args.root_path or '').rstrip('/')}{PATH}"
    if args.uds:
        return f"{path} at unix:{args.uds}"
    host = args.host or "localhost"
    host = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"{'https' if args.ssl_keyfile and args.ssl_certfile else 'http'}://{host}:{args.port}{path}"


def _with_page(load: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> list[Any]:
        return [*load(*args, **kwargs), PagePlugin()]

    return load_endpoint_plugins


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Not so the page's questions, which come every other second, as long as they are answered."""
    match record.args:
        case (_, _, str(path), _, 200):
            return not path.partition("?")[0].endswith(DATA_PATH)
    return True
