"""What `selftest` has processes of their own do: one engine's answer, or the rates of the GPU.

    python -m vllm_moe_offload.integration.selftest JOB FILE

The job is JSON, empty for the rates; the result is written to the file.
"""

import json
import mmap
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..device import Device, RegistrationError
from ..device.rates import copy_rates, overlap, registration_seconds

MEASURED_BYTES = 512 << 20
RECORD_BYTES = 8 << 20
MATRIX_WIDTH = 8192


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Start the engine ``job["engine"]`` and answer ``job["prompts"]`` greedily, twice; the second time is timed."""
    engine = job["engine"]
    from vllm import LLM, SamplingParams

    if not torch.cuda.is_available():
        torch.cpu._init_amx()  # vLLM 0.32 asks for AMX too late where a first pass has few rows
    llm = LLM(**engine)

    def generate(tokens: int) -> tuple[list[list[int]], float]:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        began = time.perf_counter()
        outputs = llm.generate(job["prompts"], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs], time.perf_counter() - began

    generate(job["tokens"])
    _, first = generate(1)
    tokens, seconds = generate(job["tokens"])
    offloads = "additional_config" in engine
    stats = llm.collective_rpc("moe_offload_stats")[0] if offloads else {}
    return {"tokens": tokens, "ms_per_token": 1e3 * (seconds - first) / (job["tokens"] - 1), "stats": stats}


def measure(
    device: Device, nbytes: int = MEASURED_BYTES, record_bytes: int = RECORD_BYTES, width: int = MATRIX_WIDTH
) -> dict[str, Any]:
    """Rates of ``device``, in bytes per second, with ``nbytes`` of host memory."""
    from ..windows.gather_rate import gather_rates

    memory = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    memory[:] = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    try:
        registering = registration_seconds(device, memory)
    except RegistrationError as error:
        return {"refused": str(error)}
    copies = copy_rates(device, memory)
    beside = overlap(device, memory, width)
    gathers = gather_rates(device, memory, record_bytes)
    device.unregister(memory)
    return {
        "registration_seconds_per_gib": registering / (nbytes / 2**30),
        "copies_alone": copies.alone,
        "copies_together": copies.together,
        "gather": gathers,
        "hidden": beside.hidden,
        "overlap": beside._asdict(),
    }


def _measure_this_machine() -> dict[str, Any]:
    from ..device.cuda import CudaDevice

    return measure(CudaDevice())


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    found = answer(job) if job else _measure_this_machine()
    Path(sys.argv[2]).write_text(json.dumps(found))
