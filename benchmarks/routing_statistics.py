"""Make the statistics of routing that come with the package, and show how far plans made with them are off.

For each trace, the share of uses that miss is replayed as recorded, and as drawn with its own statistics and with those
of each other trace. The trace of the bundled model is recorded here unless `--tiny-moe` names one.

    python benchmarks/routing_statistics.py examples/traces/gpt-oss-20b-small.npz \\
        --out vllm_moe_offload/plan/statistics.json
"""

import argparse
import random
import tempfile
from pathlib import Path

import msgspec
from engines import Engine, Variant
from prompts import EXAMPLES, read_prompts
from rich.console import Console
from rich.table import Table
from warm import TINY_MOE

from vllm_moe_offload.plan.routing import correlations, drawn
from vllm_moe_offload.plan.statistics import RoutingStatistics
from vllm_moe_offload.replay.report import Setup, parse_slots, run_once
from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import read_trace

SHARES = ("12.5%", "25%", "50%", "75%")
MODEL_TYPES = {"openai/gpt-oss-20b": "gpt_oss", "tiny-moe": "qwen3_moe"}
SEATS = 8


def record(path: Path, tokens: int) -> Trace:
    """What the bundled model routes the example prompts to."""
    texts = [prompt.text for prompt in read_prompts([EXAMPLES])]
    random.Random(0).shuffle(texts)
    arguments = {
        "model": str(TINY_MOE),
        "enforce_eager": True,
        "max_num_seqs": SEATS,
        "enable_prefix_caching": False,
    }
    engine = Engine.start(Variant("recording", {"cache": "100%", "predictor": "none", "trace": str(path)}, arguments))
    try:
        for first in range(0, len(texts), SEATS):
            engine.run([[text] for text in texts[first : first + SEATS]], tokens)
    finally:
        engine.stop()
    return read_trace(path)


def statistics_of(name: str, trace: Trace) -> RoutingStatistics:
    rounded = correlations(trace).round(3).tolist()
    return RoutingStatistics(name, MODEL_TYPES[name], trace.shape, trace.num_requests, trace.num_tokens, rounded)


def misses(trace: Trace) -> list[float]:
    """Share of uses that miss, at each of ``SHARES``, one request at a time."""
    return [run_once(trace, Setup(parse_slots(share, trace)), None, 1.0).demand_miss_rate for share in SHARES]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("traces", type=Path, nargs="+", help="of models named in MODEL_TYPES")
    parser.add_argument("--tiny-moe", type=Path, help="a trace of the bundled model (default: recorded now)")
    parser.add_argument("--tokens", type=int, default=64, help="per request, of what is recorded")
    parser.add_argument("--out", type=Path, help="write the statistics here")
    options = parser.parse_args()
    traces = {trace.model: trace for trace in (read_trace(path).without_repetitive() for path in options.traces)}
    with tempfile.TemporaryDirectory() as folder:
        own = options.tiny_moe
        traces["tiny-moe"] = read_trace(own) if own else record(Path(folder) / "tiny.trace", options.tokens)
    found = [statistics_of(name, trace) for name, trace in traces.items()]
    table = Table("routing of", "as", *SHARES, title="share of uses that miss")
    for name, trace in traces.items():
        table.add_row(name, "recorded", *(f"{rate:.1%}" for rate in misses(trace)))
        for statistics in found:
            requests = trace.num_requests
            other = drawn(correlations(traces[statistics.model]), trace.shape, requests, trace.num_tokens // requests)
            table.add_row("", f"drawn: {statistics.model}", *(f"{rate:.1%}" for rate in misses(other)))
    Console().print(table)
    if options.out:
        options.out.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=0) + b"\n")


if __name__ == "__main__":
    main()
