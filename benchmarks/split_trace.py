"""Split a trace into requests to replay and requests to remember, no kind of request on both sides.

python benchmarks/split_trace.py TRACE.npz held-out.npz history.npz
python benchmarks/split_trace.py TRACE.npz held-out.npz history-10.npz --requests 10
vllm-moe-offload replay held-out.npz --history history.npz --slots 25%
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_moe_offload.trace.trace import Trace
from vllm_moe_offload.trace.trace_file import read_trace, write_trace


def split(trace: Trace, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Requests to replay, those of kinds drawn until they are ``share`` of all; and the others.

    Raises:
        ValueError: the trace does not say of what kind its requests are, or all are of one.
    """
    if trace.group is None:
        raise ValueError("the trace has no `group`, so that requests of one kind cannot be kept together")
    kinds, members = np.unique(trace.group, return_inverse=True)
    if len(kinds) < 2:
        raise ValueError(f"all requests are of the kind '{kinds[0]}'")
    order = np.random.default_rng(seed).permutation(len(kinds))
    total = np.cumsum(np.bincount(members)[order])
    count = min(int(np.searchsorted(total, share * len(members))) + 1, len(kinds) - 1)
    held_out = np.isin(members, order[:count])
    return np.flatnonzero(held_out), np.flatnonzero(~held_out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("held_out", type=Path, help="file to write: requests to replay")
    parser.add_argument("history", type=Path, help="file to write: requests to remember")
    parser.add_argument("--share", type=float, default=0.25, help="of the requests, to be held out")
    parser.add_argument("--requests", type=int, help="remember only so many, drawn at random; default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    trace = read_trace(options.trace).without_repetitive()
    try:
        held_out, others = split(trace, options.share, options.seed)
    except ValueError as error:
        parser.error(f"{options.trace}: {error}")
    if options.requests is not None:
        drawn = np.random.default_rng(options.seed).permutation(len(others))[: options.requests]
        others = others[np.sort(drawn)]
    for path, chosen in ((options.held_out, held_out), (options.history, others)):
        part = trace.select(chosen)
        write_trace(path, part)
        print(f"{path}: {part.num_requests} requests, {part.num_tokens} tokens")


if __name__ == "__main__":
    main()
