"""vLLM's CPU platform with what its CUDA platform has by default: asynchronous scheduling and the V2 model runner.

It switches off the one and lacks Triton for the other; the V2 runner's kernels run in Triton's interpreter here.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def schedule_asynchronously() -> None:
    """For the next engine of this process."""
    from vllm.platforms.cpu import CpuPlatform

    check: Callable[..., None] = CpuPlatform.check_and_update_config.__func__

    def check_and_keep(cls: type, vllm_config: Any) -> None:
        asynchronous = vllm_config.scheduler_config.async_scheduling
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = asynchronous

    CpuPlatform.check_and_update_config = classmethod(check_and_keep)


def use_v2_runner() -> None:
    """For all engines of this process, which has imported neither Triton nor vLLM yet."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))


def in_force(worker: Any) -> tuple[bool, str]:
    """Whether an engine schedules asynchronously, and the module of its model runner."""
    return worker.vllm_config.scheduler_config.async_scheduling, type(worker.model_runner).__module__
