"""How `plan` prints its answer: sizes, where they go, the table of slots, and what to do."""

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_moe_offload.plan.planning import Plan, Point
from vllm_moe_offload.plan.tiers import describe
from vllm_moe_offload.sizes import size_text


def print_plan(plan: Plan) -> None:
    """For a person."""
    console = Console()

    def say(text: str) -> None:
        console.print(escape(text), soft_wrap=True, highlight=False)

    for line in _lines(plan):
        say(line)
    console.print(_table(plan))
    if plan.routing.kind != "trace":
        say(f"Routing is {plan.routing.words}.")
    else:
        say(f"Routing is replayed from {plan.routing.words}.")
    bent = plan.points[plan.knee]
    say(f"Knee: {bent.slots} slots ({bent.share:.0%}, {size_text(bent.nbytes)}); beyond it memory buys less.")
    for note in plan.notes:
        say(f"Note: {note}.")
    console.print(f"\n[bold]{plan.verdict}[/bold]: {escape(plan.reason)}", soft_wrap=True, highlight=False)
    say(plan.command)


def _lines(plan: Plan) -> Iterator[str]:
    model, tiers = plan.model, plan.tiers
    exact = "" if model.exact else "about "
    yield (
        f"{model.name}: {model.architecture}, {model.moe_layers} MoE layers of {model.experts_per_layer} experts, "
        f"top-{model.top_k}"
    )
    yield (
        f"experts: {exact}{size_text(model.expert_bytes)} in all, {size_text(model.record_bytes)} each, "
        f"{size_text(model.expert_bytes / model.moe_layers)} per layer; dense weights: {exact}"
        f"{size_text(model.dense_bytes)}"
    )
    yield (
        f"KV cache: {size_text(model.kv_cache_bytes_per_sequence)} per request of {plan.context} tokens, "
        f"{size_text(tiers.kv_cache_bytes)} for {plan.concurrency}"
    )
    room = "nothing" if tiers.room_bytes <= 0 else size_text(tiers.room_bytes)
    yield f"{describe(tiers)}; {room} left for slots: {tiers.slots} of {model.experts} experts"
    if tiers.experts_in_host_bytes:
        yield (
            f"host memory: {size_text(tiers.host_bytes)} for experts, holds {size_text(tiers.experts_in_host_bytes)} "
            "of them"
        )
    if tiers.experts_on_disk_bytes:
        yield (
            f"disk: {size_text(model.expert_bytes)} for the store, of which "
            f"{size_text(tiers.experts_on_disk_bytes)} fit into no memory"
        )
    yield ""


def _table(plan: Plan) -> Table:
    source = "measured" if plan.hardware_measured else "as described"
    table = Table(title=f"decoding on {plan.hardware.name} ({source})", title_justify="left")
    for column in ("slots", "of all", "memory", "hits", "stall, ms", "ms per token"):
        table.add_column(column, justify="right")
    table.add_column(f"of {plan.concurrency} at once", justify="right")
    table.add_column("")
    for number, point in enumerate(plan.points):
        marks = ["knee"] * (number == plan.knee) + ["fits"] * (number == plan.chosen)
        table.add_row(*_cells(point), ", ".join(marks), style=None if point.fits else "dim")
    return table


def _cells(point: Point) -> Iterator[str]:
    yield str(point.slots)
    yield f"{point.share:.1%}"
    yield size_text(point.nbytes)
    yield f"{point.hit_rate:.1%}"
    yield f"{1e3 * point.stall_seconds:.2f}"
    yield f"{1e3 * point.tpot_seconds:.2f}"
    yield "-" if point.busy_tpot_seconds is None else f"{1e3 * point.busy_tpot_seconds:.2f}"
