"""The ``gate`` predictor: the routers it finds are the model's, for every architecture, and tokens stay the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.engines import EngineServer
from tests.e2e.live_engine import LiveEngine
from tests.models import build
from tests.models.architectures import ARCHITECTURES

ROUTES_IN_TRANSFORMERS = "hunyuan-moe"
PROMPTS = [[7, 99, 300, 12, 45], [5, 6], list(range(20, 60))]
SETTINGS = {"cache": "50%", "predictor": "gate", "history": "off"}


def watch_own_routers(worker: Any) -> None:
    """Note how many of a layer's choices its own router, as the predictor knows it, would have made."""
    from vllm_moe_offload.integration.method import OffloadedMoEMethod

    model = worker.model_runner.get_model()
    predictor, runtime = model.moe_offload._history.predictor, model.moe_offload.runtime
    observe = runtime.observe
    shown: list[np.ndarray] = []
    worker.foreseen = worker.chosen = 0

    def look(read: Any) -> None:
        shown.append(read())
        predictor.note_router_input(read)

    def compare(layer: int, experts: np.ndarray, weights: np.ndarray) -> None:
        margins = predictor.routers[layer].margins(shown.pop(), predictor.shape.top_k)
        worker.foreseen += int((np.take_along_axis(margins, experts.astype(np.int64), axis=1) >= 0).sum())
        worker.chosen += experts.size
        observe(layer, experts, weights)

    runtime.observe = compare
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, OffloadedMoEMethod):
            method.show = look


def own_choices(worker: Any) -> tuple[int, int]:
    return worker.foreseen, worker.chosen


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveEngine]:
    live = LiveEngine(tmp_path_factory.mktemp("gate") / "log")
    yield live
    live.close()


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != ROUTES_IN_TRANSFORMERS])
def test_every_router_is_found_and_chooses_as_the_model_does(name: str, engine: LiveEngine, tmp_path: Path) -> None:
    checkpoint = build(name, tmp_path)
    engine.start(checkpoint.path, checkpoint.engine_args, **SETTINGS)
    engine.call(watch_own_routers)
    engine.generate(PROMPTS, tokens=6)
    foreseen, chosen = engine.call(own_choices)
    engine.stop()
    assert chosen >= 52 * checkpoint.top_k * checkpoint.routed_layers
    assert foreseen / chosen > 0.98, "ties in half precision aside, these are the same routers"


def test_tokens_stay_the_same_and_guesses_are_made(
    tiny_moe: Path, plain: EngineServer, offloaded: EngineServer
) -> None:
    arguments = {"enforce_eager": True, "dtype": "bfloat16"}
    rounds = [{"prompts": PROMPTS[:1], "tokens": 40}, {"prompts": PROMPTS, "tokens": 12}]
    answer = offloaded.run(
        tiny_moe, arguments | {"additional_config": {"moe_offload": SETTINGS | {"cache": "25%"}}}, rounds
    )
    assert answer["rounds"] == plain.run(tiny_moe, arguments, rounds)["rounds"]
    stats = answer["stats"][0]
    assert stats["prefetches"] > 0 and stats["prefetch_useful"] + stats["prefetch_late"] > 0
