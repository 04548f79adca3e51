"""Ends daemons and kills workers at random while they serve, and sees that nobody computes on a wrong record.

    python -m tests.daemon.killing --kills 200

Needs no model: the workers (reading_worker.py) check every record they would compute on.
"""

import argparse
import json
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.daemon.processes import ANSWER_SECONDS, DaemonProcess
from tests.daemon.wire import wait_until
from tests.runtime.record_stores import build_store, layout

SMALL, LARGE = layout(8192, 4096), layout(6000, 100)
LAYERS = [(SMALL, 24), (LARGE, 10), (SMALL, 24), (SMALL, 24), (LARGE, 10), (SMALL, 24)]
RECORDS = 0.7
"""Share of the experts that fit into the daemon."""
STEPS = 20


class Worker:
    """A reading worker and what it last said."""

    def __init__(self, socket: Path, store: Path, seed: int):
        command = [sys.executable, "-m", "tests.daemon.reading_worker", str(socket), str(store), str(seed)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.report: dict[str, Any] = {}
        self.hear()

    def order(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{STEPS}\n".encode())
        self.process.stdin.flush()

    def hear(self) -> None:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], ANSWER_SECONDS)
        assert ready, f"worker {self.process.pid} hangs: its last word was {self.report}"
        line = self.process.stdout.readline()
        assert line, f"worker {self.process.pid} ended with {self.process.wait()}"
        self.report = json.loads(line)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.end()

    def leave(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.end()

    def end(self) -> int:
        code = self.process.wait(ANSWER_SECONDS)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return code


@dataclass
class Host:
    """A daemon with workers, all of which may die."""

    folder: Path
    store: Path
    budget: int
    random: random.Random
    workers: list[Worker] = field(default_factory=list)
    failovers: int = 0
    comebacks: int = 0
    steps: int = 0

    def start_daemon(self) -> None:
        self.daemon = DaemonProcess(self.folder / "daemon.sock", self.budget, self.store.parent)

    def start_worker(self) -> None:
        self.workers.append(Worker(self.daemon.socket, self.store, self.random.randrange(1 << 30)))

    def work(self, kill: bool) -> None:
        """Everybody serves some steps, and meanwhile somebody dies and is replaced."""
        for worker in self.workers:
            worker.order()
        victim = self._kill_somebody() if kill else None
        for worker in self.workers:
            if worker is not victim:
                before = worker.report
                worker.hear()
                self._count(before, worker.report)
        if victim is not None:
            self.workers.remove(victim)
            self.start_worker()

    def _kill_somebody(self) -> Worker | None:
        time.sleep(self.random.random() * 0.1)
        victim = self.random.choice([None, *self.workers])
        if victim is None:
            self.random.choice([self.daemon.kill, self.daemon.stop])()
            time.sleep(self.random.random() * 0.5)
            self.start_daemon()
        else:
            victim.kill()
        return victim

    def _count(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        said = after["said"][len(before.get("said", [])) :]
        self.failovers += sum("going on without it" in line for line in said)
        self.comebacks += sum("again" in line for line in said)
        self.steps += STEPS

    def outlive_a_daemon(self) -> None:
        """Everybody works on while there is no daemon, and joins the next one."""
        self.daemon.kill()
        self.work(kill=False)
        self.start_daemon()
        self.settle()

    def settle(self) -> None:
        """Work until every worker is with the daemon that lives."""
        deadline = time.monotonic() + ANSWER_SECONDS
        while any(worker.report["daemon_pid"] != self.daemon.pid for worker in self.workers):
            assert time.monotonic() < deadline, f"not all came back: {[w.report for w in self.workers]}"
            self.work(kill=False)

    def check(self) -> None:
        """The daemon minds exactly the workers that live, within its budget."""
        (model,) = self.daemon.status().models
        assert sorted(worker.pid for worker in model.workers) == sorted(w.process.pid for w in self.workers)
        assert model.resident_bytes <= self.budget, f"{model.resident_bytes} of {self.budget} bytes"

    def end(self) -> None:
        """All leave; nothing is attached any more, and the daemon ends when told."""
        for worker in self.workers:
            assert worker.leave() == 0
        wait_until(lambda: not self.daemon.status().models[0].workers, "those who left are detached", ANSWER_SECONDS)
        self.daemon.stop()

    def abandon(self) -> None:
        """After a failure: leave no process behind."""
        self.daemon.abandon()
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.kill()


def run(folder: Path, kills: int, workers: int, seed: int) -> Host:
    """Raises AssertionError if anything goes wrong: a wrong record, a hang, a leak."""
    made = build_store(folder / "stores", LAYERS, seed)
    total = sum(part.payload_bytes * experts for part, experts in LAYERS)
    host = Host(folder, made.store.path, int(total * RECORDS), random.Random(seed))
    made.store.close()
    host.start_daemon()
    try:
        for _ in range(workers):
            host.start_worker()
        for number in range(kills):
            host.work(kill=True)
            if number % 10 == 9:
                host.settle()
                host.check()
        host.settle()
        host.outlive_a_daemon()
        host.check()
        host.end()
    finally:
        host.abandon()
    assert not list(Path("/dev/shm").glob("*moe-offload*"))
    assert not _mapped_arenas(made.store.path.name), "a process that lives still maps an arena"
    return host


def _mapped_arenas(store: str) -> list[str]:
    """Processes that map shared memory of the daemon of this store."""
    mapped = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            mapped += [maps.parent.name] * (f"moe-offload:{store[:8]}" in maps.read_text())
    return mapped


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        host = run(Path(folder), options.kills, options.workers, options.seed)
    print(
        f"{options.kills} kills, {host.steps} steps checked: no wrong record, no hang, nothing left behind; "
        f"{host.failovers} times a worker went on alone, {host.comebacks} times one came back"
    )


if __name__ == "__main__":
    main()
