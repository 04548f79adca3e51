"""Compare plain vLLM with vllm-moe-offload at several budgets: time per token, prefill, memory, loads, stalls.

Engines take turns on the same prompts; ratios pair the runs of a round (see comparison.py). With `--arm` the plugin is
tried in several configurations at each budget, and with `--reference` ratios are to one of these. With `--checkout`
each of them also runs with the plugin of another checkout: before and after a change, in one run.

    python benchmarks/decode.py --model /tmp/wide --budgets 25%,100% --batch 1,8 --compiled --eager
    python benchmarks/decode.py --model /tmp/wide --budgets 25%,50% --warm /tmp/warm --reference none \\
        --arm none='{"predictor": "none"}' --arm history='{"predictor": "history"}'
    git worktree add /tmp/old main~5
    python benchmarks/decode.py --model /tmp/wide --budgets 25% --no-plain --checkout old=/tmp/old --reference old
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from comparison import (
    PLAIN,
    Arm,
    Comparison,
    Conditions,
    Workload,
    checkout,
    references_of,
    variants_of,
    write_result,
)
from engines import Variant
from prompts import EXAMPLES, read_prompts
from warm import HELD_OUT, HISTORY, TINY_MOE

from vllm_moe_offload.sizes import parse_size


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; `texts` holds the prompts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--model", type=Path, default=TINY_MOE, help="see widen.py for bigger ones")
    add(
        "--budgets",
        type=lambda text: text.split(","),
        default=["25%", "50%", "99.9%", "100%"],
        help="shares or sizes: 25%%,2GiB; 99.9%% shows what a cache costs that has nothing to load",
    )
    add(
        "--arm",
        type=Arm.parse,
        action="append",
        dest="arms",
        metavar="NAME=JSON",
        help="a configuration of the plugin to try at every budget; may be repeated (default: the plugin's own)",
    )
    add(
        "--checkout",
        type=checkout,
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="run every arm also with the plugin of this checkout; may be repeated",
    )
    add("--reference", default=PLAIN, metavar="ARM", help="ratios are to this arm at the same budget, or to plain vLLM")
    add("--warm", type=Path, metavar="FOLDER", help="made by warm.py: every engine starts with a copy of that history")
    add("--batch", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8], help="batch sizes: 1,8")
    add(
        "--prompts",
        type=Path,
        nargs="+",
        help="JSON lines with a field text (default: those held out from --warm, else examples/prompts.jsonl)",
    )
    add("--prompt-tokens", type=int, help="join prompts to exactly this many tokens (default: as they are)")
    add("--tokens", type=int, default=64, help="tokens to generate per request")
    add("--rounds", type=int, default=5, help="how often each engine runs each batch, after one warm-up")
    add("--compiled", action="store_true", help="with torch.compile (the default; with --eager: both)")
    add("--eager", action="store_true", help="without torch.compile")
    add("--max-model-len", type=int, help="as in vLLM")
    add("--memory-limit", type=parse_size, metavar="SIZE", help="each engine in a memory cgroup of its own (root)")
    add("--drop-caches", action="store_true", help="drop the page cache before each start (root)")
    add("--restart", action="store_true", help="a fresh engine for every run, instead of engines that wait their turn")
    add("--preload", metavar="LIBRARY", help="LD_PRELOAD for every engine, plain too: tcmalloc for example")
    add("--no-plain", action="store_true", help="leave plain vLLM out")
    add("--json", type=Path, metavar="FILE", help="write everything measured here")
    options = parser.parse_args(arguments)
    arms = options.arms or [Arm("", {})]
    options.arms = arms + [arm.of(*other) for other in options.checkout for arm in arms]
    try:
        options.references = references_of(options.arms, options.budgets, options.reference)
    except ValueError as error:
        parser.error(str(error))
    default = EXAMPLES if options.warm is None else options.warm / HELD_OUT
    options.texts = [prompt.text for prompt in read_prompts(options.prompts or [default])]
    return options


def compare(options: argparse.Namespace, eager: bool) -> Comparison:
    """The comparison the options describe, with or without torch.compile."""
    arguments: dict[str, Any] = {
        "model": str(options.model),
        "enforce_eager": eager,
        "enable_prefix_caching": False,
        "max_num_seqs": max(options.batch),
    }
    if options.max_model_len:
        arguments["max_model_len"] = options.max_model_len
    plain = [] if options.no_plain else [Variant(PLAIN, None, arguments)]
    history = None if options.warm is None else options.warm / HISTORY
    return Comparison(
        "eager" if eager else "compiled",
        plain + variants_of(options.arms, options.budgets, arguments, history),
        options.references,
        Workload(options.texts, options.batch, options.tokens, options.rounds, options.prompt_tokens),
        Conditions(options.memory_limit, options.preload, options.drop_caches, options.restart),
    )


def main() -> int:
    """The command line. Ends with 1 if an engine failed."""
    options = parse_options()
    modes = [False] * (options.compiled or not options.eager) + [True] * options.eager
    comparisons = []
    for eager in modes:
        comparison = compare(options, eager)
        comparison.measure()
        comparison.show()
        comparisons.append(comparison)
    if options.json:
        write_result(options.json, comparisons=[comparison.as_dict() for comparison in comparisons])
    return int(any(comparison.failures for comparison in comparisons))


if __name__ == "__main__":
    sys.exit(main())
