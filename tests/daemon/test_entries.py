"""Entries of the tables: given away in turn, last of all those that a living process might still write."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from vllm_moe_offload.daemon.entries import Entries
from vllm_moe_offload.ipc.protocol import MAX_WORKERS


@pytest.fixture
def living() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_the_entry_of_a_process_that_lives_is_given_away_when_it_has_died(living: subprocess.Popen[bytes]) -> None:
    entries = Entries()
    first = entries.take(living.pid)
    assert first == 0
    entries.give_back(first)
    for _ in range(3 * MAX_WORKERS):
        with subprocess.Popen(["true"]) as passing:
            taken = entries.take(passing.pid)
        assert taken is not None and taken != first
        entries.give_back(taken)
    living.kill()
    living.wait()
    given = {entries.take(0) for _ in range(MAX_WORKERS)}
    assert given == set(range(MAX_WORKERS)) and entries.take(0) is None
    entries.close()


def test_an_entry_is_given_away_all_the_same_when_there_is_no_other(living: subprocess.Popen[bytes]) -> None:
    entries = Entries()
    for expected in [*range(MAX_WORKERS), *range(3)]:
        taken = entries.take(living.pid)
        assert taken == expected
        entries.give_back(taken)
    entries.close()
