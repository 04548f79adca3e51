"""The live page on vLLM's OpenAI-compatible server: an endpoint plugin, served where ``page`` is asked for.

vLLM loads the endpoint plugins that ``VLLM_PLUGINS`` names; asking for the page does the same for this one.
"""

import logging
import os
from argparse import Namespace
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import psutil
from vllm.logger import init_logger

from ..config import resolve
from ..page import DATA_PATH, PATH, Model, Observer, Series, models_of_reports
from ..report import WorkerReport, read_reports
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
        several = config.parallel_config._api_process_count > 1
        # One of several servers has a configuration of its own, and the engine from the process they share.
        family = os.getppid() if several else os.getpid()
        state.moe_offload_observer = Observer(series, lambda: models_of_engine(config.instance_id, family))
        logging.getLogger("uvicorn.access").addFilter(_is_worth_a_line)
        if config.parallel_config._api_process_rank <= 0:
            logger.info("live page: %s", url(args))


def models_of_engine(instance_id: str, family: int) -> list[Model]:
    """What the workers of one engine report, or those that descend from process ``family``."""
    return models_of_reports(
        report
        for report in read_reports()
        if _belongs(report, instance_id) or _descends(report.pid, report.started, family)
    )


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


def _belongs(report: WorkerReport, instance_id: str) -> bool:
    """vLLM adds ``_dp`` and a number for data-parallel replicas."""
    return report.engine == instance_id or report.engine.startswith(f"{instance_id}_dp")


@lru_cache(maxsize=1024)
def _descends(pid: int, started: float, ancestor: int) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() <= started and ancestor in (pid, *(each.pid for each in process.parents()))
    except psutil.Error:
        return False


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Not so the page's questions, which come every other second, as long as they are answered."""
    match record.args:
        case (_, _, str(path), _, 200):
            return not path.partition("?")[0].endswith(DATA_PATH)
    return True
