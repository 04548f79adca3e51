"""Run by test_inert.py: an engine nobody asked to offload. Prints what may not depend on the plugin as JSON.

Arguments: checkpoint, JSON of engine arguments, and ``installed`` or ``hidden`` (entry points without the plugin).
"""

import importlib.metadata
import json
import sys
from typing import Any

SMALL = {"max_model_len": 256, "max_num_seqs": 4, "kv_cache_memory_bytes": 16 << 20, "gpu_memory_utilization": 0.2}


def hide_plugin() -> None:
    everything = importlib.metadata.entry_points

    def without_plugin(**selection: str) -> Any:
        found = everything(**selection)
        if selection != {"group": "vllm.general_plugins"}:
            return found
        return importlib.metadata.EntryPoints(point for point in found if point.name != "moe-offload")

    importlib.metadata.entry_points = without_plugin


def main(model: str, arguments: str, plugin: str) -> None:
    if plugin == "hidden":
        hide_plugin()
    from vllm import LLM, SamplingParams

    llm = LLM(model, **SMALL, **json.loads(arguments))
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=1, detokenize=False)
    prompts = [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": list(range(100, 140))}]
    outputs = [request.outputs[0] for request in llm.generate(prompts, sampling, use_tqdm=False)]
    config = llm.llm_engine.vllm_config
    answer = {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [output.cumulative_logprob for output in outputs],
        "hash": config.compute_hash(),
        "additional_config": config.additional_config,
        "loaded": "vllm_moe_offload.plugin" in sys.modules,
        "compiler": "numba" in sys.modules,
    }
    print("\n" + json.dumps(answer), file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
