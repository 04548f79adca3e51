"""What the disk gives O_DIRECT reads of a record's size, and what the plugin makes of it.

The disk: plain reads of random records into huge pages, as much memory as the slots take. The plugin: demands of
absent experts by an engine's own pools, with a quarter of the experts in slots, as many at a time as a step might
miss. Each is compared with as many plain reads in flight as its threads can have. They take turns.

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

from rich.console import Console
from rich.table import Table

from vllm_moe_offload.bench.summary import Spread
from vllm_moe_offload.plan.loads import AT_ONCE, SHARE, Demands
from vllm_moe_offload.store.direct import aligned_buffer
from vllm_moe_offload.store.reader import Store

# The loader's caller reads along with its threads.
DEPTH = AT_ONCE


class BareReads:
    """Plain preadv calls into `slots` places of one buffer of huge pages."""

    def __init__(self, store: Store, slots: int, seed: int) -> None:
        self._store = store
        self._largest = max(entry.layout.record_bytes for entry in store.layers)
        self._buffer = memoryview(aligned_buffer(slots * self._largest))
        self._slots = slots
        self._records = [(layer, expert) for layer, entry in enumerate(store.layers) for expert in range(entry.experts)]
        self._draw = random.Random(seed)

    def rate(self, count: int, in_flight: int) -> float:
        """Bytes per second of reading `count` random records, `in_flight` at a time."""
        reads = []
        for layer, expert in self._draw.choices(self._records, k=count):
            start = self._draw.randrange(self._slots) * self._largest
            size = self._store.layers[layer].layout.record_bytes
            reads.append((self._buffer[start : start + size], self._store.offset(layer, expert)))

        def read(mine: Sequence[tuple[memoryview, int]]) -> None:
            for into, position in mine:
                if os.preadv(self._store.fd, [into], position) != len(into):
                    raise OSError(f"short read at {position} of {self._store.path}")

        threads = [threading.Thread(target=read, args=(reads[i::in_flight],)) for i in range(in_flight)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(len(into) for into, _ in reads) / (time.perf_counter() - started)


def disk(in_flight: int) -> str:
    """What plain reads are called."""
    return f"disk, {in_flight} in flight"


def plugin(batch: int) -> str:
    """What demands are called."""
    return f"plugin, {batch} at a time"


def demand_rate(demands: Demands, count: int, batch: int) -> float:
    """Bytes per second of demanding `count` experts, `batch` at a time."""
    waits = [demands.load(batch) for _ in range(-(-count // batch))]
    return sum(size for _, size in waits) / sum(seconds for seconds, _ in waits)


def measure(store: Store, batches: Sequence[int], rounds: int, count: int, seed: int) -> dict[str, list[float]]:
    """Bytes per second per way of reading, one number per round."""
    with Demands(store, SHARE, seed) as demands:
        bare = BareReads(store, demands.slots, seed)
        bare.rate(2 * demands.slots, DEPTH)  # most of its memory is taken by then
        ways: dict[str, Callable[[], float]] = {}
        for batch in batches:
            in_flight = min(batch, DEPTH)
            ways[disk(in_flight)] = lambda in_flight=in_flight: bare.rate(count, in_flight)
            ways[plugin(batch)] = lambda batch=batch: demand_rate(demands, count, batch)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, rate in ways.items():
                rates[name].append(rate())
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
    references = {plugin(batch): rates[disk(min(batch, DEPTH))] for batch in options.batch}
    for name, rate in rates.items():
        pairs = zip(rate, references.get(name, rate), strict=True)
        ratio = Spread.of([ours / theirs for ours, theirs in pairs])
        table.add_row(name, Spread.of(rate).show(2**-20, 0), ratio.show())
    Console().print(table)
    if options.json:
        result = {"record_mib": record, "direct": store.direct, "depth": DEPTH, "bytes_per_second": rates}
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
