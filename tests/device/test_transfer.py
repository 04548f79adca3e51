"""Copies that are waited for go before speculative copies, whatever the order of the device's work."""

import numpy as np
import pytest
import torch

from tests.device.virtual import CorruptionError, VirtualDevice, VirtualEvent
from vllm_moe_offload.device import DeviceError
from vllm_moe_offload.device.transfer import PIECE_BYTES, Copy, SpeculativeCopy, TransferQueue


class Memory:
    """Records in registered host memory, and a row on the device for each."""

    def __init__(self, device: VirtualDevice, records: int, nbytes: int = 4):
        host = 1 + np.repeat(np.arange(records, dtype=np.uint8), nbytes).reshape(records, nbytes)
        device.register(host)
        self.host = torch.from_numpy(host)
        self.rows = device.allocate(records * nbytes).view(records, nbytes)

    def copy(self, record: int, row: int | None = None, after: VirtualEvent | None = None) -> Copy:
        return Copy(self.rows[record if row is None else row], self.host[record], after)

    def holds(self, row: int, record: int) -> bool:
        return torch.equal(self.rows[row], self.host[record])


@pytest.fixture
def lazy() -> VirtualDevice:
    """Runs nothing before it is waited for."""
    return VirtualDevice(chance_to_run=0)


def test_a_demand_is_enqueued_at_once_with_one_event_behind_all_its_copies(lazy: VirtualDevice) -> None:
    memory, queue = Memory(lazy, 3), TransferQueue(lazy)
    event = queue.demand([memory.copy(0), memory.copy(1)])
    later = queue.demand([memory.copy(2)])
    assert lazy.pending == 3 and queue.demanded_bytes == 12
    lazy._run_until(event)
    assert memory.holds(0, 0) and memory.holds(1, 1) and not lazy.finished(later)


def test_a_demand_of_nothing_is_behind_the_demands_before_it(lazy: VirtualDevice) -> None:
    memory, queue = Memory(lazy, 1), TransferQueue(lazy)
    assert lazy.finished(queue.demand([]))
    queue.demand([memory.copy(0)])
    lazy.synchronize(queue.demand([]))
    assert memory.holds(0, 0)


def test_a_speculative_load_goes_in_pieces_each_when_the_one_before_has_arrived(lazy: VirtualDevice) -> None:
    """A record of two and a half pieces of which a small component comes last."""
    sizes = (2 * PIECE_BYTES, PIECE_BYTES // 2, 8)
    queue, sources, targets = TransferQueue(lazy), [], []
    for number, nbytes in enumerate(sizes):
        host = np.full(nbytes, 1 + number, np.uint8)
        lazy.register(host)
        sources.append(torch.from_numpy(host))
        targets.append(lazy.allocate(nbytes))
    speculative = queue.speculate([Copy(target, source) for target, source in zip(targets, sources, strict=True)])
    arrived = []
    while not queue.settled(speculative):
        queue.pump()
        queue.pump()
        assert queue.speculative_bytes - sum(arrived) <= PIECE_BYTES
        arrived.append(queue.speculative_bytes - sum(arrived))
        lazy.drain()
    assert arrived == [PIECE_BYTES, PIECE_BYTES, PIECE_BYTES // 2 + 8]
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))


def test_a_speculative_load_waits_for_demands_and_for_the_reader_of_its_row_without_keeping_demands(
    lazy: VirtualDevice,
) -> None:
    memory, queue = Memory(lazy, 3), TransferQueue(lazy)
    lazy.kernel(lazy.main, lambda: [memory.rows[0]], lambda _: None)
    speculative = queue.speculate([memory.copy(0, after=lazy.record(lazy.main))])
    queue.pump()
    demand = queue.demand([memory.copy(1)])
    queue.pump()
    assert lazy.pending == 2
    lazy._run_until(demand)
    queue.pump()
    assert lazy.pending == 1 and not queue.settled(speculative)
    lazy.drain()
    queue.pump()
    lazy.drain()
    assert queue.settled(speculative) and memory.holds(0, 0)


