"""`vllm-moe-offload bench MODEL`: what offloading costs and saves on this machine, beside vLLM without it."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..bench.arms import KV_CACHE_BYTES, PLAIN, Arm, arms, fit_together, left_out
from ..bench.comparison import Comparison, Workload
from ..bench.engine import Engine
from ..bench.machine import machine
from ..bench.plot import plot_comparison
from ..bench.prompts import PROMPTS
from ..bench.summary import plain_data, summarize
from ..bench.verdict import verdicts
from ..config import ENVIRONMENT_VARIABLE, CacheBudget
from ..errors import ConfigError
from ..pool.memory_limits import memory_limits
from ..replay.plot import require_plotting
from ..store.files import ROOT_SETTING
from .bench_output import table
from .gpu_check import Driver
from .installed import require_vllm
from .model_argument import checkpoint_folder, weight_bytes
from .options import JsonOption, StoreOption
from .progress import progress_bar

RUNNER = "vllm_moe_offload.integration.bench"
_OURS = ("--moe-offload-", "--plugin")
_VRAM_SHARE = 0.9


def bench(
    model: Annotated[str, typer.Argument(help="Folder of a checkpoint, or its name on the Hugging Face hub.")],
    engine_arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- [VLLM ENGINE ARGUMENTS]...",
            help="What every engine is given besides: `-- --enforce-eager --max-model-len 4096`.",
            show_default=False,
        ),
    ] = None,
    budgets: Annotated[str, typer.Option(help="Memory for experts to try: shares or sizes.")] = "25%,50%",
    batch: Annotated[str, typer.Option(help="Requests that run at a time: sizes to try.")] = "1",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate for each request.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often each engine takes its turn.")] = 3,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the result into this file (.png, .svg, .pdf).", show_default=False)
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare plain vLLM, vLLM's own offloading (on a GPU) and this plugin, with prediction and without.

    Engines take turns on the same prompts, and ratios pair the turns of a round. Where memory does not hold all of them
    at once, each turn starts a fresh engine, which takes longer. Histories start empty: prediction gains with use.
    Exits with 1 if an engine failed.
    """
    require_vllm("bench")
    _refuse_ours(engine_arguments or [])
    folder = checkpoint_folder(model)
    size = None if folder is None else weight_bytes(folder)
    shares, batches = _shares(budgets, size), _batches(batch)
    if plot is not None:
        require_plotting(plot)
    gpus = Driver.load()
    room = _room(gpus)
    every = arms(shares, gpus is not None, size)
    absent = left_out(every, size, room)
    chosen = [arm for arm in every if arm.name not in absent]
    if not chosen:
        raise ConfigError(f"--budgets {budgets}: no engine fits, plain vLLM neither: {absent[every[-1].name]}")
    together = gpus is None and fit_together(chosen, size, room)
    workload = Workload(PROMPTS, batches, tokens, rounds)
    command_line = ["--model", model, *(engine_arguments or [])]
    with _starting(chosen, command_line, max(batches), store) as start:
        comparison = _measure(chosen, start, workload, restart=not together)
    found = _found(comparison, every, absent | comparison.failures)
    if plot is not None and found["summaries"]:
        plot_comparison(found["summaries"], every, plot, f"{model}, {tokens} tokens, {rounds} rounds")
    _print(found, comparison, every, model, as_json)
    if comparison.failures:
        raise typer.Exit(1)


def _refuse_ours(arguments: list[str]) -> None:
    for argument in arguments:
        if argument.startswith(_OURS):
            raise ConfigError(f"{argument}: bench sets it for each of its engines; give --budgets instead")


def _shares(text: str, size: int | None) -> dict[str, float]:
    """Budgets, and about which share of the model each is."""
    shares = {}
    for budget in (part.strip() for part in text.split(",")):
        try:
            asked = CacheBudget.parse(budget)
        except ValueError as error:
            raise ConfigError(f"--budgets {text}: {error}") from None
        if asked.share is None and asked.size is None:
            raise ConfigError(f"--budgets {text}: {budget!r} cannot be compared; give shares or sizes, like 25%,4GiB")
        shares[budget] = asked.share or (1.0 if size is None else min(1.0, (asked.size or 0) / size))
    return shares


