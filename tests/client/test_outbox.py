"""What an engine keeps for the next daemon: in order, within a budget, and everything from the start for a new one."""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.daemon.past import past_request
from vllm_moe_offload.client.outbox import Outbox, Upload
from vllm_moe_offload.trace.trace import Trace

ONE = past_request(0)
BYTES = sum(array.nbytes for array in (ONE.experts, ONE.weights, ONE.tokens, ONE.phase, ONE.embeddings))
ROOM = 4


class Post(RuleBasedStateMachine):
    """An outbox for ``ROOM`` traces, and what daemons have got out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.outbox = Outbox(ROOM * BYTES)
        self.put: list[Trace] = []
        self.kept: list[int] = []
        self.refused: set[int] = set()
        self.offered: set[int] = set()
        self.there: set[int] = set()
        """With the present daemon."""

    @rule()
    def end_request(self) -> None:
        self.kept = [*self.kept, len(self.put)][-ROOM:]
        self.put.append(replace(ONE))
        self.outbox.put(self.put[-1])

    @rule(fate=st.sampled_from(["delivered", "refused", "lost"]))
    def send(self, fate: str) -> None:
        upload = self.outbox.next()
        if upload is None:
            return
        self.look(upload)
        if fate == "delivered":
            self.outbox.delivered(upload.number)
            self.there.add(upload.number)
        elif fate == "refused":
            self.outbox.drop(upload.number)
            self.refused.add(upload.number)
            self.kept.remove(upload.number)
        else:
            self.new_daemon()

    def look(self, upload: Upload) -> None:
        assert upload.trace is self.put[upload.number]
        assert upload.number not in self.there | self.refused
        assert all(upload.number > number for number in self.there)
        assert upload.maybe_duplicate == (upload.number in self.offered)
        self.offered.add(upload.number)

    @rule()
    def new_daemon(self) -> None:
        self.outbox.start_over()
        self.there = set()

    @invariant()
    def it_is_empty_when_the_daemon_has_all_that_is_kept(self) -> None:
        assert self.outbox.empty == (not self.kept or self.kept[-1] in self.there)


TestPost = Post.TestCase
TestPost.settings = settings(max_examples=100, stateful_step_count=30)


def test_a_new_daemon_gets_the_latest_that_fit_once_each() -> None:
    outbox = Outbox(ROOM * BYTES)
    for seed in range(7):
        outbox.put(past_request(seed))
    got = []
    for lost in (False, True, False):
        if lost:
            outbox.start_over()
        while (upload := outbox.next()) is not None:
            outbox.delivered(upload.number)
            got.append((upload.number, upload.maybe_duplicate))
    assert got == [(number, again) for again in (False, True) for number in (3, 4, 5, 6)]


def test_a_request_beyond_the_budget_is_sent_all_the_same() -> None:
    outbox = Outbox(BYTES)
    outbox.put(past_request(1, tokens=50))
    upload = outbox.next()
    assert upload is not None and upload.trace.num_tokens == 50
