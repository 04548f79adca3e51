"""What remembering and predicting cost beside a forward pass, in microseconds: no model, no disk, no engine.

Steps of made-up requests run through the plugin's own recorder, predictor and planner, as the engine runs them. Slots
are numbers here: experts are absent at random, and a guess costs nothing to start. Steps in which the predictor was
asked are told apart from those that were left alone, as some always are and all when prediction does not pay.

    python benchmarks/predicting.py --experts 128 --top-k 8 --batch 1,8 --absent 0,0.5
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from vllm_moe_offload.load_report import NOTHING, LoadReport
from vllm_moe_offload.predict.base import ModelShape, Predictor
from vllm_moe_offload.predict.heads import HeadsPredictor
from vllm_moe_offload.predict.history import HistoryPredictor
from vllm_moe_offload.predict.network import NetworkSize, Parameters
from vllm_moe_offload.predict.registry import predictor_for_replay
from vllm_moe_offload.predict.token_vectors import ModelVectors
from vllm_moe_offload.prefetch.planner import Estimates
from vllm_moe_offload.prefetch.prefetcher import Prefetcher, PrefetchLayer
from vllm_moe_offload.runtime import Batch, OffloadRuntime, RoutingTracer
from vllm_moe_offload.stats import Stats
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.recorder import Recorder, ScheduledTokens
from vllm_moe_offload.trace.trace import Trace

VOCABULARY = 32_000
WIDTH = 1024
PROMPT = 4
NO_STORE: Any = SimpleNamespace(layers=[SimpleNamespace(name="", layout=None, experts=1)])
NO_POOL: Any = SimpleNamespace(begin_step=lambda: NOTHING)
"""Of a runtime whose layers are never served."""
PREDICTORS = ("none", "history", "neighbours", "finemoe", "moe-infinity", "coactivation", "frequency")


class Slots:
    """Residency as numbers: every layer has the same share of experts absent, another choice of them every step."""

    def __init__(self, shape: ModelShape, absent: float):
        draw = np.random.default_rng(1)
        self._absent = draw.random((64, shape.layers, shape.experts)) < absent
        self._expected = np.zeros((shape.layers, shape.experts), np.float32)
        self._now = self._absent[0]
        self.guesses = 0

    def next_step(self, number: int) -> None:
        self._now = self._absent[number % len(self._absent)]

    @property
    def layers(self) -> list[PrefetchLayer]:
        number, experts = self._expected.shape
        spans = [range(layer * experts, (layer + 1) * experts) for layer in range(number)]
        return [PrefetchLayer(self, span, None, experts) for span in spans]

    def enable_predictions(self) -> None:
        pass

    def absent(self, layer: range) -> NDArray[np.bool_]:
        return self._now[layer.start // len(layer)]

    def expect(self, layer: range, probabilities: NDArray[np.float32] | float) -> None:
        self._expected[layer.start // len(layer)] = probabilities

    def prefetch(self, layer: range, experts: NDArray[np.int64]) -> LoadReport:
        self.guesses += len(experts)
        return LoadReport(started=len(experts))

    def queued(self) -> int:
        return 0


class OneToken(Batch):
    """What the engine would say of one step: a token of each request."""

    def __init__(self, requests: list[ScheduledTokens]):
        super().__init__(len(requests))
        self._requests = requests

    def rows(self) -> Sequence[ScheduledTokens]:
        return self._requests

    def prompt(self, request: str) -> NDArray[np.int32]:
        return np.arange(PROMPT, dtype=np.int32)


class Cost(NamedTuple):
    """Microseconds of one way to serve: a tenth of the steps were faster, so that a busy machine does not show."""

    routed: float
    """Per layer: the router's choices are noted, and observed where someone looks ahead."""
    look_ahead: float
    """Per layer."""
    begin: float
    end: float
    ended: float
    """Per request that has ended."""

    def step(self, layers: int) -> float:
        return self.begin + self.end + layers * (self.routed + self.look_ahead)


