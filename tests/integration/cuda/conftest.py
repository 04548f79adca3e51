"""This machine taken for one with a GPU by the parts of the integration that only ask the platform."""

from typing import Any

import pytest


class Gpu:
    """Answers what the integration asks vLLM's platform."""

    device_type, device_name = "cuda", "cuda"
    rocm = False
    capability = (9, 0)

    def is_cpu(self) -> bool:
        return False

    def is_cuda_alike(self) -> bool:
        return True

    def is_rocm(self) -> bool:
        return self.rocm

    def get_device_capability(self) -> tuple[int, int]:
        return self.capability


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm_moe_offload.integration import identity, support
    from vllm_moe_offload.integration.cuda import graphs

    platform = Gpu()
    for module in (graphs, identity, support):
        monkeypatch.setattr(module, "current_platform", platform)
    return platform
