"""Same tokens and logprobs as unmodified vLLM, with torch.compile; ``docs/support.md`` tells the outcome."""

from tests.e2e.engines import EngineServer
from tests.e2e.identity import budgets, compare
from tests.models import Checkpoint


def test_compiled(checkpoint: Checkpoint, plain: EngineServer, offloaded: EngineServer) -> None:
    smallest, *_, largest = budgets(checkpoint).items()
    compare(checkpoint, plain, offloaded, dict((smallest, largest)))
