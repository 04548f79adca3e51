"""A device that manages its slots by itself, behind a real engine: tokens and logprobs of unmodified vLLM, and a trace.

The device is a virtual one, with numpy in place of the kernels that manage and predict; those that compute are vLLM's
for the CPU.
"""

from pathlib import Path
from typing import Any

import numpy as np

from tests.e2e.engines import EngineServer
from tests.e2e.identity import ROUNDS
from vllm_moe_offload.learning.heads_file import HEADS_FILE, write_heads
from vllm_moe_offload.predict.network import NetworkSize, Parameters
from vllm_moe_offload.predict.token_vectors import ModelVectors
from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import read_trace

ENGINE = {"enforce_eager": True, "dtype": "bfloat16"}
LAYERS, EXPERTS, TOP_K = 8, 64, 4
HIDDEN_SIZE = 192
RECORD_BYTES = 3 * HIDDEN_SIZE * 64 * 2


def test_tokens_of_unmodified_vllm(
    tiny_moe: Path, plain: EngineServer, offloaded: EngineServer, tmp_path: Path
) -> None:
    """Decoding, prompts in chunks that pass through stages, and prompts that the prefix cache holds in part.

    What the first engine has served, the second one warms windows by, and predicts with heads that were put beside it.
    """
    expected = plain.run(tiny_moe, ENGINE, ROUNDS)["rounds"]
    history = tmp_path / "history"
    for cache, least, most in (
        ("12.6%", TOP_K * LAYERS, EXPERTS),
        ("50%", LAYERS * EXPERTS // 2, LAYERS * EXPERTS // 2),
    ):
        trace = tmp_path / f"{most}.trace"
        offload = {"cache": cache, "daemon": "off", "trace": str(trace), "history": str(history)}
        engine = ENGINE | {"additional_config": {"moe_offload": offload}}
        answer = offloaded.run(tiny_moe, engine, ROUNDS, every_step=True, order=1, by_itself=True)
        assert answer["rounds"] == expected
        check_trace(read_trace(trace), expected)
        (stats,) = answer["stats"]
        assert stats["device_managed_layers"] == stats["layers"] == LAYERS
        assert least <= stats["slots"] <= most and stats["slot_bytes"] == stats["slots"] * RECORD_BYTES
        assert stats["loads"] == LAYERS * EXPERTS, "every record is read into host memory, once"
        assert stats["host_hits"] == stats["misses"] > 0 and stats["hits"] > 0
        assert stats["prediction_failures"] == stats["unsound_tokens"] == 0
        assert (stats["warmed"] > 0) == (cache == "50%"), (
            "by the first engine's history, where stages leave windows alone"
        )
        assert (stats["prefetches"] > 0) == (cache == "50%"), "a new model has no heads"
        assert stats["prefetches"] >= stats["prefetch_useful"] + stats["prefetch_wasted"]
        copied_to_stages = stats["copied_bytes"] - (stats["misses"] + stats["prefetches"]) * RECORD_BYTES
        assert copied_to_stages >= 2 * LAYERS * EXPERTS * RECORD_BYTES
        if not stats["prefetches"]:
            write_heads_of_same_token(*history.glob("*/history.npz"))
    assert stats["prefetch_useful"] > stats["prefetches"] / 3, "chance gives a sixteenth"


def write_heads_of_same_token(history: Path) -> None:
    """Heads that expect what the same token used last time, as ``history`` has it; training takes longer than tests."""
    parameters = Parameters(NetworkSize(LAYERS, EXPERTS, HIDDEN_SIZE))
    each = np.arange(EXPERTS)
    parameters.views["C"][:, 6 * EXPERTS + each, each] = 1
    parameters.views["O"][:, each, each] = 6
    parameters.views["c"][:] = -3
    vectors = ModelVectors(lambda tokens: np.zeros((len(tokens), HIDDEN_SIZE), np.float32), HIDDEN_SIZE)
    past = read_trace(history).requests()
    write_heads(history.with_name(HEADS_FILE), history.parent.name, parameters, vectors, past)


def check_trace(trace: Trace, rounds: list[list[dict[str, Any]]]) -> None:
    """Every token that a request has read is there, but for what the prefix cache held of its prompt."""
    assert trace.shape == (LAYERS, EXPERTS, 4) and trace.tokens is not None
    texts = [
        (prompt + output["tokens"])[:-1]
        for given, made in zip(ROUNDS, rounds, strict=True)
        for prompt, output in zip(given["prompts"], made, strict=True)
    ]
    traced = [request.tokens.tolist() for request in trace.requests()]  # type: ignore[union-attr]
    assert len(traced) == len(texts)
    for tokens in traced:
        text = next(text for text in texts if text[-len(tokens) :] == tokens)
        texts.remove(text)
    first = [len(tokens) for tokens in traced[: 1 + 16]]
    assert sorted(first) == sorted(len(p) + r["tokens"] - 1 for r in ROUNDS[:2] for p in r["prompts"])
