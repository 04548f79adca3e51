"""``trace``: every token of every request, routed as the model itself routes it, in a file that replay reads."""

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.e2e.engines import EngineServer
from vllm_moe_offload.trace.trace import PREFILL, Trace
from vllm_moe_offload.trace.trace_file import read_trace


def prompts(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1, 8192) for _ in range(draw.randint(1, 90))] for _ in range(count)]


ROUNDS = [{"prompts": prompts(1, seed=1), "tokens": 24}, {"prompts": prompts(9, seed=2), "tokens": 12}]
"""Together the prompts of the second round are more than one step of 256 takes, so that prefill is chunked."""


def record(
    run: Callable[..., dict[str, Any]], model: Path, file: Path, rounds: list[dict[str, Any]] = ROUNDS, **settings: Any
) -> tuple[Trace, list[list[int]]]:
    """The trace of an engine, and what its requests were: prompt and generated tokens."""
    engine = {"enforce_eager": True, "dtype": "bfloat16", "enable_prefix_caching": False}
    offload = {"moe_offload": {"cache": "25%", "trace": str(file)} | settings}
    answer = run(model, engine | {"additional_config": offload}, rounds)
    texts = [
        prompt + output["tokens"]
        for given, made in zip(rounds, answer["rounds"], strict=True)
        for prompt, output in zip(given["prompts"], made, strict=True)
    ]
    return read_trace(file), texts


def by_tokens(trace: Trace) -> dict[tuple[int, ...], Trace]:
    assert trace.tokens is not None
    return {tuple(request.tokens.tolist()): request for request in trace.requests()}  # type: ignore[union-attr]


def test_every_token_that_was_read_is_in_the_trace(tiny_moe: Path, offloaded: EngineServer, tmp_path: Path) -> None:
    trace, texts = record(offloaded.run, tiny_moe, tmp_path / "engine.trace")
    assert trace.shape == (8, 64, 4) and trace.model == "tiny-moe" and trace.fingerprint
    recorded = by_tokens(trace)
    assert set(recorded) == {tuple(text[:-1]) for text in texts}, "the last token of an answer is never read"
    lengths = [len(prompt) for given in ROUNDS for prompt in given["prompts"]]
    for text, length in zip(texts, lengths, strict=True):
        phase = recorded[tuple(text[:-1])].phase
        assert phase is not None and (phase == PREFILL).tolist() == [i < length for i in range(len(text) - 1)]
    assert trace.embeddings is not None and trace.embeddings.shape == (len(texts), 192)
    np.testing.assert_allclose(np.linalg.norm(trace.embeddings.astype(np.float32), axis=1), 1, atol=0.01)


def test_the_trace_is_what_the_routers_say(tiny_moe: Path, offloaded: EngineServer, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trace, _ = record(offloaded.run, tiny_moe, tmp_path / "engine.trace")
    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.bfloat16)
    agreed, weights_apart = [], []
    for request in trace.requests():
        with torch.no_grad():
            logits = model(torch.tensor(request.tokens)[None].long(), output_router_logits=True).router_logits
        shares = torch.stack(logits).float().softmax(dim=-1)
        top = shares.topk(4, dim=-1)
        for layer in range(8):
            expected, recorded = top.indices[layer].numpy(), request.experts[:, layer]
            same = (np.sort(expected) == np.sort(recorded)).all(axis=1)
            agreed.append(same)
            chosen = np.take_along_axis(shares[layer].numpy(), recorded.astype(np.int64), axis=1)
            chosen /= chosen.sum(axis=1, keepdims=True)
            weights_apart.append(np.abs(chosen - request.weights[:, layer])[same].max(initial=0))
    assert np.concatenate(agreed).mean() > 0.9, "bfloat16 rounds differently elsewhere, but not that often"
    assert np.median(weights_apart) < 0.05


FEW: list[dict[str, Any]] = [
    {"prompts": prompts(1, seed=3), "tokens": 12},
    {"prompts": prompts(3, seed=5), "tokens": 6},
]


@pytest.fixture(scope="module")
def expected(tiny_moe: Path, offloaded: EngineServer, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return record(offloaded.run, tiny_moe, tmp_path_factory.mktemp("expected") / "engine.trace", FEW)[0]


@pytest.mark.parametrize("settings", [{"cache": "100%"}, {"cache": "2%"}, {"cache": "50%", "policy": "lru"}])
def test_residency_does_not_show_in_the_trace(
    tiny_moe: Path, expected: Trace, offloaded: EngineServer, tmp_path: Path, settings: dict[str, str]
) -> None:
    trace, _ = record(offloaded.run, tiny_moe, tmp_path / "engine.trace", FEW, **settings)
    check_same(trace, expected)


def test_a_device_that_manages_its_slots_by_itself_leaves_the_same_trace(
    tiny_moe: Path, expected: Trace, offloaded: EngineServer, tmp_path: Path
) -> None:
    """Routing comes from it late, and weights as float16, so that shares are rounded twice."""
    server = functools.partial(offloaded.run, order=5, by_itself=True)
    trace, _ = record(server, tiny_moe, tmp_path / "engine.trace", FEW, daemon="off")
    check_same(trace, expected, rounding=2**-9)


def check_same(trace: Trace, expected: Trace, rounding: float = 0.0) -> None:
    """The same requests, whatever the order in which they ended; weights may differ by that share."""
    recorded, others = by_tokens(trace), by_tokens(expected)
    assert recorded.keys() == others.keys() and trace.num_requests == expected.num_requests
    for tokens, request in recorded.items():
        other = others[tokens]
        np.testing.assert_array_equal(request.phase, other.phase)
        np.testing.assert_array_equal(request.experts, other.experts)
        np.testing.assert_array_equal(request.embeddings, other.embeddings)
        np.testing.assert_allclose(request.weights.astype(float), other.weights.astype(float), rtol=rounding)


def test_a_restart_continues_the_file_of_its_model_and_refuses_any_other(
    tiny_moe: Path, offloaded: EngineServer, tmp_path: Path
) -> None:
    rounds = [{"prompts": prompts(2, seed=4), "tokens": 4}]
    file = tmp_path / "engine.trace"
    record(offloaded.run, tiny_moe, file, rounds)
    trace, _ = record(offloaded.run, tiny_moe, file, rounds)
    assert trace.num_requests == 4
    file.write_bytes(b"something else")
    with pytest.raises(RuntimeError, match=r"engine\.trace: it is no trace that can be continued"):
        record(offloaded.run, tiny_moe, file, rounds)
    assert file.read_bytes() == b"something else"
