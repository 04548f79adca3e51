"""On a GPU, where there is one: what no other test can show."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vllm_moe_offload.cli import app

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def test_the_device_reads_host_memory_as_fast_as_copies_do() -> None:
    from vllm_moe_offload.device.cuda import CudaDevice
    from vllm_moe_offload.integration.selftest import measure

    found = measure(CudaDevice(), nbytes=64 << 20)
    assert max(found["gather"].values()) >= 0.9 * max(found["copies_together"].values())
    assert found["hidden"] > 0.5


def test_every_mode_gives_the_tokens_of_plain_vllm() -> None:
    result = CliRunner().invoke(app, ["selftest", "--gpu", "--json"])
    assert result.exit_code == 0, json.dumps(json.loads(result.stdout)["checks"], indent=1)


def test_doctor_finds_nothing_wrong_with_the_gpu() -> None:
    from vllm_moe_offload.cli.check import BROKEN, WARNING
    from vllm_moe_offload.cli.gpu_check import Driver, check_gpu

    assert [check for check in check_gpu(Driver.load()) if check.state in (BROKEN, WARNING)] == []


def test_what_is_copied_on_one_stream_is_there_for_the_next_that_waits() -> None:
    from vllm_moe_offload.device.cuda import CudaDevice

    gpu = CudaDevice()
    memory = np.random.default_rng(0).integers(0, 256, 8 << 20, np.uint8)
    gpu.register(memory)
    target, stream = gpu.allocate(memory.nbytes), gpu.stream("copies", urgent=True)
    for _ in range(50):
        target.zero_()
        cleared = gpu.record(gpu.main)
        gpu.wait(stream, cleared)
        gpu.copy(stream, target, torch.from_numpy(memory))
        gpu.wait(gpu.main, gpu.record(stream))
        assert int(target.to(torch.int64).sum()) == int(memory.astype(np.int64).sum())
    gpu.unregister(memory)
