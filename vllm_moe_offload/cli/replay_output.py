"""How `replay` prints what it found: tables for people, the bounds among the rows."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_moe_offload.replay.sweep import BELADY, LRU_PER_LAYER, PERFECT, Point, best_at_bytes
from vllm_moe_offload.trace.trace import Trace


def print_report(report: dict[str, Any]) -> None:
    """One replay: bounds, frontier, recall, and time where hardware was given."""
    console = Console()
    console.print(
        f"{report['trace']}: {report['requests']} requests, {report['tokens']} tokens, {report['slots']} slots, "
        f"eviction by {report['policy']}",
        soft_wrap=True,
    )
    table = Table("", "demand misses", "loads per use")
    table.add_row("belady, no prefetch", *_percent(report["belady_miss_rate"]))
    table.add_row("perfect prediction", *_rates(report["perfect_prediction"]))
    table.add_row("lru per layer", *_percent(report["lru_per_layer_miss_rate"]))
    table.add_row("no prefetch", *_rates(report["no_prefetch"]))
    for point in report["frontier"]:
        table.add_row(f"{report['predictor']}, p > {point['threshold']:g}", *_rates(point))
    console.print(table)
    for distance, by_count in report["recall"].items():
        figures = ", ".join(f"@{count} {value['mean']:.3f}" for count, value in by_count.items())
        when = "from the step's start" if distance == "0" else f"{distance} layers ahead"
        console.print(
            f"recall {when}: {figures}; calibration error {report['calibration_error'][distance]:.4f}", soft_wrap=True
        )
    if "resident_tpot_seconds" in report:
        _print_device(console, report)
    elif "tpot_seconds" in report:
        for prefix, name in (("", report["predictor"]), ("no_prefetch_", "no prefetch")):
            stall, tpot = report[f"{prefix}stall_seconds_per_token"], report[f"{prefix}tpot_seconds"]
            console.print(
                f"{report['hardware']['name']}, {name}: {1e3 * tpot:.2f} ms per token, {1e3 * stall:.2f} ms stalled",
                soft_wrap=True,
            )


def _print_device(console: Console, report: dict[str, Any]) -> None:
    """What a GPU would make of the trace."""
    device = report["hardware"]["name"]
    console.print(f"\n{device}, calculated from its data sheet and estimates; nothing was measured", soft_wrap=True)
    table = Table("", "ms per token", "of it stalled", "uses that wait")
    table.add_row("every expert in its memory", _ms(report["resident_tpot_seconds"]), "", "")
    ahead = report["speculative_distance"]
    names = {"": f"device-managed, {report['predictor']} {ahead} layers ahead"} if ahead else {}
    for prefix, name in (names | {"no_prefetch_": "device-managed", "host_managed_": "host-managed"}).items():
        times = (_ms(report[f"{prefix}{what}"]) for what in ("tpot_seconds", "stall_seconds_per_token"))
        table.add_row(name, *times, f"{report[f'{prefix}decode_miss_rate']:.1%}")
    console.print(table)
    console.print(
        f"No prediction can gain more than {report['most_prediction_gain']:.2f}x. A prefill step of "
        f"{report['prefill_tokens']:,} tokens takes {report['prefill_seconds']:.2f} s, at least "
        f"{report['prefill_link_seconds']:.2f} s however few they are.",
        soft_wrap=True,
    )
    if report["narrow_slots"] > report["slots"]:
        console.print(
            f"Steps of {report['batch']} requests may use more experts of a layer than its window has slots, so they "
            f"load all they use; from {report['narrow_slots']} slots on they do not.",
            soft_wrap=True,
        )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def print_sweep(points: Sequence[Point], trace: Trace) -> None:
    """One table per cache size: predictors down, policies across; bounds that know no policy first."""
    console = Console()
    total = trace.num_layers * trace.num_experts
    console.print(
        "Uses that stall (loads per use) @threshold: of each predictor's thresholds the one with the fewest stalls at "
        "no more bytes than LRU per layer loads; * where every one loads more. belady and lru per layer do not "
        "prefetch."
    )
    for slots in sorted({point.slots for point in points}):
        here = [point for point in points if point.slots == slots]
        limit = next(point.loads_per_use for point in here if point.policy == LRU_PER_LAYER)
        policies = list(dict.fromkeys(p.policy for p in here if p.policy not in (BELADY, LRU_PER_LAYER)))
        table = Table("", *policies, title=f"{slots} slots, {slots / total:.1%} of the experts", title_justify="left")
        for name in (BELADY, LRU_PER_LAYER):
            bound = next(point for point in here if point.policy == name)
            table.add_row(name, *[_cell(bound, limit)] * len(policies))
        names = dict.fromkeys(point.predictor for point in here if point.policy in policies)
        for name in sorted(names, key=lambda name: (name != PERFECT, name != "none")):
            label = {"none": "no prefetch"}.get(name, name)
            cells = ([p for p in here if p.policy == policy and p.predictor == name] for policy in policies)
            table.add_row(label, *(_cell(best_at_bytes(cell, limit), limit) for cell in cells))
        console.print(table)


def _cell(point: Point, limit: float) -> str:
    threshold = "" if point.predictor in ("none", PERFECT) else f" @{point.threshold:g}"
    excess = "*" if point.loads_per_use > limit else ""
    return f"{point.demand_miss_rate:.1%} ({point.loads_per_use:.2f}){threshold}{excess}"


def _rates(values: dict[str, float]) -> tuple[str, str]:
    return _percent(values["demand_miss_rate"], values["loads_per_use"])


def _percent(misses: float, loads: float | None = None) -> tuple[str, str]:
    return f"{misses:.2%}", f"{misses if loads is None else loads:.2%}"
