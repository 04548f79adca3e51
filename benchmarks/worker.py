"""vLLM in a process of its own, with or without the plugin; see protocol.py.

Must measure only: every number it returns was taken here, around vLLM's own engine loop.
"""

import time
from typing import Any

from protocol import serve


class Runner:
    """vLLM's engine and the loop that times it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        started = time.perf_counter()
        self.llm = LLM(**arguments, worker_cls="timed_worker.TimedWorker")
        self.load_seconds = time.perf_counter() - started
        self.model_seconds = max(self.llm.collective_rpc("model_seconds"))
        self.is_offloading = "moe_offload" in arguments.get("additional_config", {})
        self.requests = 0

    def loaded(self) -> dict[str, Any]:
        """What loading took, in seconds, and the plugin's counters after it."""
        seconds = {"load_seconds": self.load_seconds, "model_seconds": self.model_seconds}
        return seconds | {"totals": self.counters()}

    def close(self) -> None:
        """End vLLM's processes."""
        self.llm.llm_engine.engine_core.shutdown()

    def counters(self) -> dict[str, float]:
        """The plugin's counters, summed over ranks; none for plain vLLM."""
        if not self.is_offloading:
            return {}
        ranks = self.llm.collective_rpc("moe_offload_stats")
        return {
            key: sum(rank[key] for rank in ranks) for key, value in ranks[0].items() if isinstance(value, int | float)
        }

    def run(
        self, prompts: list[list[str]], tokens: int, prompt_tokens: int | None, seed: int | None = None
    ) -> dict[str, Any]:
        """Generate for one batch. Times in seconds, from the moment the first request is added.

        Each prompt is a list of texts: its first, or as many as it takes to make `prompt_tokens` tokens. Greedy, or
        sampled with `seed`. `counters` are of the whole run, `decode_counters` from about the moment on when all
        requests have their first token: the engine does not wait while it is asked.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        parameters = SamplingParams(temperature=0 if seed is None else 1, seed=seed, max_tokens=tokens, ignore_eos=True)
        inputs = [self._tokenize(texts, prompt_tokens) for texts in prompts]
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        outputs: dict[str, list[int]] = {}
        before = self.counters()
        decoding: dict[str, float] | None = None
        started = time.perf_counter()
        for ids in inputs:
            self.requests += 1
            self.llm.llm_engine.add_request(str(self.requests), TokensPrompt(prompt_token_ids=ids), parameters)
        while self.llm.llm_engine.has_unfinished_requests():
            answers = self.llm.llm_engine.step()
            now = time.perf_counter() - started
            for answer in answers:
                first.setdefault(answer.request_id, now)
                last[answer.request_id] = now
                outputs[answer.request_id] = list(answer.outputs[0].token_ids)
            if decoding is None and len(first) == len(inputs):
                decoding = self.counters()
        after = self.counters()
        return {
            "prompt_tokens": sum(map(len, inputs)),
            "ttft": max(first.values()),
            "tpot": [(last[request] - first[request]) / max(tokens - 1, 1) for request in first],
            "tokens": [outputs[request] for request in sorted(outputs, key=int)],
            "counters": {key: after[key] - before[key] for key in after},
            "decode_counters": {key: after[key] - (decoding or before)[key] for key in after},
            "totals": after,
        }

    def time_layers(self) -> None:
        """Start timing the layers of the offloaded model; see `TimedWorker.time_layers`."""
        self.llm.collective_rpc("time_layers")

    def layer_times(self) -> dict[str, Any]:
        """What was timed since the last call, by the first worker."""
        return self.llm.collective_rpc("layer_times")[0]

    def _tokenize(self, texts: list[str], prompt_tokens: int | None) -> list[int]:
        tokenizer = self.llm.get_tokenizer()
        if prompt_tokens is None:
            return tokenizer.encode(texts[0])
        ids: list[int] = []
        while len(ids) < prompt_tokens:
            for text in texts:
                ids += tokenizer.encode(text)
        return ids[:prompt_tokens]


if __name__ == "__main__":
    serve(Runner)
