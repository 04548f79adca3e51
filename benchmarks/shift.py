"""The first tokens after a start and after a change of topic: what remembering earlier requests is worth just then.

Every round starts a fresh engine per arm. It serves one topic after another, several requests each; the first request
after the start and the first of each further topic are measured. Arms: no prediction; prediction with the history of
earlier days (a copy of --warm), as after a restart; prediction that starts with nothing.

    python benchmarks/warm.py /tmp/warm --model /tmp/wide --within
    python benchmarks/shift.py --model /tmp/wide --warm /tmp/warm
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from comparison import console, write_result
from engines import Engine, Variant
from prompts import Prompt, domains, read_prompts
from rich.table import Table
from warm import HELD_OUT, HISTORY, TINY_MOE

from vllm_moe_offload.bench.summary import Spread, hit_rate, stall, tpot

OFF, REMEMBERING, FORGETFUL = "no prediction", "history kept", "history empty"
START, SHIFT = "start", "shift"

Runs = dict[str, dict[str, list[dict[str, Any]]]]
"""By moment (START, SHIFT) and arm, in the order in which they were measured: the same in every arm."""


class Visit(NamedTuple):
    """A request, and the moment it measures, if any."""

    text: str
    moment: str | None


def itinerary(prompts: Sequence[Prompt], topics: int, stay: int, number: int) -> Iterator[Visit]:
    """The requests of a round: `stay` of each of `topics` topics. Another round starts with another topic and request.

    Raises:
        ValueError: fewer than two topics have `stay` prompts.
    """
    by_topic = {d: [prompt.text for prompt in prompts if prompt.domain == d] for d in domains(prompts)}
    large = [domain for domain, texts in by_topic.items() if len(texts) >= stay]
    if len(large) < 2:
        raise ValueError(f"only {', '.join(large) or 'no topic'} has {stay} prompts; stay for fewer, or give more")
    for place in range(topics):
        texts = by_topic[large[(number + place) % len(large)]]
        for visit in range(stay):
            moment = (SHIFT if place else START) if visit == 0 else None
            yield Visit(texts[(number * stay + visit) % len(texts)], moment)


def arms(options: argparse.Namespace) -> list[Variant]:
    """What is compared. `history: off` would remember nothing at all; FORGETFUL has an empty folder."""
    arguments = {"model": str(options.model), "enforce_eager": options.eager, "enable_prefix_caching": False}
    offload = {"cache": options.budget}
    predicting = offload | {"predictor": "history"}
    return [
        Variant(OFF, offload | {"predictor": "none"}, arguments),
        Variant(REMEMBERING, predicting, arguments, options.warm / HISTORY),
        Variant(FORGETFUL, predicting, arguments),
    ]


def measure(options: argparse.Namespace, prompts: Sequence[Prompt]) -> Runs:
    """Run all rounds. Raises EngineError."""
    runs: Runs = {moment: {variant.name: [] for variant in arms(options)} for moment in (START, SHIFT)}
    for number in range(options.rounds):
        for variant in arms(options):
            console.print(f"round {number + 1} of {options.rounds}, {variant.name} …")
            engine = Engine.start(variant)
            try:
                for visit in itinerary(prompts, options.topics, options.stay, number):
                    result = engine.run([[visit.text]], options.tokens)
                    if visit.moment is not None:
                        runs[visit.moment][variant.name].append(result)
            finally:
                engine.stop()
    return runs


def summarize_moment(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Per arm: medians of TPOT and stall (seconds per token), their ratios to OFF request by request, and hits."""
    summary = {}
    for name, mine in runs.items():
        pairs = list(zip(mine, runs[OFF], strict=True))
        summary[name] = {
            "requests": len(mine),
            "tpot": Spread.of([tpot(run) for run in mine]),
            "tpot_ratio": Spread.of([tpot(ours) / tpot(theirs) for ours, theirs in pairs]),
            "stall": Spread.of([stall(run) for run in mine]),
            "stall_ratio": Spread.of([stall(ours) / max(stall(theirs), 1e-9) for ours, theirs in pairs]),
            "hit_rate": hit_rate(mine),
            "same_tokens": all(ours["tokens"] == theirs["tokens"] for ours, theirs in pairs),
        }
    return summary


def show(title: str, summary: dict[str, dict[str, Any]]) -> None:
    """Print one moment's table."""
    table = Table("arm", "TPOT ms", "ratio", "of it stalled, ms", "ratio", "hits", "tokens", title=title)
    for name, entry in summary.items():
        rate = entry["hit_rate"]
        table.add_row(
            name,
            entry["tpot"].show(1e3),
            entry["tpot_ratio"].show(digits=3),
            entry["stall"].show(1e3),
            entry["stall_ratio"].show(digits=3),
            "no lookups" if rate is None else f"{rate:.1%}",
            "same" if entry["same_tokens"] else "DIFFER",
        )
    console.print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, default=TINY_MOE, help="see widen.py for bigger ones")
    parser.add_argument("--warm", type=Path, required=True, help="made by warm.py, best with --within")
    parser.add_argument("--prompts", type=Path, nargs="+", help="default: those held out from --warm")
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--topics", type=int, default=4, help="topics per round: one start, the others are changes")
    parser.add_argument("--stay", type=int, default=3, help="requests of a topic before the next")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    prompts = read_prompts(options.prompts or [options.warm / HELD_OUT])
    try:
        list(itinerary(prompts, options.topics, options.stay, 0))
    except ValueError as error:
        parser.error(str(error))
    runs = measure(options, prompts)
    summaries = {moment: summarize_moment(by_arm) for moment, by_arm in runs.items()}
    show(f"first {options.tokens} tokens after a start, {options.budget}", summaries[START])
    show(f"first {options.tokens} tokens after a change of topic, {options.budget}", summaries[SHIFT])
    if options.json:
        write_result(options.json, summaries=summaries, runs=runs)


if __name__ == "__main__":
    sys.exit(main())
