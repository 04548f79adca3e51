from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.replay.schedule import PREFILL_CHUNK, steps
from vllm_moe_offload.trace.trace import Trace


def trace_of(lengths, phase=None) -> Trace:
    tokens = sum(lengths)
    experts = np.broadcast_to(np.array([0, 1], np.uint8), (tokens, 3, 2))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Trace(experts, np.full((tokens, 3, 2), 0.5, np.float16), offsets, 4, phase=phase)


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=8), st.integers(1, 4))
def test_every_token_runs_once_in_order_and_no_more_requests_than_seats(lengths, batch):
    trace = trace_of(lengths)
    done = list(steps(trace, batch))
    assert sorted(np.concatenate(done).tolist() if done else []) == list(range(trace.num_tokens))
    request_of = np.repeat(np.arange(len(lengths)), lengths)
    position = {}
    for rows in done:
        requests = request_of[rows]
        assert len(set(requests.tolist())) == len(rows) <= batch
        for row, request in zip(rows.tolist(), requests.tolist(), strict=True):
            assert position.get(request, -1) < row
            position[request] = row


def test_prefill_runs_in_chunks_and_decode_token_by_token():
    lengths = [PREFILL_CHUNK + 10]
    phase = np.ones(lengths[0], np.uint8)
    phase[-3:] = 0
    sizes = [len(rows) for rows in steps(trace_of(lengths, phase))]
    assert sizes == [PREFILL_CHUNK, 7, 1, 1, 1]
    assert [len(rows) for rows in steps(replace(trace_of(lengths, phase), phase=None))][:3] == [1, 1, 1]
