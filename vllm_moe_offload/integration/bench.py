"""What `bench` has processes of their own do: vLLM's engine, with or without offloading, and the loop that times it.

    python -m vllm_moe_offload.integration.bench JOB

Must measure only: every number it returns was taken here, around vLLM's own engine loop. It is run from other checkouts
too, and imports nothing of this package but what reads a command line.
"""

import time
from typing import Any

OFFLOADED = "moe_offload"


class Runner:
    """vLLM's engine and the loop that times it. See bench/protocol.py.

    Args:
        arguments: keyword arguments of vLLM's ``LLM``.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        started = time.perf_counter()
        self.llm = LLM(**arguments)
        self.load_seconds = time.perf_counter() - started
        self.is_offloading = bool(arguments.get("additional_config", {}).get(OFFLOADED))
        self.requests = 0

    def loaded(self) -> dict[str, Any]:
        """What loading took, in seconds, and the plugin's counters after it."""
        return {"load_seconds": self.load_seconds, "totals": self.counters()}

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

    def _tokenize(self, texts: list[str], prompt_tokens: int | None) -> list[int]:
        tokenizer = self.llm.get_tokenizer()
        if prompt_tokens is None:
            ids: list[int] = tokenizer.encode(texts[0])
            return ids
        ids = []
        while len(ids) < prompt_tokens:
            for text in texts:
                ids += tokenizer.encode(text)
        return ids[:prompt_tokens]


def keyword_arguments(command_line: list[str]) -> dict[str, Any]:
    """Arguments of ``vllm serve`` as keyword arguments of ``LLM``; ends the process where it does not know one."""
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm-moe-offload bench MODEL --"))
    given = EngineArgs.from_cli_args(parser.parse_args(command_line))
    usual = EngineArgs.from_cli_args(parser.parse_args(["--model", given.model]))
    values = {field.name: getattr(given, field.name) for field in fields(EngineArgs)}
    return {name: value for name, value in values.items() if name == "model" or value != getattr(usual, name)}


def _create(job: dict[str, Any]) -> Runner:
    """``job``: ``command_line``, and ``arguments`` that hold whatever it says."""
    return Runner(keyword_arguments(job["command_line"]) | job["arguments"])


if __name__ == "__main__":
    from ..bench.protocol import serve

    serve(_create)
