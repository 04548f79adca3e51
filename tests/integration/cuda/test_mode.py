"""The GPU manages its experts by itself unless something is in the way, which is named with what it costs."""

import pytest

from vllm_moe_offload.integration.cuda import mode

GIB = 2**30


def test_nothing_is_in_the_way_where_host_memory_holds_all_and_can_be_read() -> None:
    assert mode.obstacle(64, 64, GIB, "") == ""


@pytest.mark.parametrize("unregistered", ["", "out of memory"])
def test_experts_that_host_memory_does_not_hold_are_what_is_named_first(unregistered: str) -> None:
    said = mode.obstacle(63, 64, GIB, unregistered)
    assert said == "host memory holds 63 of 64 experts (all take 64.0 GiB; see host_cache)"


@pytest.mark.parametrize("wsl", [False, True])
def test_the_drivers_reason_is_passed_on(monkeypatch: pytest.MonkeyPatch, wsl: bool) -> None:
    monkeypatch.setattr(mode, "in_wsl", lambda: wsl)
    said = mode.obstacle(64, 64, GIB, "out of memory")
    assert "the GPU cannot read host memory where it lies: out of memory" in said
    assert ("VLLM_WSL2_ENABLE_PIN_MEMORY" in said) == wsl


def test_the_log_says_what_it_costs(warnings_of_vllm: pytest.LogCaptureFixture) -> None:
    mode.log_mode("", 48)
    assert not [record for record in warnings_of_vllm.records if record.levelname == "WARNING"]
    mode.log_mode("host memory holds 1 of 2 experts", 48)
    (said,) = {record.message for record in warnings_of_vllm.records if record.levelname == "WARNING"}
    assert "3.8 ms a step: host memory holds 1 of 2 experts" in said
