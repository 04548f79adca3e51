"""Traces on the wire: whole when they arrive, or refused."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.daemon.past import SHAPE, past_request, same
from vllm_moe_offload.ipc.protocol import PackedTrace
from vllm_moe_offload.ipc.trace_codec import pack_embedding, pack_trace, unpack_embedding, unpack_trace
from vllm_moe_offload.trace.trace import Trace, concat

GOOD = pack_trace(past_request(1))


@given(st.lists(st.tuples(st.integers(0, 2**32), st.integers(0, 6)), max_size=5), st.sampled_from([8, 256, 257, 1000]))
def test_traces_arrive_as_they_were(requests: list[tuple[int, int]], experts: int) -> None:
    shape = (SHAPE[0], experts, SHAPE[2])
    trace = concat([past_request(seed, tokens, experts=experts) for seed, tokens in requests], shape)
    arrived = unpack_trace(msgspec.msgpack.decode(msgspec.msgpack.encode(pack_trace(trace)), type=PackedTrace), shape)
    if not requests:
        trace = replace(trace, embeddings=None)
    assert same(arrived, trace) and arrived.shape == shape
    assert all(array.flags.owndata for array in (arrived.experts, arrived.weights))


def test_what_is_not_known_stays_unknown() -> None:
    bare = replace(past_request(1), tokens=None, phase=None, embeddings=None)
    assert same(unpack_trace(pack_trace(bare), SHAPE), bare)


def halves(*values: float) -> bytes:
    return np.array(values, "<f2").tobytes()


UNSOUND = {
    "no length": (msgspec.structs.replace(GOOD, lengths=b""), "cannot reshape"),
    "half a length": (msgspec.structs.replace(GOOD, lengths=b"\5\0"), "multiple of element size"),
    "negative length": (msgspec.structs.replace(GOOD, lengths=np.array([6, -1], "<i4").tobytes()), "fewer than no"),
    "a length beyond memory": (msgspec.structs.replace(GOOD, lengths=b"\xff\xff\xff\x7f" * 9), "cannot reshape"),
    "maps cut short": (msgspec.structs.replace(GOOD, experts=GOOD.experts[:-1]), "cannot reshape"),
    "expert out of range": (msgspec.structs.replace(GOOD, experts=b"\x08" + GOOD.experts[1:]), "names expert 8"),
    "expert twice": (msgspec.structs.replace(GOOD, experts=b"\1\1" + GOOD.experts[2:]), "an expert twice"),
    "weights not of one": (msgspec.structs.replace(GOOD, weights=halves(1, 1) + GOOD.weights[4:]), "sum to 1"),
    "negative weight": (msgspec.structs.replace(GOOD, weights=halves(2, -1) + GOOD.weights[4:]), "must be >= 0"),
    "no number": (msgspec.structs.replace(GOOD, weights=halves(np.nan, 1) + GOOD.weights[4:]), "holds NaN"),
    "too few tokens": (msgspec.structs.replace(GOOD, tokens=b"\0\0\0\0"), "cannot reshape"),
    "a third phase": (msgspec.structs.replace(GOOD, phase=b"\2" * 5), "field 'phase'"),
    "an embedding for nobody": (msgspec.structs.replace(GOOD, lengths=GOOD.lengths * 2), "cannot reshape"),
    "a loud embedding": (msgspec.structs.replace(GOOD, embeddings=halves(2, 0)), "longer than a unit"),
    "an endless embedding": (msgspec.structs.replace(GOOD, embeddings=halves(np.inf, 0)), "not finite"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_a_trace_that_cannot_be_is_refused_with_the_reason(case: str) -> None:
    packed, reason = UNSOUND[case]
    with pytest.raises(ValueError, match=reason):
        unpack_trace(packed, SHAPE)


@given(st.data())
def test_bytes_of_any_kind_are_a_sound_trace_or_refused(data: st.DataObject) -> None:
    fields = msgspec.structs.asdict(GOOD)
    for name in data.draw(st.sets(st.sampled_from(sorted(fields)), min_size=1)):
        old = fields[name]
        place = data.draw(st.integers(0, len(old) - 1))
        fields[name] = data.draw(
            st.one_of(
                st.binary(max_size=2 * len(old)),
                st.binary(min_size=1, max_size=4).map(lambda new: (old[:place] + new + old[place:])[: len(old)]),  # noqa: B023
                st.just(old * 2),
            )
        )
    try:
        trace = unpack_trace(PackedTrace(**fields), SHAPE)
    except ValueError:
        return
    check(trace)


def check(trace: Trace) -> None:
    """What everybody who reads a trace relies on."""
    assert trace.shape == SHAPE and trace.weights.shape == trace.experts.shape
    assert trace.offsets[0] == 0 and trace.offsets[-1] == trace.num_tokens and (np.diff(trace.offsets) >= 0).all()
    assert (trace.experts < SHAPE[1]).all() and (trace.experts[..., 0] != trace.experts[..., 1]).all()
    assert (np.abs(trace.weights.astype(np.float32).sum(axis=2) - 1) < 0.03).all()
    for column, length in ((trace.tokens, trace.num_tokens), (trace.phase, trace.num_tokens)):
        assert column is None or column.shape == (length,)
    if trace.embeddings is not None:
        assert trace.embeddings.shape[0] == trace.num_requests and np.isfinite(trace.embeddings).all()


@given(st.binary(max_size=64))
def test_a_meaning_is_none_or_a_unit_vector_or_refused(data: bytes) -> None:
    try:
        embedding = unpack_embedding(data)
    except ValueError:
        return
    assert embedding is None if not data else np.linalg.norm(embedding) <= 1.05
    assert pack_embedding(embedding) == data
