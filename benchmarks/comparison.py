"""Comparisons of the plugin's configurations, budgets and checkouts, with each other and with plain vLLM."""

import json
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engines import Engine, EngineError, Variant
from memory import drop_caches
from report import table
from rich.console import Console

from vllm_moe_offload.bench import comparison
from vllm_moe_offload.bench.comparison import Workload
from vllm_moe_offload.bench.machine import machine
from vllm_moe_offload.bench.summary import plain_data, summarize

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


class Conditions(NamedTuple):
    """Under which engines run."""

    memory_limit: int | None = None
    preload: str | None = None
    drop_caches: bool = False
    restart: bool = False


class Comparison(comparison.Comparison):
    """The engines of variants and what they did, round by round, under conditions."""

    def __init__(
        self,
        mode: str,
        variants: Sequence[Variant],
        references: dict[str, str],
        workload: Workload,
        conditions: Conditions = Conditions(),  # noqa: B008 - immutable
    ) -> None:
        self.mode, self.references, self.conditions = mode, references, conditions
        self.variants = variants
        super().__init__([variant.name for variant in variants], self._engine, workload, conditions.restart)

    def _engine(self, name: str) -> Engine:
        variant = next(variant for variant in self.variants if variant.name == name)
        if self.conditions.drop_caches:
            drop_caches()
        console.print(f"starting {name}, {self.mode} …")
        return Engine.start(variant, self.conditions.memory_limit, self.conditions.preload)

    def _failed(self, name: str, error: EngineError) -> None:
        console.print(f"[red]{error}", markup=True, highlight=False)
        super()._failed(name, error)

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
