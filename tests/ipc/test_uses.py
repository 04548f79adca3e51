"""Uses arrive in order, each once, whatever the writer and the reader do meanwhile; what is overtaken is left out."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.ipc.table import HEAD, RING, ResidencyTable
from vllm_moe_offload.ipc.uses import LONGEST, STEP, UseReader, UseWriter

WORKER = 2


@settings(deadline=None)
@given(st.lists(st.integers(0, LONGEST) | st.just("drain"), max_size=40), st.integers(0, RING))
def test_what_is_noted_is_drained_in_order(does: list[int | str], already: int) -> None:
    """Until the ring is full every use arrives; afterwards an unbroken run of the latest."""
    table = ResidencyTable.create("test", 1 << 18)
    writer, reader = UseWriter(table, WORKER), UseReader(table, WORKER)
    for start in range(0, already, LONGEST):
        writer.note(np.arange(min(LONGEST, already - start)))
    reader.drain()
    noted = drained = 0
    for what in [*does, "drain"]:
        if what != "drain":
            writer.note(np.arange(noted, noted + what))
            noted += what
            continue
        got = reader.drain()
        assert got.tolist() == list(range(max(drained, noted - (RING - LONGEST)), noted))
        drained = noted
    table.close()


def test_steps_are_noted_between_experts() -> None:
    table = ResidencyTable.create("test", 8)
    writer, reader = UseWriter(table, WORKER), UseReader(table, WORKER)
    for experts in ([STEP, 1, 2], [3], [STEP, 1]):
        writer.note(np.array(experts))
    assert reader.drain().tolist() == [STEP, 1, 2, 3, STEP, 1]
    assert reader.drain().tolist() == []


def test_what_is_no_expert_of_the_pool_is_left_out() -> None:
    table = ResidencyTable.create("test", 8)
    table.uses[WORKER, :5] = [7, 8, -2, 0, np.iinfo(np.int32).min]
    table.head[WORKER] = 5
    assert UseReader(table, WORKER).drain().tolist() == [7, 0]


@pytest.mark.parametrize("head", [2**64 - 1, 2**63, RING + 1, 10**12])
def test_any_head_is_survived(head: int) -> None:
    """A broken worker may write what it likes; a new one in its place is heard again."""
    table = ResidencyTable.create("test", 8)
    reader = UseReader(table, WORKER)
    table.head[WORKER] = head
    assert len(reader.drain()) <= RING
    table.clear(WORKER)
    reader.drain()
    UseWriter(table, WORKER).note(np.array([5]))
    assert reader.drain().tolist() == [5]


def test_more_than_may_be_half_written_is_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        UseWriter(ResidencyTable.create("test", 8), WORKER).note(np.zeros(LONGEST + 1))


WRITE = """
import sys
import numpy as np
from vllm_moe_offload.ipc.table import ResidencyTable
from vllm_moe_offload.ipc.uses import UseWriter
fd, experts = map(int, sys.argv[1:])
table = ResidencyTable.attach(fd, experts)
writer = UseWriter(table, 2)
numbers, sizes, noted, turn = np.arange(experts + 4096, dtype=np.int32) % experts, [8, 8, 64, 8, 4096], 0, 0
while not table.done[2]:
    size = sizes[turn % 5]
    writer.note(numbers[noted : noted + size])
    noted, turn = (noted + size) % experts, turn + 1
"""


def test_a_writer_in_another_process_is_never_read_half() -> None:
    """It counts in pieces, faster than it is read: what arrives are unbroken runs, and in the end the last number."""
    experts = 1_000_003
    table = ResidencyTable.create("test", experts)
    fd = table.mapping.fd
    child = subprocess.Popen([sys.executable, "-c", WRITE, str(fd), str(experts)], pass_fds=(fd,))
    reader = UseReader(table, WORKER)
    last, runs, overtaken = -1, 0, 0
    while runs < 200 and child.poll() is None:
        got = reader.drain()
        if len(got):
            assert (np.diff(got) % experts == 1).all()
            overtaken += (got[0] - last) % experts != 1
            last, runs = int(got[-1]), runs + 1
        os.sched_yield()
    table.done[WORKER] = 1
    assert child.wait() == 0 and runs == 200 and overtaken > 0
    got = reader.drain()
    assert int(got[-1] if len(got) else last) == int(table.entries[WORKER, HEAD] - 1) % experts
