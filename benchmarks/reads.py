"""What the disk gives O_DIRECT reads of a record's size, and what the plugin's loader makes of it.

Both read the same records of one store in the same random order with as many reads in flight; they take turns. The
loader is given as many records at a time as a step might miss, and waited for.

    python benchmarks/reads.py STORE_FOLDER --batch 8
"""

import argparse
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from report import Spread
from rich.console import Console
from rich.table import Table

from vllm_moe_offload.prefetch.loader import Load, RecordLoader
from vllm_moe_offload.store.files import aligned_buffer
from vllm_moe_offload.store.reader import Store

LOADER_THREADS = 4
# The loader's caller reads along with its threads.
DEPTH = LOADER_THREADS + 1
DISK = "disk"

Expert = tuple[int, int]


def raw_seconds(store: Store, experts: Sequence[Expert]) -> float:
    """Time of plain preadv calls for these records, DEPTH of them in flight."""
    positions = [(store.offset(layer, expert), store.layers[layer].layout.record_bytes) for layer, expert in experts]

    def read(mine: Sequence[tuple[int, int]]) -> None:
        buffer = memoryview(aligned_buffer(max(size for _, size in positions)))
        for position, size in mine:
            if os.preadv(store.fd, [buffer[:size]], position) != size:
                raise OSError(f"short read at {position} of {store.path}")

    threads = [threading.Thread(target=read, args=(positions[i::DEPTH],)) for i in range(DEPTH)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def loader_seconds(store: Store, loader: RecordLoader, experts: Sequence[Expert], batch: int) -> float:
    """Time of the plugin's loader for these records, `batch` demanded at a time, in reused slots."""
    slots = [memoryview(aligned_buffer(max(entry.layout.record_bytes for entry in store.layers))) for _ in range(batch)]
    started = time.perf_counter()
    for start in range(0, len(experts), batch):
        loads = []
        for (layer, expert), slot in zip(experts[start : start + batch], slots, strict=False):
            parts = [np.frombuffer(part, np.uint8) for part in store.layers[layer].layout.parts(slot)]
            loads.append(Load(layer, expert, parts))
        loader.demand(loads)
        for load in loads:
            if load.error is not None:
                raise load.error
    return time.perf_counter() - started


def measure(store: Store, batches: Sequence[int], rounds: int, count: int, seed: int) -> dict[str, list[float]]:
    """Bytes per second per way of reading, one number per round, after a pass that verifies every checksum."""
    everything = [(layer, expert) for layer, entry in enumerate(store.layers) for expert in range(entry.experts)]
    loader = RecordLoader(store, threads=LOADER_THREADS)
    ways: dict[str, Callable[[Sequence[Expert]], float]] = {DISK: lambda experts: raw_seconds(store, experts)}
    for batch in batches:
        ways[f"loader, {batch} at a time"] = lambda experts, batch=batch: loader_seconds(store, loader, experts, batch)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    shuffle = random.Random(seed)
    try:
        loader_seconds(store, loader, everything, DEPTH)
        for _ in range(rounds):
            experts = shuffle.sample(everything, min(count, len(everything)))
            size = sum(store.layers[layer].layout.record_bytes for layer, _ in experts)
            for name, seconds in ways.items():
                rates[name].append(size / seconds(experts))
    finally:
        loader.close()
    return rates


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("store", type=Path, help="folder of one store: `vllm-moe-offload store ls` lists them")
    parser.add_argument(
        "--batch", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 8, 32], help="records per demand"
    )
    parser.add_argument("--records", type=int, default=256, help="records per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    store = Store.open(options.store)
    rates = measure(store, options.batch, options.rounds, options.records, options.seed)
    record = store.layers[0].layout.record_bytes / 2**20
    how = "O_DIRECT" if store.direct else "buffered: this file system has no O_DIRECT"
    table = Table("reader", "MiB/s", "x disk", title=f"records of {record:.2f} MiB, {how}")
    for name, rate in rates.items():
        ratio = Spread.of([ours / disk for ours, disk in zip(rate, rates[DISK], strict=True)])
        table.add_row(name, Spread.of(rate).show(2**-20, 0), ratio.show())
    Console().print(table)
    if options.json:
        result = {"record_mib": record, "direct": store.direct, "depth": DEPTH, "bytes_per_second": rates}
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
