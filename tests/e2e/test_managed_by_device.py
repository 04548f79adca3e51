"""A device that manages its slots by itself, behind a real engine: the tokens and logprobs of unmodified vLLM.

The device is a virtual one, with numpy in place of the kernels that manage; those that compute are vLLM's for the CPU.
"""

from pathlib import Path

import pytest

from tests.e2e.engines import EngineServer
from tests.e2e.identity import ROUNDS

ENGINE = {"enforce_eager": True, "dtype": "bfloat16"}
LAYERS, EXPERTS = 8, 64
RECORD_BYTES = 3 * 192 * 64 * 2


@pytest.mark.parametrize(
    ("cache", "least", "most"),
    [pytest.param("12.6%", 4 * LAYERS, EXPERTS, id="least"), pytest.param("25%", 128, 128, id="quarter")],
)
def test_tokens_of_unmodified_vllm(
    tiny_moe: Path, plain: EngineServer, offloaded: EngineServer, cache: str, least: int, most: int
) -> None:
    """Decoding, prompts in chunks that pass through stages, and prompts that the prefix cache holds in part."""
    engine = ENGINE | {"additional_config": {"moe_offload": {"cache": cache, "daemon": "off"}}}
    answer = offloaded.run(tiny_moe, engine, ROUNDS, order=1, by_itself=True)
    assert answer["rounds"] == plain.run(tiny_moe, ENGINE, ROUNDS)["rounds"]
    (stats,) = answer["stats"]
    assert stats["device_managed_layers"] == stats["layers"] == LAYERS
    assert least <= stats["slots"] <= most and stats["slot_bytes"] == stats["slots"] * RECORD_BYTES
    assert stats["loads"] == LAYERS * EXPERTS, "every record is read into host memory, once"
    assert stats["host_hits"] == stats["misses"] > 0 and stats["hits"] > 0
    assert stats["copied_bytes"] - stats["misses"] * RECORD_BYTES >= 2 * LAYERS * EXPERTS * RECORD_BYTES, "stages"
