"""Every state that a queue of two guesses and one demand can come to, one call or one finished operation at a time."""

from collections import deque
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.device.virtual import VirtualDevice
from vllm_moe_offload.device.transfer import Copy, Guess, TransferQueue

GUESSES, DEMANDS, PIECES = 2, 1, 2

Action = tuple[str, int]


class Instance:
    """A queue after some actions. Guess 1 may not be copied before a reader on the main stream has ended."""

    def __init__(self, queue: type[TransferQueue], actions: tuple[Action, ...] = ()):
        self.device = VirtualDevice(chance_to_run=0)
        self.host = np.arange(1, 1 + GUESSES + DEMANDS, dtype=np.uint8).repeat(PIECES).reshape(-1, PIECES)
        self.device.register(self.host)
        self.rows = self.device.allocate(self.host.size).view(self.host.shape)
        self.device.kernel(self.device.main, lambda: [self.rows[1]], lambda _: None, name="reader")
        self.reader = self.device.record(self.device.main)
        self.queue = queue(self.device)
        self.stream = self.device.streams[-1]
        self.guesses: list[Guess] = []
        self.promoted: set[int] = set()
        self.demands = 0
        for action in actions:
            self.act(*action)

    def copy(self, record: int) -> Copy:
        return Copy(self.rows[record], torch.from_numpy(self.host[record]), self.reader if record == 1 else None)

    def act(self, name: str, number: int) -> None:
        waiting = [self.owner(operation) for operation in self.stream.queue]
        match name:
            case "guess":
                self.guesses.append(self.queue.guess([self.copy(number)]))
            case "demand":
                self.queue.demand([self.copy(GUESSES + number)])
                self.demands += 1
            case "pump":
                self.queue.pump()
                enqueued = [self.owner(operation) for operation in list(self.stream.queue)[len(waiting) :]]
                assert not (waiting and enqueued), "a piece is enqueued while another copy waits"
                assert not any(self.guesses[number].cancelled for number in enqueued), "a cancelled guess goes on"
            case "promote":
                self.queue.promote(self.guesses[number])
                self.promoted.add(number)
            case "cancel":
                self.queue.cancel(self.guesses[number])
            case "copy":
                self.device.run_next(self.stream)
            case "reader":
                self.device.run_next(self.device.main)

    def actions(self) -> Iterator[Action]:
        if len(self.guesses) < GUESSES:
            yield "guess", len(self.guesses)
        if self.demands < DEMANDS:
            yield "demand", self.demands
        yield "pump", 0
        for number, guess in enumerate(self.guesses):
            if not guess.cancelled:
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
        guessed = [record for record in map(self.owner, self.stream.queue) if record < GUESSES]
        alone = [record for record in guessed if record not in self.promoted]
        assert len(alone) <= 1, "two pieces of guesses are under way"
        begun = [
            number
            for number, guess in enumerate(self.guesses)
            if guess.event is not None and guess.pieces and not guess.cancelled
        ]
        assert len(begun) <= 1, "two guesses have begun"
        for number, guess in enumerate(self.guesses):
            under_way = number in guessed
            assert not (under_way and self.queue.settled(guess)), "a guess under way is settled"
            arrived = self.rows[number].tolist() == self.host[number].tolist()
            assert guess.cancelled or self.queue.settled(guess) == arrived, "a guess is settled that has not arrived"
            if number == 1 and self.rows[1].any():
                assert self.device.finished(self.reader), "a row is written before its reader has ended"
        enqueued = self.queue.demanded_bytes + self.queue.guessed_bytes
        not_enqueued = sum(len(guess.pieces) for guess in self.guesses)
        made = (len(self.guesses) + self.demands) * PIECES
        assert enqueued + not_enqueued <= made, "a piece is enqueued twice"
        if not any(guess.cancelled for guess in self.guesses):
            assert enqueued + not_enqueued == made, "a piece is lost"

    def settles(self) -> bool:
        """Whether pumping and finishing work brings in everything that is not cancelled."""
        self.device.run_next(self.device.main)
        for _ in range(2 * PIECES * GUESSES):
            self.queue.pump()
            while self.device.run_next(self.stream):
                pass
        return all(self.queue.settled(guess) for guess in self.guesses)

    def key(self) -> tuple[object, ...]:
        return (
            tuple((len(g.pieces), g.event and g.event.complete, g.cancelled) for g in self.guesses),
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


def test_no_state_is_wrong_and_none_keeps_a_guess_for_ever() -> None:
    assert explore(TransferQueue) > 1000


class GuessesBesideDemands(TransferQueue):
    def _idle(self):
        return True


class DemandsUnseen(TransferQueue):
    def demand(self, copies):
        last, event = self._last, super().demand(copies)
        self._last = last
        return event


class ReaderForgotten(TransferQueue):
    def guess(self, copies):
        return super().guess([copy._replace(after=None) for copy in copies])


class TwoGuessesBegun(TransferQueue):
    def pump(self):
        super().pump()
        self._guesses.rotate()


class CancelsOnlyWhatHasNotBegun(TransferQueue):
    def cancel(self, guess):
        if guess.event is None:
            super().cancel(guess)
        guess.cancelled = True


class PromotesButEnqueuesLater(TransferQueue):
    def promote(self, guess):
        pieces = list(guess.pieces)
        event = super().promote(guess)
        if len(pieces) == 1:
            self._guesses.append(guess)
            guess.pieces.extend(pieces)
        return event


class SettledWhenEnqueued(TransferQueue):
    def settled(self, guess):
        return not guess.pieces


class LosesTheOther(TransferQueue):
    def cancel(self, guess):
        super().cancel(guess)
        self._guesses.clear()


@pytest.mark.parametrize(
    "wrong",
    [
        GuessesBesideDemands,
        DemandsUnseen,
        ReaderForgotten,
        TwoGuessesBegun,
        CancelsOnlyWhatHasNotBegun,
        PromotesButEnqueuesLater,
        SettledWhenEnqueued,
        LosesTheOther,
    ],
)
def test_a_queue_with_an_error_comes_to_a_wrong_state(wrong: type[TransferQueue]) -> None:
    with pytest.raises(AssertionError):
        explore(wrong)
