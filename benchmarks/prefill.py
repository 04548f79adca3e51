"""Prefill at part of the experts against what bounds it: computing, or reading every layer's experts once per step.

The bound of a prompt is the longer of plain vLLM's time to first token and the time the disk takes for the experts of
all layers, once per step of chunked prefill. The disk's speed is what an engine's own pools reach, measured in the same
run; a cache that holds part of the experts need not read these again and may do better than the bound.

    python benchmarks/prefill.py --model /tmp/wide --budgets 25%,50% --prompt-tokens 256,1024,4000
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from comparison import PLAIN, Arm, checkout, console, variants_of, write_result
from engines import Engine, Variant
from prompts import EXAMPLES, read_prompts
from reads import DEPTH, SHARE, demand_rate
from rich.table import Table
from warm import TINY_MOE

from vllm_moe_offload.bench.engine import wait_until_quiet
from vllm_moe_offload.bench.summary import Spread
from vllm_moe_offload.plan.loads import Demands
from vllm_moe_offload.store.reader import Store

RECORDS = 64
"""Read to measure the disk, once per round."""


def measure(
    options: argparse.Namespace, stores: str
) -> tuple[dict[tuple[str, int], list[dict[str, Any]]], list[float]]:
    """What every engine did with every length, round by round, and the disk's bytes per second in each round."""
    arguments: dict[str, Any] = {
        "model": str(options.model),
        "enforce_eager": options.eager,
        "enable_prefix_caching": False,
        "max_num_seqs": 1,
        "max_num_batched_tokens": options.batched_tokens,
        "max_model_len": max(options.prompt_tokens) + 1,
        "hf_overrides": {"max_position_embeddings": max(options.prompt_tokens) + 1},
    }
    arms = [Arm("", {"predictor": "none", "store": stores})]
    arms += [arm.of(*other) for other in options.checkout for arm in arms]
    variants = [Variant(PLAIN, None, arguments), *variants_of(arms, options.budgets, arguments, None)]
    texts = [prompt.text for prompt in read_prompts([EXAMPLES])]
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    rates, engines = [], {}
    try:
        for variant in variants:
            engines[variant.name] = Engine.start(variant)
            for length in options.prompt_tokens:
                engines[variant.name].run([texts], 1, length)
        (manifest,) = Path(stores).glob("*/manifest.json")
        store = Store.open(manifest.parent)
        with Demands(store, SHARE) as demands:
            for number in range(options.rounds):
                rotated = texts[number % len(texts) :] + texts[: number % len(texts)]
                wait_until_quiet(list(engines.values()))
                rates.append(demand_rate(demands, RECORDS, DEPTH))
                for length in options.prompt_tokens:
                    for name, engine in engines.items():
                        wait_until_quiet([other for other in engines.values() if other is not engine])
                        runs.setdefault((name, length), []).append(engine.run([rotated], 1, length))
        store.close()
    finally:
        for engine in engines.values():
            engine.stop()
    return runs, rates


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--model", type=Path, default=TINY_MOE, help="see widen.py for bigger ones")
    add("--budgets", type=lambda text: text.split(","), default=["25%", "50%"])
    add("--prompt-tokens", type=lambda text: [int(n) for n in text.split(",")], default=[256, 1024, 4000])
    add("--batched-tokens", type=int, default=2048, help="max_num_batched_tokens: longer prompts take several steps")
    add("--checkout", type=checkout, action="append", default=[], metavar="NAME=FOLDER", help="as in decode.py")
    add("--rounds", type=int, default=5)
    add("--eager", action="store_true")
    add("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prefill-") as stores:
        runs, rates = measure(options, stores)
    expert_bytes = max(run["totals"].get("expert_bytes", 0) for many in runs.values() for run in many)
    rate = Spread.of(rates)
    table = Table("engine", "prompt", "time ms", "x plain", "bound ms", "bound / time", "MiB read", "stalled ms")
    for (name, length), many in runs.items():
        times = Spread.of([run["ttft"] for run in many])
        plain = runs[PLAIN, length]
        if name == PLAIN:
            table.add_row(name, str(length), times.show(1e3, 0))
            continue
        steps = -(-length // options.batched_tokens)
        bounds = [max(p["ttft"], steps * expert_bytes / r) for p, r in zip(plain, rates, strict=True)]
        table.add_row(
            name,
            str(length),
            times.show(1e3, 0),
            Spread.of([run["ttft"] / p["ttft"] for run, p in zip(many, plain, strict=True)]).show(),
            Spread.of(bounds).show(1e3, 0),
            Spread.of([bound / run["ttft"] for bound, run in zip(bounds, many, strict=True)]).show(),
            Spread.of([run["counters"]["loaded_bytes"] for run in many]).show(2**-20, 0),
            Spread.of([run["counters"]["stall_seconds"] for run in many]).show(1e3, 0),
        )
    console.print(f"the disk: {rate.show(2**-20, 0)} MiB/s; {expert_bytes / 2**20:.0f} MiB of experts")
    console.print(table)
    if options.json:
        write_result(
            options.json, rates=rates, runs={f"{name} {length}": many for (name, length), many in runs.items()}
        )


if __name__ == "__main__":
    main()
