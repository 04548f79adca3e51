"""An engine's process that answers by the protocol of `bench` without vLLM: slower the fewer experts it may keep."""

import json
import os
import sys
from typing import Any

from vllm_moe_offload.bench.protocol import serve

MS = {"plain": 10, "none": 30, "history": 20}


class ScriptedRunner:
    """Takes no time, and says it took what ``MS`` has."""

    def __init__(self, job: dict[str, Any]) -> None:
        settings = job["arguments"]["additional_config"]["moe_offload"]
        self.predictor = settings["predictor"] if settings else "plain"
        if self.predictor in os.environ.get("FAILING", "").split(","):
            raise ValueError(f"{self.predictor} is not to start")
        self.runs = 0

    def loaded(self) -> dict[str, Any]:
        return {"load_seconds": 1.0, "totals": {}}

    def close(self) -> None:
        pass

    def run(self, prompts: list[list[str]], tokens: int, prompt_tokens: int | None, seed: int | None) -> dict[str, Any]:
        self.runs += 1
        seconds = MS[self.predictor] / 1e3
        counted = {} if self.predictor == "plain" else {"hits": 3, "misses": 1, "steps": tokens, "stall_seconds": 0.1}
        if counted:
            counted |= {"loaded_bytes": 1 << 20, "prefetch_useful": 1, "prefetch_late": 0, "prefetch_wasted": 0}
        return {
            "runs": self.runs,
            "prompt_tokens": 10,
            "ttft": seconds,
            "tpot": [seconds] * len(prompts),
            "tokens": [[1] * tokens for _ in prompts],
            "counters": counted,
            "decode_counters": counted,
            "totals": {"slot_bytes": 1 << 20, "expert_bytes": 4 << 20},
        }


if __name__ == "__main__":
    print(json.dumps(sys.argv), flush=True)
    serve(ScriptedRunner)
