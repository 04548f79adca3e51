import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from vllm_moe_offload.errors import TraceError
from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import read_trace, write_trace


def make_trace(tokens_per_request=(3, 0, 5), layers=4, experts=8, top_k=2, seed=0) -> Trace:
    rng = np.random.default_rng(seed)
    tokens = sum(tokens_per_request)
    chosen = rng.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k].astype(np.uint8)
    weights = rng.random((tokens, layers, top_k)) + 0.1
    requests = len(tokens_per_request)
    embeddings = rng.standard_normal((requests, 6))
    return Trace(
        experts=chosen,
        weights=(weights / weights.sum(axis=2, keepdims=True)).astype(np.float16),
        offsets=np.concatenate([[0], np.cumsum(tokens_per_request)]).astype(np.int64),
        num_experts=experts,
        model="tests/tiny",
        fingerprint="f" * 32,
        tokens=rng.integers(0, 50, tokens).astype(np.int32),
        phase=rng.integers(0, 2, tokens).astype(np.uint8),
        embeddings=(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float16),
        group=np.array([f"group {i}" for i in range(requests)]),
        repetitive=np.array([i == 2 for i in range(requests)]),
    )


def fields_of(trace: Trace) -> dict:
    names = ("experts", "weights", "offsets", "num_experts", "tokens", "phase", "embeddings", "group", "repetitive")
    return {name: getattr(trace, name) for name in names}


def same(left: Trace, right: Trace) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in left.__dataclass_fields__)


@pytest.mark.parametrize("compress", [True, False])
def test_a_trace_survives_the_disk(tmp_path, compress):
    trace = make_trace()
    write_trace(tmp_path / "t.npz", trace, compress)
    assert same(read_trace(tmp_path / "t.npz"), trace)
    assert [path.name for path in tmp_path.iterdir()] == ["t.npz"]


def test_optional_fields_may_be_absent(tmp_path):
    bare = {name: fields_of(make_trace())[name] for name in ("experts", "weights", "offsets", "num_experts")}
    np.savez(tmp_path / "t.npz", **bare)
    trace = read_trace(tmp_path / "t.npz")
    assert trace.tokens is None and trace.embeddings is None and trace.model == ""
    assert trace.shape == (4, 8, 2) and trace.num_requests == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts": None}, "'experts' is missing"),
        ({"offsets": None}, "'offsets' is missing"),
        ({"experts": np.zeros((8, 4, 2), np.int64)}, "'experts' must be uint8 or uint16"),
        ({"experts": np.zeros((8, 4, 2), np.uint8)}, "'experts' names an expert twice"),
        ({"num_experts": 3}, "'num_experts' is 3"),
        ({"num_experts": np.array([8, 8])}, "'num_experts' must be one integer"),
        ({"weights": np.ones((8, 4, 2), np.float16)}, "'weights' must be >= 0 and sum to 1"),
        ({"weights": np.ones((8, 4, 3), np.float16)}, "'weights' must be floats of the shape of 'experts'"),
        ({"offsets": np.array([0, 3, 2, 8])}, "'offsets' must rise from 0"),
        ({"offsets": np.array([0, 3, 7])}, "'offsets' must rise from 0"),
        ({"tokens": np.zeros(7, np.int32)}, r"'tokens' must have shape \(8,\)"),
        ({"phase": np.full(8, 2)}, "'phase' must hold 0"),
        ({"embeddings": np.zeros((2, 6), np.float16)}, "'embeddings' must be floats"),
        ({"embeddings": np.full((3, 6), np.nan, np.float16)}, "'embeddings' holds values that are not finite"),
        ({"group": np.zeros(3)}, "'group' must have shape"),
        ({"weights": np.full((8, 4, 2), np.nan, np.float16)}, "'weights' holds NaN"),
        ({"version": 2}, "newer version 2, this release reads up to 1; update"),
        ({"version": 2, "experts": None}, "newer version 2"),
        ({"version": 0}, "version is 0"),
        ({"tokens": np.array([None] * 8)}, "'tokens' cannot be read"),
    ],
)
def test_errors_name_the_file_and_the_field(tmp_path, change, words):
    fields = fields_of(make_trace()) | change
    path = tmp_path / "broken.npz"
    np.savez(path, **{name: value for name, value in fields.items() if value is not None})
    with pytest.raises(TraceError, match=f"{re.escape(str(path))}.*{words}"):
        read_trace(path)


def test_unknown_fields_are_left_alone_but_not_in_silence(tmp_path):
    np.savez(tmp_path / "t.npz", **fields_of(make_trace()), temperature=0.7)
    with pytest.warns(UserWarning, match="temperature"):
        assert read_trace(tmp_path / "t.npz").num_tokens == 8


NPY = b"\x93NUMPY\x01\x00"


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 cut short", NPY])
def test_files_that_are_no_traces(tmp_path, content):
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"t\.npz: .*not an npz, or cut short"):
        read_trace(path)
    with pytest.raises(TraceError, match="no such trace"):
        read_trace(tmp_path / "absent.npz")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write_trace(tmp_path / "whole.npz", make_trace())
    whole = (tmp_path / "whole.npz").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "cut.npz").write_bytes(whole[:length])
        with pytest.raises(TraceError):
            read_trace(tmp_path / "cut.npz")


def test_an_array_on_its_own_is_no_trace(tmp_path):
    np.save(tmp_path / "experts.npy", make_trace().experts)
    with pytest.raises(TraceError, match="not an npz, or cut short"):
        read_trace(tmp_path / "experts.npy")
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path)


@pytest.mark.parametrize("compress", [True, False])
def test_a_damaged_file_is_refused_by_field(tmp_path, compress):
    path = tmp_path / "t.npz"
    write_trace(path, make_trace((30, 40)), compress)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        middle = archive.getinfo("weights.npy").header_offset + 300
    for byte in range(middle, middle + 100, 7):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 0xFF]) + whole[byte + 1 :])
        with pytest.raises(TraceError, match="'weights' cannot be read"):
            read_trace(path)


def test_select_and_request_agree():
    trace = make_trace((3, 2, 5))
    for index in range(3):
        assert same(trace.request(index), trace.select([index]))
    assert same(trace.select([2, 0]).request(1), trace.request(0))
    assert [request.num_tokens for request in trace.requests()] == [3, 2, 5]


def test_repetitive_requests_can_be_left_out():
    trace = make_trace()
    assert trace.without_repetitive().num_requests == 2
    assert replace(trace, repetitive=None).without_repetitive().num_requests == 3