def made_up_history(shape: ModelShape, tokens: int, requests: int, seed: int = 0) -> HistoryStore:
    """About ``tokens`` tokens of ``requests`` requests."""
    draw = np.random.default_rng(seed)
    history = HistoryStore(shape)
    length = max(1, tokens // requests)
    for _ in range(requests if tokens else 0):
        experts = draw.random((length, shape.layers, shape.experts), np.float32).argpartition(-shape.top_k, axis=2)
        weights = np.full((length, shape.layers, shape.top_k), 1 / shape.top_k, np.float16)
        embedding = draw.standard_normal((1, WIDTH)).astype(np.float16)
        read = draw.integers(0, VOCABULARY, length).astype(np.int32)
        chosen = experts[:, :, -shape.top_k :].astype(np.uint8)
        history.add(Trace(chosen, weights, np.array([0, length]), shape.experts, tokens=read, embeddings=embedding))
    return history


def make_predictor(name: str, shape: ModelShape, history: HistoryStore) -> Predictor | None:
    """`history` predicts by heads, whose numbers are random: they cost what trained ones do."""
    if name == "none":
        return None
    if name != "history":
        return predictor_for_replay(name, shape, history)
    predictor = HistoryPredictor(shape, history)
    table = np.random.default_rng(2).standard_normal((VOCABULARY, WIDTH)).astype(np.float32)
    parameters = Parameters.random(NetworkSize(shape.layers, shape.experts, WIDTH), np.random.default_rng(3))
    heads = HeadsPredictor(shape, parameters, ModelVectors(lambda tokens: table[tokens], WIDTH))
    predictor.use_heads(heads, history.num_tokens)
    return predictor


class Bench:
    """One worker serving made-up steps, timed from outside by what the engine calls."""

    def __init__(self, shape: ModelShape, predictor: Predictor | None, absent: float):
        self.shape = shape
        self.slots = Slots(shape, absent)
        self.prefetcher = None
        if predictor is not None:
            estimates = Estimates(load_seconds=1e-3, layer_seconds=1e-3, chunk_seconds=1e-3)
            # by a clock that stands still prediction takes no time, so nothing disables it for good
            self.prefetcher = Prefetcher(predictor, self.slots.layers, estimates, lambda: 0.0, Stats())
        closed = (lambda trace, state: predictor.end_request(state, trace)) if predictor else lambda trace, state: None
        self.runtime = OffloadRuntime(NO_STORE, {"": NO_POOL}, Stats())
        self.runtime.tracer = RoutingTracer(Recorder(shape, 4096), closed, None)
        self.runtime.prefetcher = self.prefetcher
        draw = np.random.default_rng(4)
        self._tokens = draw.integers(0, VOCABULARY, 4096).astype(np.int32)
        choices = draw.random((256, shape.experts), np.float32).argpartition(-shape.top_k, axis=1)
        self._experts = np.ascontiguousarray(choices[:, -shape.top_k :]).astype(np.int32)
        self._weights = np.full((256, shape.top_k), 1 / shape.top_k, np.float32)

    def serve(self, batch: int, steps: int, warm_up: int = 40) -> dict[bool, Cost]:
        """Run ``steps`` steps of ``batch`` requests that end with it: what predicted ones cost, and others."""
        times: dict[bool, dict[str, list[float]]] = {}
        for step in range(warm_up + steps):
            predicted, timed = self._step(batch, step)
            if step >= warm_up:
                for name, seconds in timed.items():
                    times.setdefault(predicted, {}).setdefault(name, []).append(seconds)
        ended = _seconds(lambda: self.runtime.end_requests([str(r) for r in range(batch)])) / batch
        return {
            predicted: Cost(
                **{name: 1e6 * float(np.percentile(seconds, 10)) for name, seconds in parts.items()}, ended=1e6 * ended
            )
            for predicted, parts in sorted(times.items())
        }

    def _step(self, batch: int, step: int) -> tuple[bool, dict[str, float]]:
        self.slots.next_step(step)
        tokens = self._tokens[(step * batch) % 2048 :][:batch]
        rows = [ScheduledTokens(str(r), PROMPT + step, tokens[r : r + 1], PROMPT) for r in range(batch)]
        self.runtime.begin_step(OneToken(rows))
        begin = _seconds(self.runtime.begin_pass)
        predicted = self.prefetcher is not None and self.prefetcher.predicts
        routed = look_ahead = 0.0
        for layer in range(self.shape.layers):
            first = (7 * step + 3 * layer) % (256 - batch)
            experts, weights = self._experts[first : first + batch], self._weights[first : first + batch]
            began = time.perf_counter()
            self.runtime.observe(layer, experts, weights)
            between = time.perf_counter()
            if self.prefetcher is not None:
                self.prefetcher.look_ahead()
            routed, look_ahead = routed + between - began, look_ahead + time.perf_counter() - between
        end = _seconds(self.runtime.end_step)
        layers = self.shape.layers
        timed = {"routed": routed / layers, "look_ahead": look_ahead / layers, "begin": begin, "end": end}
        return predicted, timed


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """The command line."""
    numbers = lambda kind: lambda text: [kind(n) for n in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--batch", type=numbers(int), default=[1, 8])
    parser.add_argument("--predictor", type=lambda text: text.split(","), default=["none", "history"])
    parser.add_argument("--absent", type=numbers(float), default=[0.0, 0.5], help="shares of experts without a slot")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens in the history")
    parser.add_argument("--requests", type=int, default=20, help="requests in the history")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    shape = ModelShape(options.layers, options.experts, options.top_k)
    table = Table(
        *("predictor", "batch", "absent", "routed", "look ahead", "begin", "end", "step", "request ended"),
        title=f"microseconds; {shape.layers} layers of {shape.experts} experts, top {shape.top_k}",
    )
    results = []
    for name in options.predictor:
        for batch in options.batch:
            for absent in options.absent if name != "none" else [0.0]:
                history = made_up_history(shape, options.tokens, options.requests)
                costs = Bench(shape, make_predictor(name, shape, history), absent).serve(batch, options.steps)
                for predicted, cost in costs.items():
                    label = name if predicted or name == "none" else f"{name}, left alone"
                    results.append({"predictor": label, "batch": batch, "absent": absent, **cost._asdict()})
                    figures = (cost.routed, cost.look_ahead, cost.begin, cost.end, cost.step(shape.layers), cost.ended)
                    table.add_row(label, str(batch), f"{absent:g}", *(f"{figure:.1f}" for figure in figures))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"shape": shape._asdict(), "tokens": options.tokens, "costs": results}))


if __name__ == "__main__":
    main()
