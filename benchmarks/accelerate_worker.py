"""Hugging Face transformers with accelerate's disk offload in a process of its own, serving by protocol.py of `bench`.

Needs an environment with torch, transformers and `pip install accelerate`.
"""

import time
from pathlib import Path
from typing import Any

import torch
from by_path import module_at
from peer_worker import PeerRunner
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig


class AccelerateRunner(PeerRunner):
    """The model as transformers loads it: experts on the disk, everything else in memory."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """`arguments`: `checkpoint` (path), `offload` (folder to write experts to) and `threads`."""
        checkpoint = Path(arguments["checkpoint"])
        super().__init__(checkpoint)
        torch.set_num_threads(arguments["threads"])
        started = time.perf_counter()
        self._model = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=torch.bfloat16,
            device_map=_experts_on_disk(AutoConfig.from_pretrained(checkpoint)),
            offload_folder=arguments["offload"],
        )
        self.load_seconds = time.perf_counter() - started

    @torch.inference_mode()
    def begin(self, ids: list[int]) -> int:
        self._past = None
        return self._forward(ids)

    @torch.inference_mode()
    def step(self, token: int) -> int:
        return self._forward([token])

    def _forward(self, ids: list[int]) -> int:
        output = self._model(torch.tensor([ids]), past_key_values=self._past, use_cache=True, logits_to_keep=1)
        self._past = output.past_key_values
        return int(output.logits[0, -1].argmax())


def _experts_on_disk(config: PretrainedConfig) -> dict[str, str]:
    """Where accelerate is to keep each module that has weights."""
    with torch.device("meta"):
        modules = dict(AutoModelForCausalLM.from_config(config).named_modules())
    experts = {name for name in modules if name.endswith(".mlp.experts")}
    leaves = {name for name, module in modules.items() if not list(module.children())}
    return {name: "disk" if name in experts else "cpu" for name in leaves | experts if not _within(name, experts)}


def _within(name: str, others: set[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


if __name__ == "__main__":
    module_at("bench/protocol.py").serve(AccelerateRunner)
