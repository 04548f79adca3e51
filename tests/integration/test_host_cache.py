"""How much host memory there is behind slots of a device, and that it is refused where there is no device."""

import pytest

from vllm_moe_offload.config import OffloadConfig
from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.integration.early_checks import refuse_memory_of_gpus
from vllm_moe_offload.integration.windows import host_budget

GIB = 1 << 30


def test_on_the_cpu_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave host_cache out"):
        refuse_memory_of_gpus(OffloadConfig(host_cache="1GiB"))


@pytest.mark.parametrize(
    ("setting", "free", "nbytes"),
    [
        ("25%", 0, 10 * GIB),
        ("3GiB", 0, 3 * GIB),
        ("auto", 100 * GIB, 40 * GIB),  # room for every expert
        ("auto", 10 * GIB, 9 * GIB),  # and if not, what can be spared
    ],
)
def test_shares_sizes_and_what_can_be_spared(setting: str, free: int, nbytes: int) -> None:
    assert host_budget(OffloadConfig(host_cache=setting), 40 * GIB, free).nbytes == nbytes
