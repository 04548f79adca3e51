"""Does a request's embedding find requests that route alike? Measured by what neighbours found with it predict.

Without --trace the bundled model answers the bundled prompts first, with the plugin recording. Every request is then
held out in turn, and its generated tokens are predicted by neighbours among an equal number of tokens of other
requests: those with the nearest prompt embeddings, the most recent, random ones, or (where groups are known) random
ones of its group.

    python benchmarks/embedding.py [--prompts MORE.jsonl] [--save TRACE.npz]
    python benchmarks/embedding.py --trace TRACE.npz --candidates 5000
"""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_moe_offload.predict.base import ModelShape
from vllm_moe_offload.predict.neighbours import NeighboursPredictor
from vllm_moe_offload.replay.accuracy import Accuracy
from vllm_moe_offload.replay.forecast import forecast
from vllm_moe_offload.trace.history import HistoryStore
from vllm_moe_offload.trace.trace import DECODE, Trace
from vllm_moe_offload.trace.trace_file import read_trace, write_trace

EXAMPLES = Path(__file__).parent.parent / "examples"
DISTANCE = 2
MOST_TOKENS_TESTED = 200
Order = Callable[[int], NDArray[np.integer]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="measure this trace instead of recording one")
    parser.add_argument("--prompts", type=Path, nargs="*", default=[EXAMPLES / "prompts.jsonl"])
    parser.add_argument("--model", type=Path, default=EXAMPLES / "models" / "tiny-moe")
    parser.add_argument("--tokens", type=int, default=64, help="generated per prompt")
    parser.add_argument("--candidates", type=int, nargs="*", default=[250, 1000], help="tokens matched against")
    parser.add_argument("--requests", type=int, help="hold out only so many, spread over the trace")
    parser.add_argument("--save", type=Path, help="keep the recorded trace here")
    arguments = parser.parse_args()
    trace = read_trace(arguments.trace) if arguments.trace else record(arguments)
    trace = trace.without_repetitive()
    print(
        f"{trace.num_requests} requests, {trace.num_tokens} tokens, embeddings of {trace.embeddings.shape[1]} numbers"
    )
    print_likeness(trace)
    count = min(arguments.requests or trace.num_requests, trace.num_requests)
    held_out = np.unique(np.linspace(0, trace.num_requests - 1, count).round().astype(int))
    for candidates in arguments.candidates:
        print(f"\n{candidates} candidates, recall@{trace.top_k} / @{2 * trace.top_k}, {DISTANCE} layers ahead:")
        for name, order in orders(trace).items():
            accuracy = Accuracy(trace.num_layers, trace.top_k, (DISTANCE,))
            for request in held_out:
                predict(trace, request, order(request), candidates, accuracy)
            recalls = [accuracy.recall(DISTANCE, n)[DISTANCE:].mean() for n in accuracy.counts]
            print(f"  {name:12} {recalls[0]:.3f} / {recalls[1]:.3f}")


def record(arguments: argparse.Namespace) -> Trace:
    """Let the model answer every prompt, one after the other, and return the trace with the prompts' domains."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    prompts = [json.loads(line) for file in arguments.prompts for line in file.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "engine.trace"
        settings = {"cache": "100%", "trace": str(file), "store": folder, "history": "off"}
        llm = LLM(str(arguments.model), max_num_seqs=1, enforce_eager=True, additional_config={"moe_offload": settings})
        sampling = SamplingParams(temperature=0, max_tokens=arguments.tokens, ignore_eos=True)
        for prompt in prompts:
            llm.generate(prompt["text"], sampling, use_tqdm=False)
        llm.llm_engine.engine_core.shutdown()
        trace = replace(read_trace(file), group=np.array([prompt["domain"] for prompt in prompts]))
    if arguments.save:
        write_trace(arguments.save, trace)
    return trace


def print_likeness(trace: Trace) -> None:
    """Cosines within and across groups, and how often the nearest request is of the same group."""
    if trace.group is None:
        return
    cosines = trace.embeddings.astype(np.float32) @ trace.embeddings.astype(np.float32).T
    np.fill_diagonal(cosines, np.nan)
    alike = trace.group[:, None] == trace.group
    np.fill_diagonal(alike, False)
    shared = alike.any(axis=1)
    nearest = np.nanargmax(cosines, axis=1)
    found, chance = alike[shared, nearest[shared]].mean(), alike[shared].sum(axis=1).mean() / (trace.num_requests - 1)
    across = np.nanmean(cosines[~alike])
    print(f"nearest request is of the same group: {found:.0%} of {shared.sum()} requests, by chance {chance:.0%}")
    print(f"cosine across groups {across:.3f}; within: ", end="")
    names, sizes = np.unique(trace.group, return_counts=True)
    for name in names[np.argsort(-sizes, kind="stable")][:6]:
        own = trace.group == name
        if own.sum() > 1:
            print(f"{name} {np.nanmean(cosines[np.ix_(own, own)]):.3f} ({own.sum()})", end=", ")
    print(f"all groups {np.nanmean(cosines[alike]):.3f}")


def orders(trace: Trace) -> dict[str, Order]:
    """Ways to rank the other requests for a request, best first."""
    embeddings = trace.embeddings.astype(np.float32)
    everyone = np.arange(trace.num_requests)

    def shuffled(request: int) -> NDArray[np.integer]:
        return np.random.default_rng(request).permutation(np.delete(everyone, request))

    def nearest(request: int) -> NDArray[np.integer]:
        ranked = np.argsort(-(embeddings @ embeddings[request]), kind="stable")
        return ranked[ranked != request]

    def same_group(request: int) -> NDArray[np.integer]:
        order = shuffled(request)
        return order[np.argsort(trace.group[order] != trace.group[request], kind="stable")]

    def recent(request: int) -> NDArray[np.integer]:
        return np.roll(everyone, -request)[:0:-1]

    ways: dict[str, Order] = {"by prompt embedding": nearest, "recent": recent, "random": shuffled}
    return ways if trace.group is None else ways | {"same group": same_group}


def predict(trace: Trace, request: int, order: Iterable[int], candidates: int, accuracy: Accuracy) -> None:
    """Predict the generated tokens of ``request`` from ``candidates`` tokens of the requests that come first."""
    history, tokens = HistoryStore(trace.shape), 0
    chosen = []
    for other in order:
        if tokens >= candidates:
            break
        chosen.append(replace(trace.request(int(other)), embeddings=None))
        tokens += chosen[-1].num_tokens
    history.extend(reversed(chosen))
    predictor = NeighboursPredictor(ModelShape(*trace.shape), history, candidates)
    forecast(predictor, generated(trace.request(request)), (), accuracy)


def generated(request: Trace) -> Trace:
    """The decoded tokens of one request, without its embedding: candidates have been chosen already."""
    decoded = np.arange(request.num_tokens) if request.phase is None else np.flatnonzero(request.phase == DECODE)
    rows = decoded[:MOST_TOKENS_TESTED]
    return Trace(
        experts=request.experts[rows],
        weights=request.weights[rows],
        offsets=np.array([0, len(rows)]),
        num_experts=request.num_experts,
        tokens=None if request.tokens is None else request.tokens[rows],
    )


if __name__ == "__main__":
    main()
