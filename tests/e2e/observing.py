"""What an engine in a process of its own shows to others: run there by ``LiveEngine.run`` and ``call``."""

import asyncio
import os
import tempfile
import threading
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

OBSERVED = {"otlp_traces_endpoint": "http://127.0.0.1:1", "disable_log_stats": False}
"""Engine arguments."""


def keep_spans() -> None:
    """Spans stay in this process instead of going to the endpoint."""
    import vllm.tracing.otel as otel
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = otel.kept_spans = InMemorySpanExporter()
    otel.get_span_exporter = lambda endpoint: exporter


def spans_of_requests(worker: Any) -> list[dict[str, Any]]:
    """The attributes of each."""
    import vllm.tracing.otel as otel

    otel.trace.get_tracer_provider().force_flush()
    spans = otel.kept_spans.get_finished_spans()
    return [dict(span.attributes) for span in spans if span.name == "llm_request"]


def report_now(worker: Any) -> None:
    """Returns when every report has been written that follows what has been generated so far."""
    for reporter in worker.moe_offload._reporters:
        written = threading.Event()
        reporter._background.soon(reporter._write)
        reporter._background.soon(written.set)
        written.wait()


def pages_of_metrics(worker: Any) -> tuple[str, str]:
    """What vLLM's page of metrics says where one API server answers, and where several do."""
    with tempfile.TemporaryDirectory() as folder:
        alone = _page()
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        try:
            return alone, _page()
        finally:
            del os.environ["PROMETHEUS_MULTIPROC_DIR"]


def _page() -> str:
    from fastapi import FastAPI
    from starlette.testclient import TestClient
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router

    app = FastAPI()
    attach_router(app)
    return TestClient(app).get("/metrics").text


def live_page(worker: Any) -> dict[str, Any]:
    """What the data of the live page says on a server of this engine."""
    from fastapi import FastAPI
    from starlette.testclient import TestClient
    from vllm.plugins.endpoint_plugins.interface import attach_endpoint_plugins, init_endpoint_plugins_state

    config = worker.vllm_config
    address = dict.fromkeys(("api_key", "host", "uds", "ssl_keyfile", "ssl_certfile", "root_path"))
    app = FastAPI()
    app.state.args = Namespace(additional_config=config.additional_config, port=8000, **address)
    attach_endpoint_plugins(app, ("generate",))
    asyncio.run(init_endpoint_plugins_state(SimpleNamespace(vllm_config=config), app.state, app.state.args))
    data: dict[str, Any] = TestClient(app).get("/moe-offload/data").json()
    return data
