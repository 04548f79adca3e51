"""One engine of `compare.py`: decode at several batch sizes, and a prefill. The result is written to a file as JSON.

python benchmarks/gpu/measured_engine.py JOB FILE
"""

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from vllm import LLM, SamplingParams

from vllm_moe_offload.learning import supervisor

PROMPT_TOKENS = 32
_ROUNDS = 3
_LEARNED_TOKENS = 1024
_LEARNING_SECONDS = 60.0


def prompts(count: int, length: int, vocabulary: int, first: int = 0) -> list[dict[str, list[int]]]:
    """``count`` prompts of ``length`` tokens, from number ``first``: each different, the same in every engine."""
    generator = torch.Generator().manual_seed(11)
    drawn = torch.randint(1, vocabulary, (first + count, length), generator=generator)
    return [{"prompt_token_ids": row} for row in drawn[first:].tolist()]


class Measurement:
    """An engine and what is asked of it."""

    def __init__(self, job: dict[str, Any]):
        if job["learns"]:
            supervisor.CPU_SHARE = 1.0  # one engine, which waits for it
        began = time.perf_counter()
        self._llm = LLM(**job["engine"])
        self._start_seconds = time.perf_counter() - began
        self._job = job

    def run(self) -> dict[str, Any]:
        """Seconds per token by batch size, of a prefill, and the tokens of the first batch."""
        found: dict[str, Any] = {"start_seconds": self._start_seconds, "tpot": {}, "tokens": {}}
        if self._job["learns"]:
            self._learn()
        for batch in self._job["batches"]:
            found["tokens"][batch], found["tpot"][batch] = self._decode(batch)
        found["prefill_seconds"] = self._prefill()
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            found["device"] = torch.cuda.get_device_name()
            found["device_bytes"] = total - free
        if "additional_config" in self._job["engine"]:
            found["stats"] = self._stats()
        return found

    def _learn(self) -> None:
        """Serve what is measured, and go on until heads have been learned from it, or for so long."""
        asked, tokens = prompts(max(self._job["batches"]), PROMPT_TOKENS, self._job["vocabulary"]), self._job["tokens"]
        for _ in range(-(-_LEARNED_TOKENS // (len(asked) * (PROMPT_TOKENS + tokens)))):
            self._generate(asked, tokens)
        began = time.perf_counter()
        while not self._stats()["learned_tokens"] and time.perf_counter() - began < _LEARNING_SECONDS:
            self._generate(asked[:1], tokens)
        self._generate(asked[:1], 2 * tokens)  # a layer's head comes to the device before each step

    def _stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self._llm.collective_rpc("moe_offload_stats")[0]
        return stats

    def _decode(self, batch: int) -> tuple[list[list[int]], float]:
        asked = prompts(batch, PROMPT_TOKENS, self._job["vocabulary"])
        tokens = self._job["tokens"]
        self._generate(asked, tokens)
        seconds = []
        for _ in range(_ROUNDS):
            _, first = self._generate(asked, 1)
            answer, whole = self._generate(asked, tokens)
            seconds.append((whole - first) / (tokens - 1))
        return answer, median(seconds)

    def _prefill(self) -> float:
        length = self._job["prefill"]
        rounds = [
            self._generate(prompts(1, length, self._job["vocabulary"], number), 1)[1] for number in range(_ROUNDS + 1)
        ]
        return median(rounds[1:])

    def _generate(self, asked: list[dict[str, list[int]]], tokens: int) -> tuple[list[list[int]], float]:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        outputs = self._llm.generate(asked, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs], time.perf_counter() - began


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(Measurement(json.loads(sys.argv[1])).run()))
