"""`vllm-moe-offload replay …`: what the engine's policies would have done with a recorded trace."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_moe_offload.cache import POLICY_NAMES
from vllm_moe_offload.cli.replay_output import print_report, print_sweep
from vllm_moe_offload.errors import ConfigError, TraceError
from vllm_moe_offload.predict.registry import REPLAY_PREDICTORS
from vllm_moe_offload.replay.hardware import PROFILE_NAMES, hardware_profile, model_profile
from vllm_moe_offload.replay.parallel import Progress
from vllm_moe_offload.replay.plot import plot_report, plot_sweep, require_plotting
from vllm_moe_offload.replay.report import Setup, parse_slots
from vllm_moe_offload.replay.report import replay as run_replay
from vllm_moe_offload.replay.sweep import SWEEP_SLOTS, SWEEP_TOKENS, Point, sweep
from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import read_trace

from .options import JsonOption
from .progress import Bar, progress_bar

_SAMPLE_TOKENS = Setup(slots=1).frontier_tokens
_OR_A_CLASS = ", or a class as package.module:Class."


TokensOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Size of the sample of whole requests that the frontier and the timeline ({_SAMPLE_TOKENS} when not "
        f"given) and the sweep ({SWEEP_TOKENS}) are replayed on.",
        show_default=False,
    ),
]
SweepOption = Annotated[
    bool,
    typer.Option(
        "--sweep",
        help="All policies, predictors and sizes, or those named, with the bounds: a table and a plot.",
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        help="Draw the result into this file (.png, .svg, .pdf). --sweep draws TRACE-sweep.png here if "
        "this is not given.",
        show_default=False,
    ),
]


def replay(
    trace: Annotated[Path, typer.Argument(help="Trace file (.npz) to replay.")],
    history: Annotated[Path | None, typer.Option(help="Trace of earlier requests to predict from.")] = None,
    slots: Annotated[
        str | None,
        typer.Option(help="Slots, as a number or a share of all experts.", show_default="25%"),
    ] = None,
    predictor: Annotated[
        str | None, typer.Option(help=f"Predictor: {', '.join(REPLAY_PREDICTORS)}{_OR_A_CLASS}", show_default="history")
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help=f"Eviction policy: {', '.join(POLICY_NAMES)}{_OR_A_CLASS}", show_default="lfu")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 1,
    threshold: Annotated[
        float, typer.Option(help="Prefetch experts to which the predictor gives a greater probability.")
    ] = 0.5,
    hardware: Annotated[
        str | None, typer.Option(help=f"Also simulate time on {', '.join(PROFILE_NAMES)} or a JSON file's machine.")
    ] = None,
    record_bytes: Annotated[
        int | None, typer.Option(min=1, help="Bytes of one expert, where the model is not known.")
    ] = None,
    tokens: TokensOption = None,
    keep_repetitive: Annotated[bool, typer.Option(help="Replay requests flagged repetitive too.")] = False,
    sweep_all: SweepOption = False,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replay a trace through the engine's own cache, predictors and planner, with the bounds beside them."""
    recorded = _read(trace, keep_repetitive)
    earlier = None if history is None else _read(history, keep_repetitive)
    setup = Setup(
        slots=parse_slots(slots or "25%", recorded),
        policy=policy or "lfu",
        predictor=predictor or "history",
        batch=batch,
        threshold=threshold,
        frontier_tokens=tokens or (SWEEP_TOKENS if sweep_all else _SAMPLE_TOKENS),
        hardware=None if hardware is None else hardware_profile(hardware),
        model=None if hardware is None else model_profile(recorded.model, record_bytes),
    )
    if plot is not None:
        require_plotting(plot)
    if sweep_all:
        policies = POLICY_NAMES if policy is None else (policy,)
        predictors = REPLAY_PREDICTORS if predictor is None else (predictor,)
        sizes = SWEEP_SLOTS if slots is None else (slots,)
        with progress_bar("replaying", None, forking=True) as bar:
            cells = sweep(recorded, earlier, setup, policies, predictors, sizes, progress=_shown_by(bar))
            points = list(_counted(cells, bar))
        _sweep(trace.stem, recorded, points, plot, as_json)
    else:
        with progress_bar("replaying", None, forking=True) as bar:
            report = run_replay(recorded, setup, earlier, _shown_by(bar))
        _report(report, plot, as_json)


def _read(path: Path, keep_repetitive: bool) -> Trace:
    trace = read_trace(path)
    kept = trace if keep_repetitive else trace.without_repetitive()
    if not kept.num_tokens:
        way_out = "; --keep-repetitive replays them" if trace.num_tokens else ""
        reason = "all of its requests are flagged repetitive" if trace.num_tokens else "it holds no tokens"
        raise TraceError(f"{path}: {reason}{way_out}")
    return kept


def _report(report: dict[str, Any], plot: Path | None, as_json: bool) -> None:
    if plot is not None:
        plot_report(report, plot)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        print_report(report)


def _shown_by(bar: Bar) -> Progress:
    def progress(done: int, total: int) -> None:
        bar.expect(total)
        bar.at(done)

    return progress


def _counted(cells: Iterator[list[Point]], bar: Bar) -> Iterator[Point]:
    count = 0
    for done in cells:
        count += len(done)
        bar.describe(f"replaying, {count} cells are done")
        yield from done


def _sweep(name: str, trace: Trace, points: list[Point], plot: Path | None, as_json: bool) -> None:
    drawn = _draw_sweep(name, trace, points, plot, silent=as_json)
    if as_json:
        typer.echo(json.dumps({"points": [point._asdict() for point in points]}))
        return
    print_sweep(points, trace)
    if drawn:
        typer.echo(drawn)


def _draw_sweep(name: str, trace: Trace, points: list[Point], plot: Path | None, silent: bool) -> str:
    """Draw, and say what was drawn: where nobody named a file, one beside the user, if drawing is possible."""
    if plot is None and silent:
        return ""
    path = plot or Path(f"{name}-sweep.png")
    try:
        require_plotting(path)
    except ConfigError as error:
        return f"nothing drawn: {error}"
    plot_sweep(points, path, trace.model or name)
    return f"drawn into {path}"
