"""Every state of a queue of two speculative copies and one demand, one call or one finished operation at a time."""

from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.device.virtual import VirtualDevice
from vllm_moe_offload.device.transfer import Copy, SpeculativeCopy, TransferQueue

SPECULATIVE, DEMANDS, PIECES = 2, 1, 2

Action = tuple[str, int]


class Instance:
    """A queue after some actions. Speculative copy 1 may not be copied before a reader on the main stream has ended."""

    def __init__(self, queue: type[TransferQueue], actions: tuple[Action, ...] = ()):
        self.device = VirtualDevice(chance_to_run=0)
        self.host = np.arange(1, 1 + SPECULATIVE + DEMANDS, dtype=np.uint8).repeat(PIECES).reshape(-1, PIECES)
        self.device.register(self.host)
        self.rows = self.device.allocate(self.host.size).view(self.host.shape)
        self.device.kernel(self.device.main, lambda: [self.rows[1]], lambda _: None, name="reader")
        self.reader = self.device.record(self.device.main)
        self.queue = queue(self.device)
        self.stream = self.device.streams[-1]
        self.speculation: list[SpeculativeCopy] = []
        self.promoted: set[int] = set()
        self.demands = 0
        for action in actions:
            self.act(*action)

    def copy(self, record: int) -> Copy:
        return Copy(self.rows[record], torch.from_numpy(self.host[record]), self.reader if record == 1 else None)

    def act(self, name: str, number: int) -> None:
        waiting = [self.owner(operation) for operation in self.stream.queue]
        match name:
            case "speculative copy":
                self.speculation.append(self.queue.speculate([self.copy(number)]))
            case "demand":
                self.queue.demand([self.copy(SPECULATIVE + number)])
                self.demands += 1
            case "pump":
                self.queue.pump()
                enqueued = [self.owner(operation) for operation in list(self.stream.queue)[len(waiting) :]]
                assert not (waiting and enqueued), "a piece is enqueued while another copy waits"
                assert not any(self.speculation[number].cancelled for number in enqueued), (
                    "a cancelled speculative copy goes on"
                )
            case "promote":
                self.queue.promote(self.speculation[number])
                self.promoted.add(number)
            case "cancel":
                self.queue.cancel(self.speculation[number])
            case "copy":
                self.device.run_next(self.stream)
            case "reader":
                self.device.run_next(self.device.main)

    def actions(self) -> Iterator[Action]:
        if len(self.speculation) < SPECULATIVE:
            yield "speculative copy", len(self.speculation)
        if self.demands < DEMANDS:
            yield "demand", self.demands
        yield "pump", 0
        for number, speculative in enumerate(self.speculation):
            if not speculative.cancelled:
                yield "promote", number
                yield "cancel", number
        if self.stream.queue and all(event.complete for event in self.stream.queue[0].waits):
            yield "copy", 0
        if not self.device.finished(self.reader):
            yield "reader", 0

    def owner(self, operation) -> int:
        """The record an operation copies a part of."""
        return (operation._writes()[0].data_ptr() - self.rows.data_ptr()) // PIECES

    def check(self) -> None:
        speculated = [record for record in map(self.owner, self.stream.queue) if record < SPECULATIVE]
        alone = [record for record in speculated if record not in self.promoted]
        assert len(alone) <= 1, "two pieces of speculative copies are under way"
        begun = [
            number
            for number, speculative in enumerate(self.speculation)
            if speculative.event is not None and speculative.pieces and not speculative.cancelled
        ]
        assert len(begun) <= 1, "two speculative copies have begun"
        for number, speculative in enumerate(self.speculation):
            under_way = number in speculated
            assert not (under_way and self.queue.settled(speculative)), "a speculative copy under way is settled"
            arrived = self.rows[number].tolist() == self.host[number].tolist()
            assert speculative.cancelled or self.queue.settled(speculative) == arrived, (
                "a speculative copy is settled that has not arrived"
            )
            if number == 1 and self.rows[1].any():
                assert self.device.finished(self.reader), "a row is written before its reader has ended"
        enqueued = self.queue.demanded_bytes + self.queue.speculative_bytes
        not_enqueued = sum(len(speculative.pieces) for speculative in self.speculation)
        made = (len(self.speculation) + self.demands) * PIECES
        assert enqueued + not_enqueued <= made, "a piece is enqueued twice"
        if not any(speculative.cancelled for speculative in self.speculation):
            assert enqueued + not_enqueued == made, "a piece is lost"

    def settles(self) -> bool:
        """Whether pumping and finishing work brings in everything that is not cancelled."""
        self.device.run_next(self.device.main)
        for _ in range(2 * PIECES * SPECULATIVE):
            self.queue.pump()
            while self.device.run_next(self.stream):
                pass
        return all(self.queue.settled(speculative) for speculative in self.speculation)

    def key(self) -> tuple[object, ...]:
        return (
            tuple((len(g.pieces), g.event and g.event.complete, g.cancelled) for g in self.speculation),
            tuple(self.rows.reshape(-1).tolist()),
            tuple(map(self.owner, self.stream.queue)),
            tuple(bool(operation.waits) for operation in self.stream.queue),
            self.demands,
            tuple(self.promoted),
            self.device.finished(self.reader),
        )


