"""What the page is told at a time: one model, as JSON."""

import base64
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
import numpy as np

from .. import __version__
from ..report import ExpertMap, RequestReport, Residency
from ..stats import Number
from .model import Model, Sample
from .series import columns
from .summary import Summary, Window, summarize

USE_LEVELS = 64


class Query(msgspec.Struct):
    """What the page asks for."""

    model: str = ""
    """Name; the first model if there is none such."""
    worker: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Whose experts to show: an index into ``ModelView.workers``."""
    since: float = 0.0
    """Samples after this time are wanted."""
    requests: bool = False


class WorkerView(msgspec.Struct):
    engine: str
    replica: int
    rank: int
    pid: int
    hits: int
    misses: int
    stall_seconds: float


class MapView(msgspec.Struct):
    """Experts of one worker."""

    layers: list[str]
    experts: int
    """Most of any layer; there are ``len(layers) * experts`` cells, layer by layer."""
    known: bool
    """Whether the host knows what is resident: where a device decides it does not."""
    cells: str
    """Base64, a byte each: ``Residency`` in the lower two bits, above them the level of use."""
    most_uses: float
    """Of an expert of level u there are about ``most_uses * (u / (USE_LEVELS - 1))**2``."""
    hits: list[int]
    misses: list[int]
    stall_seconds: list[float]

    @classmethod
    def of(cls, experts: ExpertMap) -> "MapView":
        uses = np.frombuffer(experts.uses, np.float32)
        states = np.frombuffer(experts.resident, np.uint8)
        most = float(uses.max(initial=0.0))
        levels = np.rint((USE_LEVELS - 1) * np.sqrt(uses / most)) if most > 0 else np.zeros_like(uses)
        cells = levels.astype(np.uint8) << 2
        if len(states):
            cells |= np.minimum(states, np.uint8(Residency.PINNED))
        return cls(
            layers=experts.layers,
            experts=experts.experts,
            known=bool(len(states)),
            cells=base64.b64encode(cells.tobytes()).decode(),
            most_uses=most,
            hits=experts.hits,
            misses=experts.misses,
            stall_seconds=experts.stall_seconds,
        )


class ModelView(msgspec.Struct):
    name: str
    started: float
    time: float
    """Of the latest report; 0 without any."""
    summary: Summary
    recent: Window | None
    """What the summary speaks of."""
    totals: Mapping[str, Number]
    series: dict[str, list[float]]
    workers: list[WorkerView]
    experts: MapView | None
    predictor: str
    prediction: str
    prediction_reason: str
    daemon: bool
    """Whether a daemon keeps the experts."""
    requests: list[RequestReport] | None


class View(msgspec.Struct):
    version: str
    time: float
    models: list[str]
    model: ModelView | None
    """The one that was asked for; None before any worker has reported."""


def view(models: Sequence[tuple[Model, list[Sample]]], query: Query, now: float) -> View:
    """An answer to ``query``.

    Args:
        models: with their samples, oldest first.
        now: seconds since 1970.
    """
    chosen = next((each for each in models if each[0].name == query.model), models[0] if models else None)
    return View(
        version=__version__,
        time=now,
        models=[model.name for model, _ in models],
        model=_model_view(*chosen, query, now) if chosen else None,
    )


def _model_view(model: Model, samples: list[Sample], query: Query, now: float) -> ModelView:
    reports = model.reports
    shown = reports[query.worker if query.worker < len(reports) else 0] if reports else None
    return ModelView(
        name=model.name,
        started=model.started,
        time=model.time,
        summary=summarize(model, samples, now),
        recent=Window.of(samples),
        totals=model.totals,
        series=columns(samples, query.since),
        workers=[
            WorkerView(
                engine=report.engine,
                replica=report.replica,
                rank=report.rank,
                pid=report.pid,
                hits=int(report.stats.get("hits", 0)),
                misses=int(report.stats.get("misses", 0)),
                stall_seconds=report.stats.get("stall_seconds", 0.0),
            )
            for report in reports
        ],
        experts=MapView.of(shown.experts) if shown else None,
        predictor=shown.predictor if shown else "",
        prediction=shown.prediction if shown else "",
        prediction_reason=shown.prediction_reason if shown else "",
        daemon=bool(shown and shown.daemon_pid),
        requests=[request for report in reports for request in report.requests if report.rank == 0]
        if query.requests
        else None,
    )
