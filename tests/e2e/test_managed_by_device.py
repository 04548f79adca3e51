"""A device that manages its slots by itself, behind a real engine: tokens and logprobs of unmodified vLLM, and a trace.

The device is a virtual one, with numpy in place of the kernels that manage; those that compute are vLLM's for the CPU.
"""

from pathlib import Path
from typing import Any

from tests.e2e.engines import EngineServer
from tests.e2e.identity import ROUNDS
from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import read_trace

ENGINE = {"enforce_eager": True, "dtype": "bfloat16"}
LAYERS, EXPERTS = 8, 64
RECORD_BYTES = 3 * 192 * 64 * 2


def test_tokens_of_unmodified_vllm(
    tiny_moe: Path, plain: EngineServer, offloaded: EngineServer, tmp_path: Path
) -> None:
    """Decoding, prompts in chunks that pass through stages, and prompts that the prefix cache holds in part."""
    expected = plain.run(tiny_moe, ENGINE, ROUNDS)["rounds"]
    for cache, least, most in (("12.6%", 4 * LAYERS, EXPERTS), ("50%", LAYERS * EXPERTS // 2, LAYERS * EXPERTS // 2)):
        trace = tmp_path / f"{most}.trace"
        offload = {"cache": cache, "daemon": "off", "trace": str(trace), "history": str(tmp_path / "history")}
        engine = ENGINE | {"additional_config": {"moe_offload": offload}}
        answer = offloaded.run(tiny_moe, engine, ROUNDS, order=1, by_itself=True)
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
        copied_to_stages = stats["copied_bytes"] - stats["misses"] * RECORD_BYTES
        assert copied_to_stages >= 2 * LAYERS * EXPERTS * RECORD_BYTES


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