def explore(queue: type[TransferQueue]) -> int:
    """How many states there are; raises ``AssertionError`` at the first one that is wrong."""
    seen = {Instance(queue).key()}
    paths = deque([()])
    while paths:
        path = paths.popleft()
        instance = Instance(queue, path)
        following = list(instance.actions())
        assert instance.settles(), f"what is not cancelled never arrives after {path}"
        for action in following:
            instance = Instance(queue, (*path, action))
            instance.check()
            if (key := instance.key()) not in seen:
                seen.add(key)
                paths.append((*path, action))
    return len(seen)


@pytest.fixture(autouse=True)
def pieces_of_one_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_moe_offload.device.transfer.PIECE_BYTES", 1)


def test_no_state_is_wrong_and_none_keeps_a_speculative_load_for_ever() -> None:
    assert explore(TransferQueue) > 1000


class SpeculativeBesideDemands(TransferQueue):
    def _idle(self):
        return True


class DemandsUnseen(TransferQueue):
    def demand(self, copies):
        last, event = self._last, super().demand(copies)
        self._last = last
        return event


class ReaderForgotten(TransferQueue):
    def speculate(self, copies):
        return super().speculate([copy._replace(after=None) for copy in copies])


class TwoSpeculativeBegun(TransferQueue):
    def pump(self):
        super().pump()
        self._speculation.rotate()


class CancelsOnlyWhatHasNotBegun(TransferQueue):
    def cancel(self, speculative):
        if speculative.event is None:
            super().cancel(speculative)
        speculative.cancelled = True


class PromotesButEnqueuesLater(TransferQueue):
    def promote(self, speculative):
        pieces = list(speculative.pieces)
        event = super().promote(speculative)
        if len(pieces) == 1:
            self._speculation.append(speculative)
            speculative.pieces.extend(pieces)
        return event


class SettledWhenEnqueued(TransferQueue):
    def settled(self, speculative):
        return not speculative.pieces


class LosesTheOther(TransferQueue):
    def cancel(self, speculative):
        super().cancel(speculative)
        self._speculation.clear()


@pytest.mark.parametrize(
    "wrong",
    [
        SpeculativeBesideDemands,
        DemandsUnseen,
        ReaderForgotten,
        TwoSpeculativeBegun,
        CancelsOnlyWhatHasNotBegun,
        PromotesButEnqueuesLater,
        SettledWhenEnqueued,
        LosesTheOther,
    ],
)
def test_a_queue_with_an_error_comes_to_a_wrong_state(wrong: type[TransferQueue]) -> None:
    with pytest.raises(AssertionError):
        explore(wrong)
