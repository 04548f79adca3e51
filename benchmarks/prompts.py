"""Prompts by topic, and which of them an engine may have seen before it is measured. Reads files, nothing else."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

EXAMPLES = Path(__file__).parent.parent / "examples" / "prompts.jsonl"


class Prompt(NamedTuple):
    """One request's text, and what it is about."""

    text: str
    domain: str


def read_prompts(paths: Sequence[Path]) -> list[Prompt]:
    """All prompts of JSON-lines files with a field `text` and, where there are topics, `domain`."""
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [Prompt(line["text"], line.get("domain", "")) for line in lines]


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write what `read_prompts` reads."""
    path.write_text("".join(json.dumps(prompt._asdict()) + "\n" for prompt in prompts))


def domains(prompts: Sequence[Prompt]) -> list[str]:
    """Topics, the one with most prompts first."""
    counts = Counter(prompt.domain for prompt in prompts)
    return sorted(counts, key=lambda domain: (-counts[domain], domain))


def in_turns(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same prompts, one of each topic after the other, so that the first few are about everything."""
    by_domain = [[prompt for prompt in prompts if prompt.domain == domain] for domain in domains(prompts)]
    return [prompt for turn in zip_longest(*by_domain) for prompt in turn if prompt is not None]


def split_by_domain(prompts: Sequence[Prompt], held_out: Sequence[str] = ()) -> tuple[list[Prompt], list[Prompt]]:
    """To learn from, and to measure with: no topic is in both. Holds out every second topic if none are named.

    Raises:
        ValueError: a named topic has no prompts, or one side would have none.
    """
    known = domains(prompts)
    if unknown := set(held_out) - set(known):
        raise ValueError(f"no prompts about {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return _split(prompts, [prompt.domain in (held_out or known[1::2]) for prompt in prompts])


def split_within_domains(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """To learn from, and to measure with: every second prompt of each topic is held out.

    Raises:
        ValueError: no topic has two prompts.
    """
    seen: Counter[str] = Counter()
    held_out = []
    for prompt in prompts:
        held_out.append(seen[prompt.domain] % 2 == 1)
        seen[prompt.domain] += 1
    return _split(prompts, held_out)


def _split(prompts: Sequence[Prompt], held_out: Sequence[bool]) -> tuple[list[Prompt], list[Prompt]]:
    learned = [prompt for prompt, out in zip(prompts, held_out, strict=True) if not out]
    measured = [prompt for prompt, out in zip(prompts, held_out, strict=True) if out]
    if not learned or not measured:
        raise ValueError(f"{len(prompts)} prompts split into {len(learned)} and {len(measured)}: give more of them")
    return learned, measured
