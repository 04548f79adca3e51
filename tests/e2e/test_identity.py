"""Same tokens and logprobs as unmodified vLLM, without torch.compile; ``docs/support.md`` tells the outcome."""

from pathlib import Path

from tests.e2e.engines import EngineServer
from tests.e2e.identity import ROUNDS, budgets, compare
from tests.models import Checkpoint


def test_eager(checkpoint: Checkpoint, plain: EngineServer, offloaded: EngineServer) -> None:
    compare(checkpoint, plain, offloaded, budgets(checkpoint), enforce_eager=True)


def test_the_bundled_model_with_every_policy(tiny_moe: Path, plain: EngineServer, offloaded: EngineServer) -> None:
    engine = {"enforce_eager": True, "dtype": "bfloat16"}
    expected = plain.run(tiny_moe, engine, ROUNDS)["rounds"]
    loads = {}
    for policy in ("lru", "lfu", "least-stale"):
        settings = {"moe_offload": {"cache": "25%", "policy": policy}}
        answer = offloaded.run(tiny_moe, engine | {"additional_config": settings}, ROUNDS)
        assert answer["rounds"] == expected
        loads[policy] = answer["stats"][0]["loads"]
    assert len(set(loads.values())) == 3, "the policies made the same decisions"
