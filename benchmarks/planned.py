"""Whether `plan` is right about this machine: time per token as planned and as measured, in one run.

For each model the machine is measured and a plan made; then engines with each budget take turns on the example prompts,
one request at a time, nothing being predicted. A second plan replays the trace of these very prompts, recorded before.

    python benchmarks/planned.py --models examples/models/tiny-moe /tmp/wide1024 --budgets 25%,50%,100%
"""

import argparse
import random
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from comparison import Arm, Comparison, console, references_of, variants_of, write_result
from engines import Engine, Variant
from prompts import EXAMPLES, read_prompts
from rich.table import Table
from warm import TINY_MOE

from vllm_moe_offload.bench.comparison import Workload
from vllm_moe_offload.bench.summary import Spread, hit_rate, tpot
from vllm_moe_offload.plan.planning import Plan, Question, make_plan
from vllm_moe_offload.store.root import default_root

ARM = Arm("", {"predictor": "none"})
CONTEXT = 256
"""Tokens of the longest request that is served here."""


class Row(NamedTuple):
    """One budget. Seconds per token."""

    budget: str
    measured: Spread
    hits: float | None
    planned: float
    planned_hits: float
    traced: float
    traced_hits: float


def record(arguments: dict[str, Any], workload: Workload, trace: Path) -> None:
    """Serve what the engines are going to serve, in the same order."""
    offload = {"cache": "100%", "predictor": "none", "trace": str(trace)}
    engine = Engine.start(Variant("recording", offload, arguments))
    try:
        for number in range(-1, workload.rounds):
            engine.run(workload.prompts(1, number), workload.tokens)
    finally:
        engine.stop()


def planned(model: Path, shares: tuple[float, ...], eager: bool, trace: Path | None) -> Plan:
    """What `vllm-moe-offload plan` answers."""
    question = Question(
        str(model),
        concurrency=1,
        context=CONTEXT,
        trace=trace,
        store=default_root(),
        shares=shares,
        enforce_eager=eager,
    )
    return make_plan(question)


def compare(model: Path, workload: Workload, budgets: list[str], eager: bool) -> tuple[list[Row], dict[str, Any]]:
    """Planned and measured side by side, and the machine as it was measured. Raises EngineError."""
    arguments = {"model": str(model), "enforce_eager": eager, "enable_prefix_caching": False, "max_num_seqs": 1}
    shares = tuple(float(budget.removesuffix("%")) / 100 for budget in budgets)
    comparison = Comparison(
        "eager" if eager else "compiled",
        variants_of([ARM], budgets, arguments, None),
        references_of([ARM], budgets, "plain"),
        workload,
    )
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "served.trace"
        record(arguments, workload, trace)
        comparison.measure()
        plans = [planned(model, shares, eager, path) for path in (None, trace)]
    rows = []
    for budget, share in zip(budgets, shares, strict=True):
        runs = [results[budget] for results in comparison.rounds[1] if budget in results]
        if runs:
            points = [min(plan.points, key=lambda point: abs(point.share - share)) for plan in plans]
            times = [value for point in points for value in (point.tpot_seconds, point.hit_rate)]
            rows.append(Row(budget, Spread.of([tpot(run) for run in runs]), hit_rate(runs), *times))
    return rows, asdict(plans[0].hardware)


def show(title: str, rows: list[Row]) -> None:
    """Ratios are of what was planned to the median that was measured."""
    table = Table("cache", "measured, ms", "planned, ms", "ratio", "from the trace, ms", "ratio", "hits", title=title)
    for row in rows:
        ratios = [f"{seconds / row.measured.median:.3f}" for seconds in (row.planned, row.traced)]
        rates = (row.hits if row.hits is not None else 1.0, row.planned_hits, row.traced_hits)
        table.add_row(
            row.budget,
            row.measured.show(1e3),
            f"{1e3 * row.planned:.2f}",
            ratios[0],
            f"{1e3 * row.traced:.2f}",
            ratios[1],
            " / ".join(f"{rate:.1%}" for rate in rates),
        )
    console.print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--models", type=Path, nargs="+", default=[TINY_MOE], help="see widen.py for bigger ones")
    parser.add_argument("--budgets", type=lambda text: text.split(","), default=["25%", "50%", "100%"])
    parser.add_argument("--tokens", type=int, default=48, help="tokens to generate per request")
    parser.add_argument("--rounds", type=int, default=8, help="requests that each engine serves, after one warm-up")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    options = parser.parse_args()
    texts = [prompt.text for prompt in read_prompts([EXAMPLES])]
    random.Random(0).shuffle(texts)
    workload = Workload(texts, [1], options.tokens, options.rounds)
    results = {str(model): compare(model, workload, options.budgets, options.eager) for model in options.models}
    for model, (rows, _) in results.items():
        mode = "eager" if options.eager else "compiled"
        show(f"{model}, {mode}, one request at a time, {options.rounds} of {options.tokens} tokens", rows)
    if options.json:
        as_data = {model: {"rows": rows, "machine": machine} for model, (rows, machine) in results.items()}
        write_result(options.json, results=as_data)


if __name__ == "__main__":
    sys.exit(main())
