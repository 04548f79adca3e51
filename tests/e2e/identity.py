"""Promise 1: the tokens and logprobs of unmodified vLLM, for every model, quantization, budget and batch.

Every comparison also asserts that offloading engaged.
"""

import random
from typing import Any

from tests.e2e.engines import EngineServer
from tests.models import Checkpoint
from vllm_moe_offload.plan.checkpoint import read_folder
from vllm_moe_offload.plan.sizes import model_sizes

VOCABULARY = 512


def prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of 1 to 90 tokens; together more than one step of 256 takes, so that prefill is chunked."""
    draw = random.Random(seed)
    return [[draw.randrange(1, VOCABULARY) for _ in range(draw.randint(1, 90))] for _ in range(count)]


ROUNDS = [
    {"prompts": prompts(1, seed=1), "tokens": 24},
    {"prompts": prompts(16, seed=2), "tokens": 12},
    {"prompts": [prompts(1, seed=3)[0] + prompts(16, seed=2)[0][:64], *prompts(4, seed=2)], "tokens": 8},
]
"""Batch 1; batch 16; a batch that finds part of its prompts in the prefix cache."""


def budgets(checkpoint: Checkpoint) -> dict[str, int]:
    """Cache settings by the number of slots they must give: the minimum, a quarter, half, everything.

    Only everything where the kernel would round parts of a step otherwise than the whole.
    """
    experts = checkpoint.routed_layers * checkpoint.experts
    if checkpoint.rounded_by_batch:
        return {"100%": experts}
    minimum = 100 * (checkpoint.top_k + 0.01) / experts
    return {f"{minimum:.3f}%": checkpoint.top_k, "25%": experts // 4, "50%": experts // 2, "100%": experts}


def check_engaged(stats: dict[str, Any], checkpoint: Checkpoint, slots: int) -> None:
    """Offloading really happened: all layers, as many slots as the budget gives, and loads where they must be."""
    experts = checkpoint.routed_layers * checkpoint.experts
    assert stats["layers"] == checkpoint.routed_layers
    assert stats["slots"] == slots
    assert stats["slot_bytes"] * experts == stats["expert_bytes"] * slots
    assert stats["expert_bytes"] == model_sizes(read_folder(checkpoint.path), on_cpu=True).expert_bytes
    assert stats["loads"] >= slots and stats["failed_loads"] == 0
    assert (stats["misses"] > 0) == (slots < experts)
    if slots == checkpoint.top_k:
        assert stats["waves"] > 0


def compare(
    checkpoint: Checkpoint, plain: EngineServer, offloaded: EngineServer, settings: dict[str, int], **engine: Any
) -> None:
    arguments = checkpoint.engine_args | engine
    expected = plain.run(checkpoint.path, arguments, ROUNDS)["rounds"]
    for cache, slots in settings.items():
        answer = offloaded.run(
            checkpoint.path, arguments | {"additional_config": {"moe_offload": {"cache": cache}}}, ROUNDS
        )
        assert answer["rounds"] == expected, f"{checkpoint.path.name} with cache {cache}"
        check_engaged(answer["stats"][0], checkpoint, slots)
