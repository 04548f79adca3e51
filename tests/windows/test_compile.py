"""The kernels compile for NVIDIA's GPUs without one, in seconds, and keep everything in registers."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from vllm_moe_offload.windows import kernels, speculative_kernels
from vllm_moe_offload.windows.launches import COMPILE_OPTIONS

CAPABILITIES = [80, 89, 90, 100, 120]
USUAL = 90
LANES = [(128, 1), (256, 2), (512, 4)]
"""Lanes and warps of the kernels with one program."""
SCALARS = {
    "n_ids",
    "top_k",
    "width",
    "base",
    "experts",
    "slots",
    "keep_ids",
    "keeps",
    "is_lent",
    "layer",
    "n_components",
    "programs",
    "part",
    "parts",
    "most_rows",
    "hidden",
}
LONG = {"ring", "components", "given"}
SINGLE = {"scores", "state", "known", "inner", "outer", "bias", "weights", "added", "before", "after"}


def type_of(name: str) -> str:
    if name == "threshold":
        return "fp32"
    return "i32" if name in SCALARS else "*i64" if name in LONG else "*fp32" if name in SINGLE else "*i32"


def compiled(kernel: Any, capability: int, warps: int, **constants: int) -> Any:
    """As for arguments that start on multiples of 16, but for the ids."""
    names = [parameter.name for parameter in kernel.params]
    types = {name: type_of(name) for name in names}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") and name != "ids"]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps} | COMPILE_OPTIONS
    )


def registers_of(ptx: str, capability: int, folder: Path) -> int:
    """What the assembler says of a kernel; it must not spill."""
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    (folder / "kernel.ptx").write_text(ptx)
    command = [get_ptxas(capability).path, "-v", f"--gpu-name={target[1]}", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said, said
    used = re.search(r"Used (\d+) registers", said)
    assert used is not None
    return int(used[1])


@pytest.fixture(autouse=True)
def compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_spills(capability: int, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    if capability != USUAL and not pytestconfig.getoption("exhaustive"):
        pytest.skip("--exhaustive compiles for every target")
    jobs = [
        *(
            (kernel, warps, {"P": lanes, "CHUNK": 8})
            for kernel in (kernels.manage, kernels.stage)
            for lanes, warps in LANES
        ),
        (kernels.gather, 4, {"BLOCK": 1024}),
        (kernels.note, 4, {"CHUNK": 1024}),
        (speculative_kernels.observe, 4, {"S": 256}),
        *((speculative_kernels.evaluate, lanes // 32, {"P": lanes, "BLOCK": 16}) for lanes, _ in LANES),
        (speculative_kernels.select_speculative, 1, {"P": 128}),
    ]
    for kernel, warps, constants in jobs:
        ptx = compiled(kernel, capability, warps, **constants).asm["ptx"]
        used = registers_of(ptx, capability, tmp_path)
        print(f"sm_{capability} {kernel.__name__} {constants} {warps} warps: {used} registers")


def test_copies_take_16_bytes_a_lane() -> None:
    ptx = compiled(kernels.gather, USUAL, 4, BLOCK=1024).asm["ptx"]
    assert re.search(r"ld\.global[.\w]*\.v2\.b64", ptx) and re.search(r"st\.global[.\w]*\.v2\.b64", ptx)
