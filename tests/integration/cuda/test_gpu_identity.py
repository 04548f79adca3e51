"""Which GPUs may use one store: those that would make the same bytes of a checkpoint."""

from typing import Any

import pytest

from vllm_moe_offload.integration.identity import machine_facts


def test_weights_that_stay_as_the_checkpoint_has_them_serve_on_every_gpu(gpu: Any) -> None:
    here = machine_facts("TritonExperts"), machine_facts("TritonWNA16Experts")
    gpu.capability = (12, 0)
    assert (machine_facts("TritonExperts"), machine_facts("TritonWNA16Experts")) == here


def test_weights_that_a_kernel_packs_serve_on_gpus_of_the_same_kind_and_setting(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine_facts("MarlinExperts")
    assert machine_facts("MarlinExperts") == here
    monkeypatch.setenv("VLLM_MARLIN_INPUT_DTYPE", "int8")
    assert machine_facts("MarlinExperts") != here
    monkeypatch.delenv("VLLM_MARLIN_INPUT_DTYPE")
    gpu.capability = (12, 0)
    assert machine_facts("MarlinExperts") != here


def test_rocm_changes_weights_by_what_gpu_there_is(gpu: Any) -> None:
    gpu.rocm, gpu.device_name = True, "rocm"
    here = machine_facts("TritonExperts")
    gpu.capability = (12, 0)
    assert machine_facts("TritonExperts") != here


def test_facts_of_a_cpu_are_those_under_which_its_stores_were_made() -> None:
    assert machine_facts("TritonExperts").keys() == {"platform", "instructions", "amx", "environment"}
    assert machine_facts("TritonExperts")["platform"] == "cpu"
    assert machine_facts("TritonExperts")["environment"].keys() == {"VLLM_CPU_INT4_W4A8"}
