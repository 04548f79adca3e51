"""What remembering and predicting cost where they cannot help: nothing is missing, TPOT on versus off.

With a budget that holds everything the plugin steps aside and remembers nothing. So the cache holds all experts but
one: every layer takes the path of a bounded cache, and after the warm-up there is practically nothing to load. The
predictor judges itself and falls silent where it saves nothing; that is part of what is measured, as it is of service.

    python benchmarks/warm.py /tmp/warm100k --model /tmp/wide --stored-tokens 100000
    python benchmarks/remembering.py --model /tmp/wide --warm /tmp/warm100k --batch 1,8
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from comparison import Arm, Comparison, console, references_of, variants_of, write_result
from prompts import read_prompts
from warm import HELD_OUT, HISTORY, TINY_MOE, TRACE

from vllm_moe_offload.bench.comparison import Workload
from vllm_moe_offload.trace.trace_file import read_trace

OFF, ON = "off", "on"
ARMS = [Arm(OFF, {"predictor": "none"}), Arm(ON, {"predictor": "history"})]


def all_but_one(model: Path) -> str:
    """The budget, as a share, that holds every expert of a model but one."""
    config = json.loads((model / "config.json").read_text())
    experts = config["num_hidden_layers"] * config["num_experts"]
    return f"{100 * (experts - 0.5) / experts:.4f}%"


def compare(options: argparse.Namespace) -> Comparison:
    """The comparison the options describe."""
    arguments: dict[str, Any] = {
        "model": str(options.model),
        "enforce_eager": options.eager,
        "enable_prefix_caching": False,
        "max_num_seqs": max(options.batch),
    }
    budget = [all_but_one(options.model)]
    texts = [prompt.text for prompt in read_prompts(options.prompts or [options.warm / HELD_OUT])]
    return Comparison(
        "eager" if options.eager else "compiled",
        variants_of(ARMS, budget, arguments, options.warm / HISTORY),
        references_of(ARMS, budget, OFF),
        Workload(texts, options.batch, options.tokens, options.rounds),
    )


def main() -> int:
    """The command line. Ends with 1 if an engine failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, default=TINY_MOE, help="see widen.py for bigger ones")
    parser.add_argument("--warm", type=Path, required=True, help="made by warm.py")
    parser.add_argument("--prompts", type=Path, nargs="+", help="default: those held out from --warm")
    parser.add_argument("--batch", type=lambda text: [int(n) for n in text.split(",")], default=[1])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    console.print(f"{read_trace(options.warm / TRACE).num_tokens} tokens stored")
    comparison = compare(options)
    comparison.measure()
    comparison.show()
    if options.json:
        write_result(options.json, comparison=comparison.as_dict())
    return int(bool(comparison.failures))


if __name__ == "__main__":
    sys.exit(main())
