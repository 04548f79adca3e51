"""`vllm-moe-offload replay …`: what the engine's policies would have done with a recorded trace."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_moe_offload.cache import POLICY_NAMES
from vllm_moe_offload.history.trace import Trace
from vllm_moe_offload.history.trace_file import read_trace
from vllm_moe_offload.predict.fitting import PREDICTOR_NAMES
from vllm_moe_offload.replay.hardware import PROFILE_NAMES, hardware_profile, model_profile
from vllm_moe_offload.replay.report import Setup, parse_slots
from vllm_moe_offload.replay.report import replay as run_replay
from vllm_moe_offload.replay.sweep import Point, sweep


def replay(
    trace: Annotated[Path, typer.Argument(help="Trace file (.npz) to replay.")],
    history: Annotated[Path | None, typer.Option(help="Trace of earlier requests to predict from.")] = None,
    slots: Annotated[str, typer.Option(help="Slots, as a number or a share of all experts.")] = "25%",
    predictor: Annotated[str, typer.Option(help=", ".join(PREDICTOR_NAMES))] = "history",
    policy: Annotated[str, typer.Option(help=", ".join(POLICY_NAMES))] = "lfu",
    batch: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 1,
    threshold: Annotated[float, typer.Option(help="Prefetch what is given a greater probability.")] = 0.5,
    hardware: Annotated[
        str | None, typer.Option(help=f"Also simulate time on {', '.join(PROFILE_NAMES)} or a JSON file's machine.")
    ] = None,
    record_bytes: Annotated[int | None, typer.Option(help="Bytes of one expert, where the model is not known.")] = None,
    keep_repetitive: Annotated[bool, typer.Option(help="Replay requests flagged repetitive too.")] = False,
    sweep_all: Annotated[bool, typer.Option("--sweep", help="All policies, predictors and sizes.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the result into this file (.png, .svg).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Replay a trace through the engine's own cache, predictors and planner, with the bounds beside them."""
    recorded = _read(trace, keep_repetitive)
    earlier = None if history is None else _read(history, keep_repetitive)
    setup = Setup(
        slots=parse_slots(slots, recorded),
        policy=policy,
        predictor=predictor,
        batch=batch,
        threshold=threshold,
        hardware=None if hardware is None else hardware_profile(hardware),
        model=None if hardware is None else model_profile(recorded.model, record_bytes),
    )
    if sweep_all:
        _show_sweep(sweep(recorded, earlier, setup), recorded, plot, as_json)
    else:
        _show_report(run_replay(recorded, setup, earlier), plot, as_json)


def _read(path: Path, keep_repetitive: bool) -> Trace:
    trace = read_trace(path)
    return trace if keep_repetitive else trace.without_repetitive()


def _show_report(report: dict[str, Any], plot: Path | None, as_json: bool) -> None:
    if plot is not None:
        from vllm_moe_offload.replay.plot import plot_report

        plot_report(report, plot)
    if as_json:
        typer.echo(json.dumps(report))
        return
    console = Console()
    console.print(
        f"{report['trace']}: {report['requests']} requests, {report['tokens']} tokens, {report['slots']} slots"
    )
    table = Table("", "demand misses", "loads per use")
    for name in ("no_prefetch", "perfect_prediction"):
        table.add_row(
            name.replace("_", " "), *_percent(report[name]["demand_miss_rate"], report[name]["loads_per_use"])
        )
    for name in ("belady_miss_rate", "lru_per_layer_miss_rate"):
        table.add_row(name.removesuffix("_miss_rate").replace("_", " "), *_percent(report[name], report[name]))
    for point in report["frontier"]:
        label = f"{report['predictor']}, p > {point['threshold']:g}"
        table.add_row(label, *_percent(point["demand_miss_rate"], point["loads_per_use"]))
    console.print(table)
    for distance, by_count in report["recall"].items():
        figures = ", ".join(f"@{count} {value['mean']:.3f}" for count, value in by_count.items())
        console.print(
            f"recall at distance {distance}: {figures}; calibration error {report['calibration_error'][distance]:.4f}"
        )
    if "tpot_seconds" in report:
        for prefix, name in (("", report["predictor"]), ("no_prefetch_", "no prefetch")):
            stall, tpot = report[f"{prefix}stall_seconds_per_token"], report[f"{prefix}tpot_seconds"]
            console.print(
                f"{report['hardware']['name']}, {name}: {1e3 * tpot:.2f} ms per token, {1e3 * stall:.2f} ms stalled"
            )


def _show_sweep(points: list[Point], trace: Trace, plot: Path | None, as_json: bool) -> None:
    if plot is not None:
        from vllm_moe_offload.replay.plot import plot_sweep

        plot_sweep(points, plot, trace.model)
    if as_json:
        typer.echo(json.dumps({"points": [point._asdict() for point in points]}))
        return
    table = Table("slots", "policy", "predictor", "threshold", "demand misses", "loads per use")
    for point in sorted(points, key=lambda point: (point.slots, point.demand_miss_rate)):
        rates = _percent(point.demand_miss_rate, point.loads_per_use)
        table.add_row(str(point.slots), point.policy, point.predictor, f"{point.threshold:g}", *rates)
    Console().print(table)


def _percent(*shares: float) -> list[str]:
    return [f"{100 * share:.2f} %" for share in shares]