def _batches(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"--batch {text}: give numbers of requests from 1 on, like 1,8")
    return [int(part) for part in parts]


def _room(gpus: Driver | None) -> int:
    """Bytes of fast memory that engines may take."""
    if gpus is None:
        return min(memory_limits().values())
    return int(_VRAM_SHARE * sum(gpus.gpu(number).memory for number in range(gpus.count())))


@contextmanager
def _starting(chosen: list[Arm], command_line: list[str], seats: int, store: Path | None) -> Iterator[Any]:
    """A function that starts an arm's engine by name. Histories are kept until the end."""
    usual = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    environment = usual | os.environ | ({} if store is None else {ROOT_SETTING: str(store)})
    environment.pop(ENVIRONMENT_VARIABLE, None)
    common = {"max_num_seqs": seats, "enable_prefix_caching": False}
    if not any(argument.startswith("--kv-cache-memory-bytes") for argument in command_line):
        common["kv_cache_memory_bytes"] = KV_CACHE_BYTES
    if not any(argument.startswith("--max-model-len") for argument in command_line):
        common["max_model_len"] = -1  # the longest that the KV cache holds
    by_name = {arm.name: arm for arm in chosen}
    with tempfile.TemporaryDirectory(prefix="bench-") as histories:

        def start(name: str) -> Engine:
            arguments: dict[str, Any] = common | dict(by_name[name].arguments)
            settings = arguments["additional_config"]["moe_offload"]
            if settings:
                settings = settings | {"history": tempfile.mkdtemp(dir=histories)}
                arguments["additional_config"] = {"moe_offload": settings}
            job = json.dumps({"command_line": command_line, "arguments": arguments})
            return Engine(name, [sys.executable, "-P", "-m", RUNNER, job], environment).load()

        yield start


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Have SIGTERM end engines as Ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _measure(chosen: list[Arm], start: Any, workload: Workload, restart: bool) -> Comparison:
    with _ending_on_sigterm(), progress_bar("starting", None) as bar:

        def report(what: str) -> None:
            bar.describe(what)
            bar.advance()

        comparison = Comparison([arm.name for arm in chosen], start, workload, restart, report)
        bar.expect(comparison.steps)
        comparison.measure()
    return comparison


def _found(comparison: Comparison, every: list[Arm], absent: dict[str, str]) -> dict[str, Any]:
    """Summaries by batch size, sentences, and what is missing."""
    rounds = comparison.rounds
    ran = {name for results in rounds.values() for turn in results for name in turn}
    reference = next((arm.name for arm in every if arm.name in ran and not arm.offloads), "")
    if not reference:
        reference = next((arm.name for arm in sorted(every, key=lambda arm: -arm.share) if arm.name in ran), PLAIN)
    return {
        "reference": reference,
        "summaries": {
            batch: summarize(turns, dict.fromkeys(ran, reference)) for batch, turns in rounds.items() if any(turns)
        },
        "verdicts": [
            sentence for batch, turns in rounds.items() for sentence in verdicts(batch, turns, every, reference)
        ],
        "absent": absent,
        "idle_cpu_share": comparison.idle_cpu_share,
    }


def _print(found: dict[str, Any], comparison: Comparison, every: list[Arm], model: str, as_json: bool) -> None:
    workload = comparison.workload
    if as_json:
        asked = {"model": model, "tokens": workload.tokens, "rounds": workload.rounds, "machine": machine()}
        measured = {"loaded": comparison.loaded, "turns": comparison.rounds}
        typer.echo(json.dumps(plain_data(asked | found | measured)))
        return
    console = Console()
    peaks = {name: loaded["peak_bytes"] for name, loaded in comparison.loaded.items()}
    for batch, summary in found["summaries"].items():
        title = (
            f"{model}, batch {batch}, {workload.tokens} tokens, {workload.rounds} rounds; 1 x is {found['reference']}"
        )
        console.print(table(title, summary, every, peaks, found["absent"]))
    for sentence in found["verdicts"]:
        typer.echo(sentence)
    for name, reason in found["absent"].items():
        typer.echo(f"{name}: {reason}", err=True)
    if found["idle_cpu_share"] > 0.02:
        share = f"{found['idle_cpu_share']:.1%}"
        typer.echo(f"engines that waited took up to {share} of a core: the figures are that uncertain", err=True)
