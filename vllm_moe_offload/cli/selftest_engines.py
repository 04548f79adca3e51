"""The engines that `selftest` starts, one after another, each in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from ..config import PLUGIN_NAME
from ..store.files import ROOT_SETTING
from .check import OK, PROBLEM, Check

CHILD = "vllm_moe_offload.integration.selftest"
_SECONDS = 300
_PROMPTS = (
    "import unittest\n\nclass TestAdd(unittest.TestCase):\n    def test_add(self):\n",
    "Question: Tom has 5 apples. He buys 7 more and gives 3 to Anna. How many apples does Tom have now?\nAnswer:",
)
_TOKENS = 32
_ENGINE = {
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "gpu_memory_utilization": 0.3,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "seed": 0,
}
_KERNELS = {"moe_backend": "triton", "attention_backend": "TRITON_ATTN"}
"""On a GPU: the same for plain vLLM and ours, so that equal tokens can be expected."""
_GRAPHS = {"mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4]}


class Arm(NamedTuple):
    """One engine."""

    name: str
    engine: dict[str, Any]
    """Arguments of vLLM's ``LLM``, besides those of all."""
    offload: dict[str, Any] | None = None
    """The plugin's settings; None for plain vLLM."""
    reference: str = ""
    """The arm of plain vLLM whose tokens it must give."""


class Outcome(NamedTuple):
    """What one engine answered."""

    tokens: list[list[int]]
    ms_per_token: float
    stats: dict[str, Any]
    """The plugin's counters; empty for plain vLLM."""
    failure: str = ""
    """Why there is no answer."""


def arms(gpu: bool) -> list[Arm]:
    """Plain vLLM and ours with a quarter of the experts; on a GPU every mode, without graphs and with them."""
    eager: dict[str, Any] = {"enforce_eager": True} | (_KERNELS if gpu else {})
    few = {"cache": "25%"}
    found = [Arm("plain, eager", eager), Arm("a quarter of the experts, eager", eager, few, "plain, eager")]
    if not gpu:
        return found
    graphs: dict[str, Any] = {"compilation_config": _GRAPHS} | _KERNELS
    by_host = few | {"host_cache": "75%"}
    return [
        *found,
        Arm("host-managed, eager", eager, by_host, "plain, eager"),
        Arm("plain, graphs", graphs),
        Arm("a quarter of the experts, graphs", graphs, few, "plain, graphs"),
        Arm("host-managed, graphs", graphs, by_host, "plain, graphs"),
        Arm("every expert, graphs", graphs, {"cache": "100%"}, "plain, graphs"),
    ]


def run(arm: Arm, model: Path, stores: Path) -> Outcome:
    """Start the engine of ``arm`` on ``model`` and have it answer; its store goes to ``stores``."""
    job: dict[str, Any] = {
        "engine": {"model": str(model)} | _ENGINE | arm.engine,
        "prompts": _PROMPTS,
        "tokens": _TOKENS,
    }
    if arm.offload is not None:
        job["engine"]["additional_config"] = {"moe_offload": arm.offload}
    plugins = "" if arm.offload is None else PLUGIN_NAME
    try:
        answer = child(job, {"VLLM_PLUGINS": plugins, ROOT_SETTING: str(stores)})
    except ChildError as error:
        return Outcome([], 0.0, {}, str(error))
    return Outcome(**answer)


class ChildError(Exception):
    """The child ended without a result; its message is the error it printed last."""


def child(job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Have ``integration.selftest`` do ``job``.

    Raises:
        ChildError: it does not.
    """
    surroundings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with tempfile.TemporaryDirectory(prefix="selftest-") as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        with log.open("w") as output:
            try:
                subprocess.run(
                    [sys.executable, "-P", "-m", CHILD, json.dumps(job), str(result)],
                    env=os.environ | surroundings | environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=_SECONDS,
                )
            except subprocess.TimeoutExpired:
                raise ChildError(f"no answer within {_SECONDS} s") from None
        if not result.is_file():
            raise ChildError(_telling(log.read_text(errors="replace").splitlines()))
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def _telling(lines: list[str]) -> str:
    errors = [line for line in lines if "Error" in line]
    return (errors or lines[-1:] or ["it printed nothing"])[-1].strip()


def judge(arm: Arm, outcome: Outcome, reference: Outcome | None) -> Check:
    """What the answer of ``arm`` shows beside that of its reference."""
    if outcome.failure:
        return Check(arm.name, PROBLEM, f"did not run: {outcome.failure}")
    speed = f"{outcome.ms_per_token:.2f} ms a token"
    if reference is None:
        return Check(arm.name, OK, speed)
    if reference.failure:
        return Check(arm.name, PROBLEM, f"{speed}; {arm.reference} did not run, so the tokens cannot be compared")
    if not outcome.stats.get("layer_calls") and not outcome.stats.get("hits"):
        return Check(arm.name, PROBLEM, "nothing was offloaded")
    for request, (ours, plain) in enumerate(zip(outcome.tokens, reference.tokens, strict=True)):
        if ours != plain:
            place = next(place for place, pair in enumerate(zip(ours, plain, strict=True)) if pair[0] != pair[1])
            return Check(arm.name, PROBLEM, f"not the tokens of plain vLLM from token {place} of request {request} on")
    ratio = outcome.ms_per_token / max(reference.ms_per_token, 1e-9)
    return Check(arm.name, OK, f"the tokens of plain vLLM; {speed}, {ratio:.2f} x plain")
