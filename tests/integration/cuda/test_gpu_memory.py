"""What ``auto`` makes slots of, and what is said where slots leave no room for the KV cache."""

import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.integration.cuda import memory
from vllm_moe_offload.integration.cuda.memory import (
    SEQUENCES,
    DeviceMemory,
    automatic_reason,
    automatic_slots,
    refuse_without_kv_cache,
)
from vllm_moe_offload.sizes import parse_size
from vllm_moe_offload.windows.activations import estimated_activations

GIB = 2**30
sizes = st.integers(0, 2**37)
memories = st.builds(DeviceMemory, sizes, sizes, sizes, sizes)


@st.composite
def bounds(draw: st.DrawFn) -> tuple[int, int]:
    least = draw(st.integers(1, 2**37))
    return least, draw(st.integers(least, 2**40))


@given(memories, st.integers(1, SEQUENCES), bounds())
def test_slots_are_all_that_is_left_beside_the_kv_cache_of_as_many_sequences_as_possible(
    memory: DeviceMemory, wanted: int, bounds: tuple[int, int]
) -> None:
    least, most = bounds
    left = memory.requested - memory.used - memory.activations
    if left - memory.sequence < least:
        with pytest.raises(ConfigError, match="finds no room"):
            automatic_slots(memory, wanted, least, most)
        return
    slots, sequences = automatic_slots(memory, wanted, least, most)
    assert least <= slots <= most and 1 <= sequences <= wanted
    assert slots + sequences * memory.sequence <= left
    assert slots == most or slots + sequences * memory.sequence == left
    assert sequences == wanted or left - (sequences + 1) * memory.sequence < least


def test_the_reason_has_the_four_terms() -> None:
    reason = automatic_reason(DeviceMemory(22 * GIB, 3 * GIB, GIB, GIB // 2), 8)
    assert reason == (
        " (auto: of 22.0 GiB, 3.0 GiB used, 1.0 GiB for activations, 4.0 GiB for the KV caches of 8 sequences)"
    )


def test_no_room_at_all_says_what_takes_it_and_what_would_make_some() -> None:
    with pytest.raises(ConfigError) as error:
        automatic_slots(DeviceMemory(8 * GIB, 6 * GIB, GIB, GIB), 8, GIB, 20 * GIB)
    assert "of 8.0 GiB, 6.0 GiB used" in str(error.value) and "smallest slots take 1.0 GiB" in str(error.value)
    assert "--max-model-len" in str(error.value) and "--gpu-memory-utilization" in str(error.value)


@given(st.integers(1, 2**15), st.integers(1, 1024), st.booleans())
def test_activations_grow_with_what_a_step_holds(tokens: int, sequences: int, graphs: bool) -> None:
    def estimate(tokens: int, sequences: int) -> int:
        return estimated_activations(tokens, sequences, 2048, 768, 8, 151_936, 2, graphs)

    assert estimate(tokens, sequences) < estimate(tokens + 1, sequences) < estimate(tokens + 1, sequences + 1)
    # no less than what vLLM's kernels are given for the choices of each token
    assert estimate(tokens, sequences) >= tokens * 8 * (2 * 2048 + 0) * 2


@given(st.integers(-(2**35), 2**35), st.integers(1, 2**35), st.integers(1, 2**37), st.integers(1, 2**30))
def test_slots_that_leave_no_kv_cache_are_refused_with_a_size_that_does(
    available: int, needed: int, slots: int, least: int
) -> None:
    if available >= needed:
        refuse_without_kv_cache(available, needed, slots, least)
        return
    with pytest.raises(ConfigError) as error:
        refuse_without_kv_cache(available, needed, slots, least)
    named = re.search(r"cache = '(\w+)' would leave enough", str(error.value))
    if named is None:
        assert "even the smallest slots" in str(error.value)
        assert slots - (needed - available) < least + 2**20
    else:
        instead = parse_size(named[1])
        assert least <= instead < slots
        assert available + slots - instead >= needed


@pytest.mark.parametrize(
    ("slots", "fixed", "said"),
    [
        ((4 * GIB, GIB), None, "cache = '3072MiB' would leave enough"),
        ((4 * GIB, GIB), GIB, None),  # vLLM was told the size of its KV cache
        (None, None, None),  # a rank without MoE layers
    ],
)
def test_what_vllm_finds_for_its_kv_cache_is_enough_or_slots_are_named(
    slots: tuple[int, int] | None, fixed: int | None, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the error is left for the process that starts
    worker = SimpleNamespace(
        moe_offload=SimpleNamespace(device_slots=slots),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=fixed),
        model_config=SimpleNamespace(original_max_model_len=4096),
        vllm_config=SimpleNamespace(instance_id="engine"),
        get_kv_cache_spec=lambda: {"attention": SimpleNamespace(max_memory_usage_bytes=lambda _: 2 * GIB)},
    )
    determine = memory._explain_missing_kv_cache(lambda _: GIB)
    if said is None:
        assert determine(worker) == GIB
    else:
        with pytest.raises(ConfigError, match=said):
            determine(worker)
