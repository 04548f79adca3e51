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

PROMPT_TOKENS = 32
_ROUNDS = 3


def prompts(count: int, length: int, vocabulary: int, first: int = 0) -> list[dict[str, list[int]]]:
    """``count`` prompts of ``length`` tokens, from number ``first``: each different, the same in every engine."""
    generator = torch.Generator().manual_seed(11)
    drawn = torch.randint(1, vocabulary, (first + count, length), generator=generator)
    return [{"prompt_token_ids": row} for row in drawn[first:].tolist()]


class Measurement:
    """An engine and what is asked of it."""

    def __init__(self, job: dict[str, Any]):
        began = time.perf_counter()
        self._llm = LLM(**job["engine"])
        self._start_seconds = time.perf_counter() - began
        self._job = job

    def run(self) -> dict[str, Any]:
        """Seconds per token by batch size, of a prefill, and the tokens of the first batch."""
        found: dict[str, Any] = {"start_seconds": self._start_seconds, "tpot": {}, "tokens": {}}
        for batch in self._job["batches"]:
            found["tokens"][batch], found["tpot"][batch] = self._decode(batch)
        found["prefill_seconds"] = self._prefill()
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            found["device"] = torch.cuda.get_device_name()
            found["device_bytes"] = total - free
        if "additional_config" in self._job["engine"]:
            found["stats"] = self._llm.collective_rpc("moe_offload_stats")[0]
        return found

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
