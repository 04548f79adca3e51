"""What a user would pick instead of the plugin, side by side: llama.cpp, accelerate's disk offload, and plain vLLM.

All run the same checkpoint on the same prompts, one request at a time, and take turns: every run has a fresh process in
a memory cgroup of its own (the page cache counts), started after the page cache was dropped, and generates once to warm
up. Plain vLLM has everything in memory and no limit. Needs root, and Linux.

Limits are equal for all peers (`--memory-limit`: what one needs besides experts is lost for them), or each peer gets
what it needs besides experts and the same share of these (`--share`). The former is measured first, without a limit.

    python benchmarks/widen.py /tmp/wide7424 --intermediate 7424
    python benchmarks/peers.py /tmp/peers --model /tmp/wide7424 --memory-limit 4GiB --json equal-memory.json
    python benchmarks/peers.py /tmp/peers --model /tmp/wide7424 --share 25% --json equal-share.json

Neither peer is a dependency of this project. Each runs in the interpreter it is given:

    python -m venv llama; llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python gguf tokenizers
    python -m venv hf; hf/bin/pip install torch transformers accelerate
    … --llama-python llama/bin/python --accelerate-python hf/bin/python

Peers are named `plain`, `ours`, `llama-bf16`, `llama-f16` and `accelerate`; `llama-bf16@128` is llama.cpp while the
disk's read-ahead, with which the kernel serves page faults in mapped files, is 128 KiB. It is restored afterwards.
"""

import argparse
import itertools
import json
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from comparison import PLAIN, Comparison, Conditions, console, write_result
from footprint import GIB, Allowance
from peer_engines import ACCELERATE, LLAMA, OURS, Bench, Peer
from prompts import EXAMPLES, read_prompts
from rich.table import Table
from warm import TINY_MOE

from vllm_moe_offload.bench.comparison import Workload
from vllm_moe_offload.bench.engine import EngineError
from vllm_moe_offload.bench.summary import Spread, tpot
from vllm_moe_offload.sizes import parse_size

DEFAULT_PEERS = "ours,llama-bf16,llama-bf16@128,llama-f16,accelerate,accelerate@128,plain"
COLUMNS = ("peer", "limit GiB", "experts that fit", "tokens/s", "ours x", "TTFT s", "peak GiB", "tokens as plain")


