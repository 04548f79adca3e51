"""Whether the simulator is right about this machine: time per token and stalls, measured and simulated, side by side.

The trace of the prompts is recorded once by an engine with everything resident. Engines with part of the experts then
serve the same prompts in the same order, with prediction and without; each is simulated from the trace with the same
slots, policy and predictor, from its cold start on, and the warm-up is left out of both. Predictions that are never
wrong are simulated too: what a better predictor could still gain with these slots and this policy.

    python benchmarks/profile_machine.py --model /tmp/wide --out machine.json
    python benchmarks/agreement.py --model /tmp/wide --warm /tmp/warm --hardware machine.json --budgets 25%,50%
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from comparison import Arm, Comparison, console, references_of, variants_of, write_result
from engines import Engine, Variant
from prompts import read_prompts
from rich.table import Table
from warm import HELD_OUT, HISTORY, TINY_MOE, model_vectors

from vllm_moe_offload.bench.comparison import Workload
from vllm_moe_offload.bench.summary import hit_rate, stall
from vllm_moe_offload.cache import create_policy
from vllm_moe_offload.learning.supervisor import LearningSupervisor
from vllm_moe_offload.predict.base import ModelShape, Predictor, TokenMap
from vllm_moe_offload.predict.registry import predictor_for_engine
from vllm_moe_offload.replay.bounds import perfect_forecast
from vllm_moe_offload.replay.forecast import Forecast, forecast
from vllm_moe_offload.replay.hardware import HardwareProfile, hardware_profile
from vllm_moe_offload.replay.schedule import steps
from vllm_moe_offload.replay.timeline import Timeline, TimelineReport
from vllm_moe_offload.trace.archive import HistoryArchive
from vllm_moe_offload.trace.persistence import LocalHistory
from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import read_trace

POLICY = "lfu"
OFF, ON = "none", "history"
ARMS = [Arm(name, {"predictor": name, "policy": POLICY}) for name in (OFF, ON)]
DISTANCES = (1, 2, 3)
LAYER_BYTES = 8 << 20
"""What a layer's computing pushes out of the processor's caches between two questions to a predictor."""


class Simulated(NamedTuple):
    """The same figures as `measured` has."""

    tpot: float
    stall: float
    hit_rate: float
    useful: int
    late: int
    wasted: int


def record(arguments: dict[str, Any], workload: Workload, batch: int) -> Trace:
    """The trace of the warm-up and all rounds, in the order in which `Comparison` gives them to an engine."""
    with tempfile.TemporaryDirectory(prefix="agreement-") as folder:
        path = Path(folder) / "engine.trace"
        offload = {"cache": "100%", "predictor": "none", "trace": str(path)}
        engine = Engine.start(Variant("recording", offload, arguments))
        try:
            for number in range(-1, workload.rounds):
                engine.run(workload.prompts(batch, number), workload.tokens)
        finally:
            engine.stop()
        return read_trace(path)


def trained_predictor(warm: Path, model: Path, trace: Trace) -> Predictor:
    """What an engine predicts with after it has started with the warm history."""
    shape, vectors = ModelShape(*trace.shape), model_vectors(model)
    with tempfile.TemporaryDirectory(prefix="agreement-") as folder:
        archive = HistoryArchive(Path(shutil.copytree(warm / HISTORY, Path(folder) / HISTORY)))
        kept = LocalHistory(archive, trace.fingerprint, shape, writes=False)
        if not kept.history.num_tokens:
            raise ValueError(f"--warm {warm} has no history of this model")
        predictor = predictor_for_engine(ON, shape, kept.history, vectors)
        LearningSupervisor(predictor, kept, vectors, None).close()
    return predictor


def predictor_seconds(predictor: Predictor, trace: Trace, tokens: int = 200) -> float:
    """Seconds to tell a predictor of one layer and to ask about the next, caches as cold as after a layer."""
    request = trace.request(0)
    state, others = predictor.start_request(), np.ones(LAYER_BYTES // 4, np.float32)
    spent, asked = 0.0, 0
    for row in range(min(tokens, request.num_tokens)):
        token = int(request.tokens[row]) if request.tokens is not None else -1
        step = predictor.begin([state.context(token)])
        for layer in range(request.num_layers - 1):
            others.sum()
            experts = request.experts[row : row + 1, layer].astype(np.int64)
            weights = request.weights[row : row + 1, layer].astype(np.float32)
            began = time.perf_counter()
            step.observe(layer, experts, weights)
            step.predict(layer + 1)
            spent, asked = spent + time.perf_counter() - began, asked + 1
        state.advance(token, TokenMap(request.experts[row], request.weights[row]))
    return spent / asked


def simulate(trace: Trace, slots: int, prediction: Forecast | None, hardware: HardwareProfile, batch: int) -> Simulated:
    """From the cold start on, the warm-up's requests left out: what the whole takes less what they alone take."""
    assert hardware.model is not None, "a profile of profile_machine.py has its model"

    def run(part: Trace, forecast_of_part: Forecast | None) -> TimelineReport:
        layer_of = np.repeat(np.arange(trace.num_layers), trace.num_experts)
        policy = create_policy(POLICY, layer_of)
        assert hardware.model is not None
        timeline = Timeline(part, slots, policy, forecast_of_part, hardware, hardware.model)
        return timeline.run(steps(part, batch))

    warm_up = np.arange(batch)
    whole = run(trace, prediction)
    before = run(trace.select(warm_up), None if prediction is None else prediction.select(trace, warm_up))
    count = whole.decoding.steps - before.decoding.steps
    waited = whole.decoding.waited - before.decoding.waited
    tally = whole.tally
    return Simulated(
        (whole.decoding.seconds - before.decoding.seconds) / count,
        (whole.decoding.stalled - before.decoding.stalled) / count,
        1 - waited / (whole.decoding.uses - before.decoding.uses),
        tally.useful,
        tally.late,
        tally.wasted,
    )


