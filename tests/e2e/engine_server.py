"""A process that runs engines one after another: one JSON job per line in, one JSON answer per line out.

Importing vLLM costs more than a tiny engine does, so a test session keeps two of these: one with the plugin and one
without. A job is {"model": path, "engine": LLM arguments, "rounds": [{"prompts": [[token ids]], "tokens": n}]}.
"""

import gc
import json
import os
import sys
import traceback
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

SMALL_ENGINE = {
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 16 << 20,
    "gpu_memory_utilization": 0.2,
}


def allow_amx() -> None:
    """vLLM 0.32 dies of an illegal instruction where the first forward pass has few rows: nothing has asked for AMX."""
    import torch

    torch.cpu._init_amx()


def run_predicting(job: dict[str, Any]) -> dict[str, Any]:
    """As ``run``; predicts in every step if the job says so: too few steps for the governor to tell what pays."""
    from vllm_moe_offload.prefetch.governor import PredictionGovernor

    with (
        patch.object(PredictionGovernor, "predicts", lambda *_: True) if job.get("every_step") else nullcontext(),
        nullcontext() if job.get("order") is None else virtual_device(job["by_itself"], order=job["order"]),
    ):
        return run(job)


def virtual_device(by_itself: bool = False, **device: Any) -> ExitStack:
    """Slots are in the memory of such a ``VirtualDevice``, whose copies run late; kernels run on the host.

    From now on, until what is returned is left.

    Args:
        by_itself: the device manages them where it can, else the host.
    """
    from tests.device.virtual import VirtualDevice
    from tests.windows.reference_kernels import ReferenceSpeculativeKernels
    from vllm_moe_offload.integration import machine
    from vllm_moe_offload.integration.cuda import mode

    obstacle = mode.obstacle if by_itself else lambda *_: "a test looks at the host"
    patches = ExitStack()
    patches.enter_context(patch.object(machine, "computes_on_device", lambda: True))
    patches.enter_context(patch.object(machine, "device", lambda: VirtualDevice(main_is_host=True, **device)))
    patches.enter_context(
        patch.object(machine, "managing_kernels", lambda device, _: ReferenceSpeculativeKernels(device))
    )
    patches.enter_context(patch.object(mode, "obstacle", obstacle))
    return patches


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    allow_amx()
    gc.collect()
    gc.freeze()
    llm = LLM(job["model"], **(SMALL_ENGINE | job["engine"]))
    rounds = []
    for prompts in job["rounds"]:
        sampling = SamplingParams(
            temperature=0, max_tokens=prompts["tokens"], ignore_eos=True, detokenize=False, logprobs=2
        )
        requests = [{"prompt_token_ids": ids} for ids in prompts["prompts"]]
        outputs = [request.outputs[0] for request in llm.generate(requests, sampling, use_tqdm=False)]
        rounds.append(
            [
                {
                    "tokens": list(output.token_ids),
                    "finish_reason": output.finish_reason,
                    "stop_reason": output.stop_reason,
                    "logprobs": [{str(id): top.logprob for id, top in step.items()} for step in output.logprobs],
                }
                for output in outputs
            ]
        )
    stats = llm.collective_rpc("moe_offload_stats") if "additional_config" in job["engine"] else []
    drafts = drafts_of(llm) if "speculative_config" in job["engine"] else {}
    llm.llm_engine.engine_core.shutdown()
    del llm
    return {"rounds": rounds, "stats": stats, "drafts": drafts}


def drafts_of(llm: Any) -> dict[str, int]:
    """How many tokens were drafted and how many of them accepted."""
    return {
        metric.name.rpartition("_num_")[2]: metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value")
    }


def main() -> None:
    sys.path.append(str(Path(__file__).parents[2]))  # a script finds what lies beside it, and the tests import by room
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever vLLM prints must not get between the answers
    for line in sys.stdin:
        try:
            answer = run_predicting(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
