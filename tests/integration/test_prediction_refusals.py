"""What prediction cannot work with ends a start only where somebody asked for prediction, or for a trace."""

import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_moe_offload.config import OffloadConfig
from vllm_moe_offload.errors import UnsupportedError


def engine(adaptive: bool = False, context_parallel: int = 1) -> Any:
    """As much of vLLM's configuration as is looked at first; both of these want CUDA."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(enable_adaptive_verification=True) if adaptive else None,
        parallel_config=SimpleNamespace(prefill_context_parallel_size=context_parallel),
    )


def layers(*experts: int) -> Any:
    return {
        f"layer{number}": (None, SimpleNamespace(moe=SimpleNamespace(num_logical_experts=count, experts_per_token=2)))
        for number, count in enumerate(experts)
    }


CANNOT = [
    (engine(), layers(8, 16), r"MoE layers differ in experts and choices \(\[\(8, 2\), \(16, 2\)\]\)"),
    (engine(adaptive=True), layers(8, 8), "adaptive verification, .* start without it"),
    (engine(context_parallel=2), layers(8, 8), "prefill context parallelism, .* start without it"),
]


@pytest.mark.parametrize(("vllm_config", "moe_layers", "reason"), CANNOT)
@pytest.mark.parametrize("settings", [{"predictor": "history"}, {"predictor": "gate"}, {"trace": "a.trace"}])
def test_what_was_asked_for_is_refused(
    vllm_config: Any, moe_layers: Any, reason: str, settings: dict[str, str]
) -> None:
    from vllm_moe_offload.integration.prediction import build_prediction

    config = OffloadConfig.from_mapping(settings, "here")
    with pytest.raises(UnsupportedError, match=reason):
        build_prediction(vllm_config, config, None, moe_layers, None, set(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("vllm_config", "moe_layers", "reason"), CANNOT)
def test_what_is_merely_the_default_is_left_out_and_the_log_says_why(
    vllm_config: Any, moe_layers: Any, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_moe_offload.integration.prediction import build_prediction

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    config = OffloadConfig.from_mapping({"cache": "25%"}, "here")
    assert build_prediction(vllm_config, config, None, moe_layers, None, set(), None) is None  # type: ignore[arg-type]
    (said,) = {record.getMessage() for record in caplog.records}
    assert re.search(f"serving without prediction: .*{reason}", said)
