"""How long loading takes: plain vLLM, the plugin with the store present, and the plugin building it.

Fresh engines in turns (plain, build, present, plain, ...): every build goes to a new folder, which `present` then
reuses. `model` is the time the slowest worker takes to load the model, `start` all until requests are taken.

    python benchmarks/startup.py --model /tmp/wide --drop-caches
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from engines import Engine, Variant
from memory import drop_caches
from rich.console import Console
from rich.table import Table

from vllm_moe_offload.bench.engine import EngineError
from vllm_moe_offload.bench.summary import Spread
from vllm_moe_offload.sizes import parse_size

TINY_MOE = Path(__file__).parent.parent / "examples" / "models" / "tiny-moe"
PLAIN, BUILD, PRESENT = "plain", "building the store", "store present"


def variants(model: Path, budget: str, stores: Path) -> list[Variant]:
    """The arms in the order they must run; the last two share a folder."""
    arguments: dict[str, Any] = {"model": str(model), "enforce_eager": True}
    offload = {"cache": budget, "store": str(stores)}
    return [
        Variant(PLAIN, None, arguments),
        Variant(BUILD, offload, arguments),
        Variant(PRESENT, offload, arguments),
    ]


def measure(options: argparse.Namespace, failures: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """What each start took, round by round; a failed arm is left out from then on and named in `failures`."""
    loaded: dict[str, list[dict[str, Any]]] = {PLAIN: [], BUILD: [], PRESENT: []}
    for _ in range(options.rounds):
        stores = Path(tempfile.mkdtemp(prefix="stores-", dir=options.stores))
        try:
            for variant in variants(options.model, options.budget, stores):
                if variant.name in failures:
                    continue
                if options.drop_caches:
                    drop_caches()
                try:
                    engine = Engine.start(variant, options.memory_limit)
                    loaded[variant.name].append(engine.loaded)
                    engine.stop()
                except EngineError as error:
                    failures[variant.name] = str(error)
        finally:
            shutil.rmtree(stores)
    return loaded


def main() -> int:
    """The command line. Ends with 1 if an engine failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, default=TINY_MOE, help="see widen.py for bigger ones")
    parser.add_argument("--budget", default="25%", help="cache of the plugin")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stores", type=Path, help="where to build stores: the disk to measure")
    parser.add_argument("--drop-caches", action="store_true", help="drop the page cache before each start (root)")
    parser.add_argument("--memory-limit", type=parse_size, metavar="SIZE", help="each engine in a memory cgroup (root)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    failures: dict[str, str] = {}
    loaded = measure(options, failures)
    table = Table("engine", "model s", "x plain", "start s", "x plain", "peak GiB", title=str(options.model))
    for name, runs in loaded.items():
        if name in failures:
            table.add_row(name, f"FAILED: {failures[name]}", "-", "-", "-", "-")
        if not runs:
            continue
        peak = max(run["peak_bytes"] for run in runs) / 2**30
        model, start = (_show(key, runs, loaded[PLAIN]) for key in ("model_seconds", "load_seconds"))
        table.add_row(name, *model, *start, f"{peak:.2f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if options.json:
        options.json.write_text(json.dumps({"command": sys.argv, "loaded": loaded, "failures": failures}, indent=1))
    return int(bool(failures))


def _show(key: str, runs: list[dict[str, Any]], plain: list[dict[str, Any]]) -> tuple[str, str]:
    """Seconds, and their ratio to plain vLLM's in the same round."""
    ratios = [ours[key] / base[key] for ours, base in zip(runs, plain, strict=False)]
    return Spread.of([run[key] for run in runs]).show(digits=1), Spread.of(ratios).show() if ratios else "-"


if __name__ == "__main__":
    sys.exit(main())
