"""`vllm-moe-offload selftest`: does offloading give plain vLLM's tokens here, and what can this machine reach."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..errors import ConfigError, UnsupportedError
from .check import PROBLEM, WARNING, Check
from .doctor import findings_table
from .gpu_check import Driver
from .installed import require_vllm
from .options import JsonOption
from .progress import progress_bar
from .selftest_engines import Arm, ChildError, Outcome, arms, child, judge, run
from .selftest_rates import judge_rates

_BUNDLED = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"


def selftest(
    gpu: Annotated[bool, typer.Option("--gpu", help="Test the GPU: its rates, and every mode.")] = False,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a small MoE model, where the repository's own is not at hand.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Start small engines with and without offloading, and compare what they answer.

    Exits with 1 if something does not work. Takes one minute, with --gpu five.
    """
    require_vllm("selftest")
    folder = model or _BUNDLED
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model: {folder} holds no model; the repository has one in examples/models/tiny-moe")
    if gpu and Driver.load() is None:
        raise UnsupportedError(
            "`selftest --gpu` needs an NVIDIA GPU, and the driver (libcuda.so.1) is missing or finds none: see "
            "nvidia-smi; without --gpu the CPU is tested"
        )
    rates, checks = _rates() if gpu else ({}, [])
    outcomes: dict[str, Outcome] = {}
    engines = arms(gpu)
    with progress_bar("starting engines", len(engines)) as bar:
        for arm, outcome, check in _engines(engines, folder):
            outcomes[arm.name] = outcome
            checks.append(check)
            bar.describe(f"{check.subject}: {check.state}")
            bar.advance()
    if as_json:
        answers = {name: outcome._asdict() for name, outcome in outcomes.items()}
        found = {"verdict": verdict(checks), "checks": [check._asdict() for check in checks]}
        typer.echo(json.dumps(found | {"rates": rates, "engines": answers}))
    else:
        Console().print(findings_table(checks))
        typer.echo(verdict(checks))
    if any(check.state == PROBLEM for check in checks):
        raise typer.Exit(1)


def verdict(checks: list[Check]) -> str:
    """All findings in a sentence."""
    broken = [check.subject for check in checks if check.state == PROBLEM]
    if broken:
        return f"Offloading does not work here as it should ({'; '.join(broken)}): please report this with --json."
    slower = [check.subject for check in checks if check.state == WARNING]
    right = "Offloading works here: every engine gave the tokens of plain vLLM"
    return f"{right}; slower than it could be: {', '.join(slower)}." if slower else f"{right}."


def _rates() -> tuple[dict[str, Any], list[Check]]:
    try:
        rates = child({}, {"VLLM_PLUGINS": ""})
    except ChildError as error:
        return {}, [Check("rates", PROBLEM, f"cannot be measured: {error}")]
    return rates, list(judge_rates(rates))


def _engines(engines: list[Arm], model: Path) -> Iterator[tuple[Arm, Outcome, Check]]:
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="selftest-") as stores:
        for arm in engines:
            outcome = outcomes[arm.name] = run(arm, model, Path(stores))
            yield arm, outcome, judge(arm, outcome, outcomes.get(arm.reference))