def test_a_cancelled_speculative_load_gives_its_row_to_a_later_copy(
    lazy: VirtualDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_moe_offload.device.transfer.PIECE_BYTES", 2)
    memory, queue = Memory(lazy, 3), TransferQueue(lazy)
    begun, waiting = queue.speculate([memory.copy(0)]), queue.speculate([memory.copy(2)])
    queue.pump()
    queue.cancel(begun)
    queue.cancel(waiting)
    assert queue.settled(waiting) and not queue.settled(begun)
    lazy.synchronize(queue.demand([memory.copy(1, row=0)]))
    assert queue.settled(begun) and memory.holds(0, 1)
    with pytest.raises(AssertionError, match="cancelled"):
        queue.promote(begun)


def test_a_promoted_speculative_load_is_made_before_everything_demanded_later(
    lazy: VirtualDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_moe_offload.device.transfer.PIECE_BYTES", 2)
    memory, queue = Memory(lazy, 2), TransferQueue(lazy)
    speculative = queue.speculate([memory.copy(0)])
    queue.pump()
    event = queue.promote(speculative)
    assert queue.promote(speculative) is event
    lazy.synchronize(event)
    assert queue.settled(speculative) and memory.holds(0, 0)
    assert (queue.speculative_bytes, queue.demanded_bytes) == (2, 2)


def test_copies_that_cannot_be_made_raise_where_they_are_enqueued(lazy: VirtualDevice) -> None:
    memory, queue = Memory(lazy, 2), TransferQueue(lazy)
    with pytest.raises(ValueError, match="4 bytes are copied to 3"):
        queue.demand([Copy(memory.rows[0, :3], memory.host[0])])
    with pytest.raises(ValueError, match="4 bytes are copied to 3"):
        queue.speculate([Copy(memory.rows[0, :3], memory.host[0])])
    queue.speculate([memory.copy(0)])
    lazy.faults.copies = 0
    with pytest.raises(ValueError, match="refuse"):
        queue.pump()
    assert (queue.speculative_bytes, queue.demanded_bytes) == (0, 0)


def test_a_device_that_fails_is_noticed_by_the_next_call(lazy: VirtualDevice) -> None:
    memory, queue = Memory(lazy, 2), TransferQueue(lazy)
    event = queue.demand([memory.copy(0)])
    lazy.faults.operations = 0
    with pytest.raises(DeviceError):
        lazy.synchronize(event)
    with pytest.raises(DeviceError):
        queue.demand([memory.copy(1)])


class Windows:
    """Layers whose experts are demanded, speculated on and evicted through a queue; errors can be put in by name."""

    layers, experts, slots = 3, 5, 3

    def __init__(self, order: int, bug: str | None):
        self.device, self.bug = VirtualDevice(order), bug
        self.numbers = np.random.default_rng(order)
        self.memory = Memory(self.device, self.layers * self.experts)
        self.queue = TransferQueue(self.device)
        self.expert_of = np.full((self.layers, self.slots), -1)
        self.speculation: dict[tuple[int, int], SpeculativeCopy] = {}
        self.written: dict[tuple[int, int], VirtualEvent] = {}
        self.read: dict[tuple[int, int], VirtualEvent] = {}

    def copy(self, layer: int, slot: int) -> Copy:
        record = layer * self.experts + int(self.expert_of[layer, slot])
        after = self.read.get((layer, slot)) if self.bug != "no wait for reader" else None
        return self.memory.copy(record, layer * self.slots + slot, after)

    def place(self, layer: int, expert: int, keep: list[int]) -> int:
        free = [slot for slot in range(self.slots) if self.expert_of[layer, slot] not in keep]
        slot = int(self.numbers.choice(free))
        if (speculative := self.speculation.pop((layer, slot), None)) and self.bug != "speculative copy not cancelled":
            self.queue.cancel(speculative)
        self.expert_of[layer, slot] = expert
        return slot

    def serve(self, layer: int, chosen: list[int]) -> None:
        loads = []
        for expert in chosen:
            if expert not in self.expert_of[layer]:
                slot = self.place(layer, expert, chosen)
                loads.append((slot, self.copy(layer, slot)))
        if loads:
            event = self.queue.demand([copy for _, copy in loads])
            self.written |= {(layer, slot): event for slot, _ in loads}
        slots = [int(np.flatnonzero(self.expert_of[layer] == expert)[0]) for expert in chosen]
        for slot in slots:
            if speculative := self.speculation.get((layer, slot)):
                if self.bug == "speculative copy not waited for":
                    continue
                self.written[layer, slot] = (
                    self.queue.promote(speculative)
                    if self.bug != "speculative copy not promoted"
                    else speculative.event or VirtualEvent(None)
                )
                del self.speculation[layer, slot]
            if self.bug != "no wait for copy":
                self.device.wait(self.device.main, self.written[layer, slot])
        rows = [self.memory.rows[layer * self.slots + slot] for slot in slots]
        wanted = [1 + layer * self.experts + expert for expert in chosen]

        def check(values: list) -> None:
            if [value.tolist() for value in values] != [[number] * 4 for number in wanted]:
                raise CorruptionError("other records")

        self.device.kernel(self.device.main, lambda: rows, check)
        self.read |= {(layer, slot): self.device.record(self.device.main) for slot in slots}

    def speculate(self, layer: int) -> None:
        expert = int(self.numbers.integers(self.experts))
        if expert not in self.expert_of[layer]:
            slot = self.place(layer, expert, [])
            self.speculation[layer, slot] = self.queue.speculate([self.copy(layer, slot)])

    def run(self) -> None:
        for _ in range(3):
            for layer in range(self.layers):
                self.serve(layer, self.numbers.choice(self.experts, 2, replace=False).tolist())
                self.speculate((layer + 1) % self.layers)
                self.speculate((layer + 2) % self.layers)
                self.queue.pump()
        self.device.drain()
        self.check_end()

    def check_end(self) -> None:
        """After the last of its copies each slot holds what the host believes."""
        for key in np.ndindex(self.layers, self.slots):
            if self.expert_of[key] >= 0 and key not in self.speculation:
                layer, slot = key
                record = layer * self.experts + int(self.expert_of[key])
                if not self.memory.holds(layer * self.slots + slot, record):
                    raise CorruptionError("a slot holds another record than the host believes")


BUGS = (
    "no wait for reader",
    "no wait for copy",
    "speculative copy not cancelled",
    "speculative copy not waited for",
    "speculative copy not promoted",
)


def shown(bug: str | None, orders: int) -> bool:
    for order in range(orders):
        try:
            Windows(order, bug).run()
        except CorruptionError:
            return True
    return False


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_moe_offload.device.transfer.PIECE_BYTES", 2)


@pytest.mark.usefixtures("small_pieces")
def test_windows_fed_through_a_queue_are_right_in_every_order() -> None:
    assert not shown(None, 500)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("bug", BUGS)
def test_some_order_shows_an_error_of_those_who_use_the_queue(bug: str) -> None:
    assert shown(bug, 500)
