"""What a layer pays for its experts with and without the daemon: microseconds of a hit, and of a miss of one record.

No model and no kernel: one process serves the same random steps from its own slots and from a daemon's, in turns. Every
record has been read before, so that no miss checks a checksum.

    python benchmarks/misses.py STORE_FOLDER --budget 25%
    python benchmarks/misses.py STORE_FOLDER --budget 25% --checkout before=../before   # and from another daemon's
"""

import argparse
import contextlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from comparison import checkout
from rich.console import Console
from rich.table import Table

from vllm_moe_offload.bench.summary import Spread
from vllm_moe_offload.client.client import DaemonClient
from vllm_moe_offload.client.connection import Connection
from vllm_moe_offload.client.launch import start_daemon
from vllm_moe_offload.config import CacheBudget
from vllm_moe_offload.ipc.protocol import Attach, Stop
from vllm_moe_offload.plan.loads import read_everything
from vllm_moe_offload.pool import local_pools
from vllm_moe_offload.runtime import Batch, OffloadRuntime
from vllm_moe_offload.stats import Stats
from vllm_moe_offload.store.pools import pools_of
from vllm_moe_offload.store.reader import Store

Times = dict[int, list[float]]
"""Seconds of a layer's ``hold``, by how many records it missed."""


def serve(runtime: OffloadRuntime, steps: int, top_k: int, seed: int) -> Times:
    """Time every layer of random decode steps of one row, most of it among preferred experts."""
    draw = np.random.default_rng(seed)
    taste = np.random.default_rng(0)
    preferred = {name: taste.random(layer.experts) ** 2 for name, layer in runtime.layers.items()}
    times: Times = {}
    for _ in range(steps):
        runtime.begin_step(Batch(1))
        for name, layer in runtime.layers.items():
            noise = draw.random(layer.experts) * preferred[name]
            chosen = np.argsort(-noise)[None, :top_k].astype(np.int32)
            before, started = runtime.stats.misses, time.perf_counter()
            for _ in runtime.serve(layer, chosen):
                took = time.perf_counter() - started
            times.setdefault(runtime.stats.misses - before, []).append(took)
    return times


@contextlib.contextmanager
def imported_from(checkout: Path) -> Iterator[None]:
    """Processes that are started meanwhile import the package from there."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(checkout.absolute())
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


@contextlib.contextmanager
def attached(store: Store, budget: int, policy: str, checkout: Path) -> Iterator[OffloadRuntime]:
    """A runtime whose slots are a daemon's, which is started for it from ``checkout`` and ended."""
    with tempfile.TemporaryDirectory() as folder:
        socket, stats = Path(folder) / "daemon.sock", Stats()
        options = ["--store", str(store.path.parent.absolute()), "--policy", policy, "--history", "off"]
        with imported_from(checkout):
            start_daemon(socket, f"{budget}B", 60.0, options)
        request = Attach(store.path.name, os.getpid(), budget, False, "benchmark", 0)
        client = DaemonClient(socket, request, store, policy, None, stats)
        yield OffloadRuntime(store, client.pools, stats, client)
        client.close()
        control = Connection.connect(socket, "control", 10.0)
        control.request(Stop())
        control.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--budget", type=CacheBudget.parse, default="25%")
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40, help="per round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--policy", default="lfu")
    parser.add_argument(
        "--checkout",
        type=checkout,
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="another daemon's code",
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    store = Store.open(options.store)
    share = options.budget.share
    slots = {members.layout: members.experts for members in pools_of(store.layers)}
    total = sum(layout.payload_bytes * experts for layout, experts in slots.items())
    budget = int(total * share) if share else options.budget.size
    own = {layout: max(options.top_k, int(experts * budget / total)) for layout, experts in slots.items()}
    embedded = OffloadRuntime(store, local_pools(store, own, options.policy, None), Stats())
    checkouts = {"daemon": Path(__file__).parent.parent, **dict(options.checkout)}
    with contextlib.ExitStack() as daemons:
        arms = {"embedded": embedded}
        for name, folder in checkouts.items():
            arms[name] = daemons.enter_context(attached(store, budget, options.policy, folder))
        for runtime in arms.values():
            read_everything(runtime)
            serve(runtime, options.steps, options.top_k, 1)
        rounds: dict[str, list[Times]] = {name: [] for name in arms}
        for number, (name, runtime) in itertools.product(range(options.rounds), arms.items()):
            rounds[name].append(serve(runtime, options.steps, options.top_k, 2 + number))
    table = Table("", "hit us", "1 miss us", "misses per layer", title=f"{store.path.name}, {budget / total:.0%}")
    medians = {
        name: {missed: Spread.of([float(np.median(times[missed])) for times in runs]) for missed in (0, 1)}
        for name, runs in rounds.items()
    }
    for name, spreads in medians.items():
        count = np.mean([missed for times in rounds[name] for missed, all_ in times.items() for _ in all_])
        table.add_row(name, spreads[0].show(1e6, 1), spreads[1].show(1e6, 1), f"{count:.2f}")
    Console().print(table)
    for name in arms:
        ratios = [
            float(np.median(there[1]) / np.median(here[1]))
            for there, here in zip(rounds[name], rounds["daemon"], strict=True)
        ]
        if name != "daemon":
            print(f"1 miss, {name} / daemon: {Spread.of(ratios).show(1, 3)} in {options.rounds} rounds")
    if options.json:
        options.json.write_text(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
