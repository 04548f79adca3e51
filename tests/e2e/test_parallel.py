"""Two ranks on one host: every rank has its own records, and the tokens are plain vLLM's."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.engines import EngineServer
from tests.models import build

CORES = sorted(os.sched_getaffinity(0))
ONE_CORE_EACH = {"VLLM_CPU_OMP_THREADS_BIND": f"{CORES[0]}|{CORES[-1]}"}
ROUNDS = [{"prompts": [[7, 99, 300, 12, 45], [5, 6], list(range(20, 60))], "tokens": 12}]
ENGINE = {"enforce_eager": True, "tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EngineServer, EngineServer]]:
    folder = tmp_path_factory.mktemp("parallel")
    plain = EngineServer(folder / "plain", VLLM_PLUGINS="", **ONE_CORE_EACH)
    offloaded = EngineServer(folder / "offloaded", **ONE_CORE_EACH)
    yield plain, offloaded
    plain.close()
    offloaded.close()


def stores() -> set[str]:
    root = Path(os.environ["VLLM_MOE_OFFLOAD_STORE_ROOT"])
    return {path.name for path in root.iterdir() if path.is_dir()} if root.exists() else set()


def test_tensor_parallel(servers: tuple[EngineServer, EngineServer], tmp_path: Path) -> None:
    plain, offloaded = servers
    checkpoint = build("qwen3-moe", tmp_path)
    arguments = checkpoint.engine_args | ENGINE
    before = stores()
    expected = plain.run(checkpoint.path, arguments, ROUNDS)["rounds"]
    answer = offloaded.run(
        checkpoint.path, arguments | {"additional_config": {"moe_offload": {"cache": "25%"}}}, ROUNDS
    )
    assert answer["rounds"] == expected
    assert len(stores() - before) == 2, "the ranks shared a store"
    assert len(answer["stats"]) == 2
    for rank in answer["stats"]:
        assert rank["layers"] == checkpoint.routed_layers and rank["misses"] > 0


@pytest.mark.parametrize("share", [0.5, 1])
def test_expert_parallel(servers: tuple[EngineServer, EngineServer], tmp_path: Path, share: float) -> None:
    """vLLM 0.32's CPU kernels crash on the choices of other ranks, so the reference is plain vLLM on one rank: partial
    sums are then rounded in another order, which moves logprobs a little and tokens, in this model, not."""
    plain, offloaded = servers
    checkpoint = build("qwen3-moe", tmp_path)
    settings = {"moe_offload": {"cache": f"{share:.0%}"}}
    one_rank = checkpoint.engine_args | {"enforce_eager": True}
    expected = plain.run(checkpoint.path, one_rank, ROUNDS)["rounds"][0]
    answer = offloaded.run(
        checkpoint.path,
        checkpoint.engine_args | ENGINE | {"enable_expert_parallel": True, "additional_config": settings},
        ROUNDS,
    )
    for ours, theirs in zip(answer["rounds"][0], expected, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for our_step, their_step, token in zip(ours["logprobs"], theirs["logprobs"], ours["tokens"], strict=True):
            assert our_step[str(token)] == pytest.approx(their_step[str(token)], abs=0.3)
    experts = checkpoint.routed_layers * checkpoint.experts
    for rank in answer["stats"]:
        assert rank["slots"] == int(experts // 2 * share) and rank["loads"] > 0
