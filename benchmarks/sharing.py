"""What engines that share a daemon save: memory of experts in all processes together, and the time to the first token.

Engines start one after another and stay; the last one finds the daemon warm. Compared with one that starts cold with
slots of its own.

    python benchmarks/sharing.py --model /tmp/wide --budget 25% --engines 4
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import psutil
from engines import Engine, Variant
from memory import drop_caches
from prompts import EXAMPLES, read_prompts
from rich.console import Console
from rich.table import Table

from vllm_moe_offload.bench.memory import descendants
from vllm_moe_offload.client.connection import Connection
from vllm_moe_offload.client.launch import start_daemon
from vllm_moe_offload.config import CacheBudget
from vllm_moe_offload.ipc.protocol import Stop
from vllm_moe_offload.store import default_root

TINY_MOE = Path(__file__).parent.parent / "examples" / "models" / "tiny-moe"


def arena_pss(pids: list[int]) -> int:
    """Bytes of shared experts that these processes map, each page divided among those that map it."""
    total = 0
    for pid in pids:
        in_arena = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
                in_arena = "memfd:moe-offload:" in line and " experts" in line
            elif in_arena and line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def first_tokens(engine: Engine, text: str) -> dict[str, Any]:
    """The first 64 tokens of an engine, and then 64 more of the same."""
    first, second = (engine.run([[text]], 64) for _ in range(2))
    return {
        "start": engine.loaded["load_seconds"],
        "model": engine.loaded["model_seconds"],
        "ttft": first["ttft"],
        "first_hits": _hit_rate(first["counters"]),
        "steady_hits": _hit_rate(second["counters"]),
    }


def _hit_rate(counters: dict[str, float]) -> float:
    return counters["hits"] / max(1, counters["hits"] + counters["misses"])


def print_rows(rows: dict[str, dict[str, Any]]) -> None:
    table = Table(
        "",
        "to the first token, s",
        "x cold",
        "of it model and request, s",
        "x cold",
        "hits, first 64",
        "hits, next 64",
        "experts MiB, all processes",
    )
    cold = rows["embedded, cold"]
    for name, row in rows.items():
        arena = f"{row['arena_bytes'] / 2**20:.1f}" if "arena_bytes" in row else "-"
        times = [(row[part] + row["ttft"], cold[part] + cold["ttft"]) for part in ("start", "model")]
        table.add_row(
            name,
            *(text for ours, theirs in times for text in (f"{ours:.2f}", f"{ours / theirs:.2f}")),
            f"{row['first_hits']:.1%}",
            f"{row['steady_hits']:.1%}",
            arena,
        )
    Console(width=140).print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", type=Path, default=TINY_MOE)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--daemon-cache", required=True, help="memory of the daemon: 150MiB")
    parser.add_argument("--drop-caches", action="store_true", help="drop the page cache before the cold start (root)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    assert CacheBudget.parse(options.daemon_cache).size
    text = read_prompts([EXAMPLES])[0].text
    arguments = {"model": str(options.model), "enforce_eager": True, "enable_prefix_caching": False}
    offload = {"cache": options.budget, "predictor": "none"}
    rows: dict[str, dict[str, Any]] = {}
    if options.drop_caches:
        drop_caches()
    cold = Engine.start(Variant("embedded, cold", offload | {"daemon": "off"}, arguments))
    rows["embedded, cold"] = first_tokens(cold, text)
    cold.stop()
    with tempfile.TemporaryDirectory() as folder:
        socket, running = Path(folder) / "daemon.sock", []
        daemon = start_daemon(socket, options.daemon_cache, 600.0, ["--store", str(default_root()), "--history", "off"])
        try:
            for number in range(1, options.engines + 1):
                name = f"engine {number} at the daemon"
                running.append(Engine.start(Variant(name, offload | {"daemon": f"unix:{socket}"}, arguments)))
                rows[name] = first_tokens(running[-1], text)
                trees = [
                    p for engine in running for p in (engine.pid, *(child.pid for child in descendants(engine.pid)))
                ]
                rows[name]["arena_bytes"] = arena_pss([daemon, *trees])
        finally:
            for engine in running:
                engine.stop()
            control = Connection.connect(socket, "control", 10.0)
            control.request(Stop())
            control.close()
            psutil.wait_procs([psutil.Process(daemon)] if psutil.pid_exists(daemon) else [], timeout=30)
    print_rows(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
