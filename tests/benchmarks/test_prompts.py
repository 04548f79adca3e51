"""prompts.py: what is measured has not been learned from."""

from pathlib import Path

import pytest
from prompts import (
    EXAMPLES,
    Prompt,
    domains,
    in_turns,
    read_prompts,
    split_by_domain,
    split_within_domains,
    write_prompts,
)


def test_no_topic_is_on_both_sides() -> None:
    prompts = read_prompts([EXAMPLES])
    learned, measured = split_by_domain(prompts)
    assert not set(domains(learned)) & set(domains(measured))
    assert sorted(learned + measured) == sorted(prompts)
    named, held_out = split_by_domain(prompts, ["math"])
    assert {prompt.domain for prompt in held_out} == {"math"} and "math" not in domains(named)


def test_every_topic_is_on_both_sides_but_no_prompt() -> None:
    prompts = [Prompt(f"{domain}{number}", domain) for domain in "ab" for number in range(3)]
    learned, measured = split_within_domains(prompts)
    assert [prompt.text for prompt in measured] == ["a1", "b1"]
    assert set(learned) == set(prompts) - set(measured)


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="no prompts about cooking; there are a"):
        split_by_domain([Prompt("x", "a")], ["cooking"])
    with pytest.raises(ValueError, match="1 and 0"):
        split_by_domain([Prompt("x", "a")])
    with pytest.raises(ValueError, match="2 and 0"):
        split_within_domains([Prompt("x", "a"), Prompt("y", "b")])


def test_topics_take_turns() -> None:
    prompts = [Prompt(f"{domain}{number}", domain) for domain in "ab" for number in range(3)] + [Prompt("c0", "c")]
    assert [prompt.text for prompt in in_turns(prompts)] == ["a0", "b0", "c0", "a1", "b1", "a2", "b2"]


def test_prompts_survive_a_file(tmp_path: Path) -> None:
    prompts = [Prompt("Größe\n", "german"), Prompt("x", "")]
    write_prompts(tmp_path / "p.jsonl", prompts)
    assert read_prompts([tmp_path / "p.jsonl"]) == prompts
