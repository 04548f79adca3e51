"""vLLM's oracles choose covered kernels on every GPU, or say why they cannot."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.integration.cuda.oracles import CAPABILITIES
from vllm_moe_offload.errors import UnsupportedError
from vllm_moe_offload.integration.cuda import allow_list
from vllm_moe_offload.integration.support import refuse_layer

TRITON, WNA16, MARLIN = "TritonExperts", "TritonWNA16Experts", "MarlinExperts"
WITH_FP8 = tuple(capability for capability in CAPABILITIES if capability >= (8, 9))


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, str]]:
    command = [sys.executable, "-m", "tests.integration.cuda.oracles"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert run.returncode == 0, run.stderr
    answer: dict[str, dict[str, str]] = json.loads(run.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_scheme_gets_a_kernel_that_is_covered(
    found: dict[str, dict[str, str]], capability: tuple[int, int]
) -> None:
    kernels = found[".".join(map(str, capability))]
    fp8 = TRITON if capability in WITH_FP8 else MARLIN
    assert {scheme: kernel for scheme, kernel in kernels.items() if "Error" not in kernel} == {
        "bf16": TRITON,
        "bf16 gpt-oss": TRITON,
        "fp8 block": fp8,
        "fp8 tensor": fp8,
        "fp8 dynamic tensor": fp8,
        "fp8 channel": fp8,
        "int8": TRITON,
        "int4 GPTQ": MARLIN,
        "int4 AWQ": MARLIN,
        "int4 moe_wna16": WNA16,
        "mxfp4 gpt-oss": MARLIN,
        "mxfp4": MARLIN,
        "mxfp8": MARLIN,
        "nvfp4": MARLIN,
    }


def test_where_no_kernel_is_left_the_error_says_that_it_is_ours_and_names_those_that_work(
    found: dict[str, dict[str, str]],
) -> None:
    forced = found["9.0"]["bf16 --moe-backend flashinfer_cutlass"]
    assert forced.startswith("UnsupportedError: moe-offload cannot serve the layer: ")
    assert "FlashInfer CUTLASS does not support" in forced and "not with FlashInferExperts" in forced
    assert f"it works with {TRITON}, {WNA16}, {MARLIN}" in forced and "or switch moe-offload off" in forced
    assert "not with CutlassExpertsW4A8Fp8" in found["9.0"]["w4a8 fp8"]
    assert found["9.0"]["w4a8 int8"].startswith("NotImplementedError: ")  # vLLM's own: it has none


def test_methods_that_ask_no_oracle_are_refused_by_name(found: dict[str, dict[str, str]]) -> None:
    refused = found["refused"]
    assert {"ModelOptBlockQuantMoEMethod", "QuarkW4A8Fp8MoEMethod"} <= refused.keys()
    for name, said in refused.items():
        assert f"cannot serve the layer with {name}" in said and "or switch moe-offload off" in said


def test_outside_of_choosing_for_an_offloaded_layer_vllm_is_left_alone() -> None:
    allow_list.install()
    from vllm.model_executor.layers.fused_moe.experts.flashinfer_cutlass_moe import FlashInferExperts
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts

    _, reason = FusedMoEExperts.is_supported_config(FlashInferExperts, SimpleNamespace(), None, None, None)
    assert reason is not None and "moe-offload" not in reason


def _overrides() -> list[Any]:
    """Every class of vLLM's kernels that answers by itself, by its syntax: not all can be imported here."""
    from vllm.model_executor.layers import fused_moe

    return [
        pytest.param(node, id=f"{source.stem}.{kernel.name}")
        for source in Path(inspect.getfile(fused_moe)).parent.rglob("*.py")
        for kernel in ast.walk(ast.parse(source.read_text()))
        if isinstance(kernel, ast.ClassDef) and kernel.name != "FusedMoEExperts"
        for node in kernel.body
        if isinstance(node, ast.FunctionDef) and node.name == "is_supported_config" and "CPU" not in kernel.name
    ]


@pytest.mark.parametrize("override", _overrides())
def test_no_kernel_for_gpus_says_yes_without_asking_the_class_whose_answer_is_wrapped(
    override: ast.FunctionDef,
) -> None:
    asks = [
        node
        for node in ast.walk(override)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "is_supported_config"
    ]
    assert asks


class _Inner:
    pass


def test_a_kernel_that_chooses_while_it_runs_is_covered_if_both_of_its_choices_are() -> None:
    from vllm.model_executor.layers.fused_moe.experts.triton_cutlass_moe import TritonOrCutlassExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts, TritonWNA16Experts

    assert not allow_list.is_covered(TritonOrCutlassExperts)
    both = type("Both", (_Inner,), {"get_clses": staticmethod(lambda: (TritonExperts, TritonWNA16Experts))})
    assert allow_list.is_covered(both)


def test_layers_that_replace_experts_by_constants_are_refused() -> None:
    substituted = type("SubstitutedRoutedExperts", (), {})
    with pytest.raises(UnsupportedError, match=r"cannot serve model\.layers\.3: its checkpoint replaces experts by"):
        refuse_layer("model.layers.3", type("OfSomeModel", (substituted,), {}))
    refuse_layer("model.layers.3", _Inner)
