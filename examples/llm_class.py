"""vLLM's LLM class with a quarter of the experts in memory.

python examples/llm_class.py [MODEL] [--cache 25%]
"""

import argparse
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

BUNDLED = Path(__file__).parent / "models" / "tiny-moe"
PROMPTS = ["def add(a, b):", "Question: Tom has 5 apples and buys 7 more. How many has he?\nAnswer:"]


def main(model: str, cache: str, **engine: Any) -> None:
    llm = LLM(model, max_model_len=256, additional_config={"moe_offload": {"cache": cache}}, **engine)
    for request in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=32)):
        print(repr(request.prompt + request.outputs[0].text))
    for stats in llm.collective_rpc("moe_offload_stats"):
        uses = stats["hits"] + stats["misses"]
        print(f"{stats['slots']} slots for {stats['experts']} experts: {stats['hits'] / uses:.0%} of {uses} uses hit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BUNDLED))
    parser.add_argument("--cache", default="25%")
    main(**vars(parser.parse_args()))
