"""What cannot be offloaded on GPUs is refused before a worker starts, by name and with the way out."""

from pathlib import Path
from typing import Any

import pytest

from vllm_moe_offload.errors import UnsupportedError
from vllm_moe_offload.integration.support import refuse_unsupported

OFF = "or switch moe-offload off"


@pytest.fixture
def vllm_config(tiny_moe: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(str(tiny_moe)).create_engine_config()


@pytest.mark.parametrize(
    ("config", "field", "value", "said"),
    [
        ("parallel_config", "enable_dbo", True, "microbatches that run at the same time (--enable-dbo, --ubatch-size)"),
        ("parallel_config", "ubatch_size", 2, "microbatches that run at the same time (--enable-dbo, --ubatch-size)"),
        ("parallel_config", "enable_eplb", True, "EPLB (--enable-eplb) and redundant experts"),
        ("parallel_config", "data_parallel_size", 2, "data parallelism (--data-parallel-size)"),
        ("model_config", "enable_sleep_mode", True, "sleep mode (--enable-sleep-mode)"),
    ],
)
def test_a_feature_that_does_not_work_on_gpus_is_named(
    gpu: Any, vllm_config: Any, config: str, field: str, value: Any, said: str
) -> None:
    setattr(getattr(vllm_config, config), field, value)
    with pytest.raises(UnsupportedError) as error:
        refuse_unsupported(vllm_config)
    assert f"does not work with {said}: " in str(error.value) and OFF in str(error.value)


def test_kernels_of_aiter_are_refused_unless_they_are_switched_off(
    gpu: Any, vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.rocm = True
    monkeypatch.setenv("VLLM_ROCM_USE_AITER", "1")
    with pytest.raises(UnsupportedError, match=r"AITER's expert kernels .*: set VLLM_ROCM_USE_AITER_MOE=0"):
        refuse_unsupported(vllm_config)
    monkeypatch.setenv("VLLM_ROCM_USE_AITER_MOE", "0")
    refuse_unsupported(vllm_config)


def test_platforms_are_cpus_and_gpus_of_cuda_and_rocm(
    gpu: Any, vllm_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_config.parallel_config.enable_expert_parallel = True
    refuse_unsupported(vllm_config)
    monkeypatch.setattr(gpu, "device_name", "xpu")
    monkeypatch.setattr(gpu, "is_cuda_alike", lambda: False)
    with pytest.raises(UnsupportedError, match="the xpu platform: run it on vLLM's CPU, CUDA or ROCm platform"):
        refuse_unsupported(vllm_config)