def measured(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means, because a simulation gives means."""
    return {
        "tpot": fmean(fmean(run["tpot"]) for run in runs),
        "stall": fmean(stall(run) for run in runs),
        "hit_rate": hit_rate(runs),
        **{key: sum(run["counters"][f"prefetch_{key}"] for run in runs) for key in ("useful", "late", "wasted")},
    }


def compare(options: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """By engine: what was measured, what was simulated, and that with perfect prediction. Raises EngineError."""
    arguments = {
        "model": str(options.model),
        "enforce_eager": options.eager,
        "enable_prefix_caching": False,
        "max_num_seqs": options.batch,
    }
    texts = [prompt.text for prompt in read_prompts(options.prompts or [options.warm / HELD_OUT])]
    workload = Workload(texts, [options.batch], options.tokens, options.rounds)
    trace = record(arguments, workload, options.batch)
    comparison = Comparison(
        "eager" if options.eager else "compiled",
        variants_of(ARMS, options.budgets, arguments, options.warm / HISTORY),
        references_of(ARMS, options.budgets, OFF),
        workload,
    )
    comparison.measure()
    comparison.show()
    predictor = trained_predictor(options.warm, options.model, trace)
    seconds = predictor_seconds(predictor, trace)
    hardware = replace(hardware_profile(str(options.hardware)), predictor_seconds=seconds)
    console.print(f"asking the predictor about one layer: {1e6 * seconds:.0f} microseconds")
    prediction, perfect = forecast(predictor, trace, DISTANCES), perfect_forecast(trace, DISTANCES)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    rounds = comparison.rounds[options.batch]
    for variant in comparison.variants:
        runs = [results_of[variant.name] for results_of in rounds if variant.name in results_of]
        if not runs:
            continue
        slots = int(runs[0]["totals"]["slots"])
        seen = prediction if variant.name.endswith(ON) else None
        results[variant.name] = {
            "measured": measured(runs),
            "simulated": simulate(trace, slots, seen, hardware, options.batch)._asdict(),
            "perfect": simulate(trace, slots, perfect, hardware, options.batch)._asdict(),
        }
    return results


def show(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print measured and simulated figures, and the ratio of each time per token to the measured one."""
    table = Table("engine", "", "TPOT ms", "ratio", "of it stalled, ms", "hits", "useful / late / wasted")
    for name, pair in results.items():
        for kind, entry in pair.items():
            ratio = entry["tpot"] / pair["measured"]["tpot"]
            table.add_row(
                name if kind == "measured" else "",
                kind,
                f"{1e3 * entry['tpot']:.2f}",
                "" if kind == "measured" else f"{ratio:.3f}",
                f"{1e3 * entry['stall']:.2f}",
                f"{entry['hit_rate']:.1%}",
                f"{entry['useful']} / {entry['late']} / {entry['wasted']}",
            )
    console.print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, default=TINY_MOE, help="see widen.py for bigger ones")
    parser.add_argument("--warm", type=Path, required=True, help="made by warm.py for this model")
    parser.add_argument("--hardware", type=Path, required=True, help="made by profile_machine.py with this model")
    parser.add_argument("--prompts", type=Path, nargs="+", help="default: those held out from --warm")
    parser.add_argument("--budgets", type=lambda text: text.split(","), default=["25%", "50%"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    results = compare(options)
    show(results)
    if options.json:
        write_result(options.json, results=results)


if __name__ == "__main__":
    sys.exit(main())
