"""Same tokens and logprobs as unmodified vLLM, with torch.compile; ``docs/support.md`` tells the outcome."""

import pytest

from tests.e2e.engines import EngineServer
from tests.e2e.identity import budgets, compare
from tests.models import Checkpoint

ALIKE = ("qwen2-moe", "olmoe", "deepseek-v2", "granite-moe", "hunyuan-moe")
"""Their graphs around the experts are those of others; eager, all of them are always compared."""


def test_compiled(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, plain: EngineServer, offloaded: EngineServer
) -> None:
    if request.node.callspec.params["checkpoint"] in ALIKE and not request.config.getoption("exhaustive"):
        pytest.skip("its kind is compiled with another model; --exhaustive compiles it too")
    settings = list(budgets(checkpoint).items())
    compare(checkpoint, plain, offloaded, dict((settings[0], settings[-1])))