def parse_share(text: str) -> float:
    """0.25 of "25%". Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if not match or not 0 < float(match[1]) <= 100:
        raise ValueError(f"--share {text}: must be above 0% and at most 100%, like 25%")
    return float(match[1]) / 100


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("folder", type=Path, help="for the peers' files and what was measured of them, on the disk to measure")
    add("--model", type=Path, default=TINY_MOE, help="a Qwen3-MoE checkpoint; see widen.py for bigger ones")
    limit = parser.add_mutually_exclusive_group(required=True)
    limit.add_argument("--memory-limit", type=parse_size, metavar="SIZE", help="of every peer but plain: 4GiB")
    limit.add_argument("--share", metavar="PERCENT", help="of the experts, for every peer: 25%%")
    add("--peers", default=DEFAULT_PEERS, help=f"in the order of their turns (default: {DEFAULT_PEERS})")
    add("--llama-python", default=sys.executable, metavar="PYTHON", help="interpreter with llama_cpp, gguf, tokenizers")
    add("--accelerate-python", default=sys.executable, metavar="PYTHON", help="interpreter with accelerate")
    add("--prompts", type=Path, nargs="+", default=[EXAMPLES], help="JSON lines with a field text")
    add("--tokens", type=int, default=32, help="tokens to generate per request")
    add("--rounds", type=int, default=3, help="how often each peer runs; 0: only write files and measure needs")
    add("--eager", action="store_true", help="vLLM, ours and plain, without torch.compile")
    add("--json", type=Path, metavar="FILE", help="write everything measured here; rounds that are in it already stay")
    options = parser.parse_args(arguments)
    try:
        options.peers = [Peer.parse(name) for name in options.peers.split(",")]
        options.share = None if options.share is None else parse_share(options.share)
    except ValueError as error:
        parser.error(str(error))
    if options.tokens < 2:
        parser.error(f"--tokens {options.tokens}: at least 2, so that there is a time between two")
    return options


def earlier_rounds(path: Path | None, settings: Mapping[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """The rounds of an earlier call that wrote `path`; none if it is missing. Raises ValueError for other settings."""
    if path is None or not path.exists():
        return []
    before = json.loads(path.read_text())
    changed = [key for key in settings if before["settings"][key] != settings[key]]
    if changed:
        raise ValueError(f"--json {path}: has rounds with another {' and '.join(changed)}; name another file")
    return before["comparison"]["batches"]["1"]["rounds"]


def leading_equal(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """How many tokens agree before the first that does not."""
    pairs = zip(tokens, reference, strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def table(
    title: str,
    rounds: Sequence[Mapping[str, Mapping[str, Any]]],
    allowances: Mapping[str, Allowance],
    failures: Mapping[str, str],
    expert_bytes: int,
) -> Table:
    """One row per peer, medians with (low-high); `ours x` is how many times faster ours was in the same round."""
    result = Table(*COLUMNS, title=title)
    for name in dict.fromkeys(name for results in rounds for name in results):
        runs = [results[name] for results in rounds if name in results]
        ratios = [tpot(results[name]) / tpot(results[OURS]) for results in rounds if {name, OURS} <= set(results)]
        agreeing = [
            leading_equal(results[name]["tokens"][0], results[PLAIN]["tokens"][0])
            for results in rounds
            if {name, PLAIN} <= set(results)
        ]
        limit, experts = allowances[name]
        result.add_row(
            name,
            "none" if limit is None else f"{limit / GIB:.2f}",
            f"{experts / expert_bytes:.0%}",
            Spread.of([1 / tpot(run) for run in runs]).show(),
            Spread.of(ratios).show() if ratios else "-",
            Spread.of([run["ttft"] for run in runs]).show(),
            f"{max(run['peak_bytes'] for run in runs) / GIB:.2f}",
            f"{median(agreeing):.0f} of {len(runs[0]['tokens'][0])}" if agreeing else "-",
        )
    for name, reason in failures.items():
        result.add_row(name, f"FAILED: {reason}", *["-"] * (len(COLUMNS) - 2))
    return result


def prepare(bench: Bench, options: argparse.Namespace) -> tuple[dict[Peer, Allowance], dict[str, str]]:
    """Make the files of all peers and find what each may use; the second are those for which that failed, and why."""
    allowances, failures = {}, {}
    for peer in options.peers:
        try:
            allowances[peer] = _allowance(bench, peer, options)
        except (EngineError, ValueError) as error:
            failures[peer.name] = str(error)
    return allowances, failures


def _allowance(bench: Bench, peer: Peer, options: argparse.Namespace) -> Allowance:
    if peer.kind == PLAIN:
        return Allowance(None, bench.weights.experts)
    bench.write_gguf(peer)
    return Allowance.of(bench.footprint(peer), bench.weights.experts, options.memory_limit, options.share)


def main() -> int:
    """The command line. Ends with 1 if a peer failed."""
    options = parse_options()
    # So that engines end and the disk's read-ahead comes back when this process is terminated.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    pythons = {LLAMA: options.llama_python, ACCELERATE: options.accelerate_python}
    texts = [prompt.text for prompt in read_prompts(options.prompts)]
    bench = Bench(options.folder, options.model, pythons, texts[0], options.eager)
    allowances, failures = prepare(bench, options)
    by_name = {peer.name: allowance for peer, allowance in allowances.items()}
    settings = {
        "model": str(options.model),
        "tokens": options.tokens,
        "limits": {name: allowance.limit for name, allowance in by_name.items()},
    }
    comparison = Comparison(
        options.model.name,
        [bench.variant(peer, allowance) for peer, allowance in allowances.items()],
        dict.fromkeys(by_name, OURS),
        Workload(texts, [1], options.tokens, options.rounds),
        Conditions(drop_caches=True, restart=True),
    )
    comparison.failures |= failures
    try:
        comparison.rounds[1] = earlier_rounds(options.json, settings)
    except ValueError as error:
        sys.exit(str(error))
    comparison.measure()
    rounds = comparison.rounds[1]
    title = f"{options.model.name}, {options.tokens} tokens, {len(rounds)} rounds"
    console.print(table(title, rounds, by_name, comparison.failures, bench.weights.experts))
    if options.json:
        write_result(options.json, settings=settings, comparison=comparison.as_dict())
    return int(bool(comparison.failures))


if __name__ == "__main__":
    sys.exit(main())
