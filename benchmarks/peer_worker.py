"""What the workers of peers share: the same texts in, the same figures out as worker.py, one request at a time.

Needs `pip install tokenizers` in the peer's environment: the model's own tokenizer makes the numbers it is fed.
"""

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


class PeerRunner(ABC):
    """A peer's engine, decoding greedily. `__init__` of an implementation loads the model, between calls of a clock."""

    load_seconds: float

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))

    @abstractmethod
    def begin(self, ids: list[int]) -> int:
        """Forget what was before, compute the prompt and return the most probable token."""

    @abstractmethod
    def step(self, token: int) -> int:
        """Compute one more token and return the most probable next one."""

    def loaded(self) -> dict[str, Any]:
        """What loading took, in seconds."""
        return {"load_seconds": self.load_seconds, "model_seconds": self.load_seconds, "totals": {}}

    def close(self) -> None:  # noqa: B027 - a default
        """Nothing: the process ends."""

    def run(
        self, prompts: list[list[str]], tokens: int, prompt_tokens: int | None, seed: int | None = None
    ) -> dict[str, Any]:
        """As worker.Runner.run, of one prompt and greedily. Raises ValueError for anything else."""
        if len(prompts) != 1 or seed is not None or prompt_tokens is not None:
            raise ValueError("a peer runs one prompt as it is, greedily")
        ids = self._tokenizer.encode(prompts[0][0]).ids
        started = time.perf_counter()
        generated = [self.begin(ids)]
        first = time.perf_counter()
        while len(generated) < tokens:
            generated.append(self.step(generated[-1]))
        last = time.perf_counter()
        return {
            "prompt_tokens": len(ids),
            "ttft": first - started,
            "tpot": [(last - first) / max(tokens - 1, 1)],
            "tokens": [generated],
            "counters": {},
            "decode_counters": {},
            "totals": {},
        }
