"""Ends daemons, kills and stops workers at random while they serve, and sees that nobody computes on a wrong record.

    python -m tests.daemon.killing --kills 200

Needs no model: the workers (reading_worker.py) check every record they would compute on. Beside them a worker with a
lease of a second model comes and goes, so that the first model shrinks and grows. A worker goes on alone only if its
daemon has been ended, and waits no longer than a second but for a CPU, or because it was stopped itself.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.daemon.processes import ANSWER_SECONDS, DaemonProcess
from tests.daemon.wire import wait_until
from tests.runtime.record_stores import build_store, layout

SMALL, LARGE = layout(8192, 4096), layout(6000, 100)
LAYERS = [(SMALL, 24), (LARGE, 10), (SMALL, 24), (SMALL, 24), (LARGE, 10), (SMALL, 24)]
LEASED_LAYERS = [(SMALL, 24), (LARGE, 10)]
RECORDS = 0.7
"""Share of the experts of the first model that fit into the daemon while the second is leased."""
STEPS = 20
LONGEST_WAIT_SECONDS = 1.0
STOPS, LEASES = 0.4, 0.3
"""In so many of the rounds a worker is stopped; in so many of the others the worker with the lease comes or goes."""


class Worker:
    """A reading worker and what it last said."""

    def __init__(self, socket: Path, store: Path, seed: int, *options: str):
        command = [sys.executable, "-m", "tests.daemon.reading_worker", str(socket), str(store), str(seed), *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.report: dict[str, Any] = {}
        self.first_daemon = 0
        """The first of the host's daemons that it can still be attached to, by number."""
        self.stopped_seconds = 0.0
        """Since its last report."""
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

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """It does not run here, wherever it is, as under a debugger or in a frozen container."""
        self.process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)
            self.stopped_seconds += time.monotonic() - started

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
    leased_store: Path
    budget: int
    random: random.Random
    workers: list[Worker] = field(default_factory=list)
    leasing: Worker | None = None
    """One of the workers."""
    daemons: list[int] = field(default_factory=list)
    """Pids, in the order in which they started."""
    ended: set[int] = field(default_factory=set)
    failovers: int = 0
    comebacks: int = 0
    steps: int = 0
    stops: int = 0
    leases: int = 0
    accounted: list[tuple[float, float]] = field(default_factory=list)
    """Waits of more than a second, and how much of each was for a CPU, or while the worker was stopped."""
    unaccounted: list[str] = field(default_factory=list)
    """Other waits of more than a second."""
    longest_wait: float = 0.0
    """Of those that were no longer than a second."""

    def start_daemon(self) -> None:
        self.daemon = DaemonProcess(self.folder / "daemon.sock", self.budget, self.store.parent)
        self.daemons.append(self.daemon.pid)

    def start_worker(self) -> None:
        self._welcome(Worker(self.daemon.socket, self.store, self.random.randrange(1 << 30)))

    def start_leasing(self) -> None:
        self.leasing = Worker(self.daemon.socket, self.leased_store, self.random.randrange(1 << 30), "--lease")
        assert self.leasing.report["lease"], "there is room for the lease"
        self.leases += 1
        self._welcome(self.leasing)

    def _welcome(self, worker: Worker) -> None:
        worker.first_daemon = len(self.daemons) - 1
        self.workers.append(worker)

    def work(self, kill: bool) -> None:
        """Everybody serves some steps. Meanwhile somebody dies and is replaced, and others stop, come or go."""
        for worker in self.workers:
            worker.order()
        victim = stopped = None
        if kill and self.random.random() < STOPS:
            stopped = self.random.choice(self.workers)
        if stopped is not None:
            time.sleep(self.random.random() * 0.1)
            with stopped.stopped():
                self.stops += 1
                victim = self._kill_somebody(stopped)
                self._hear([worker for worker in self.workers if worker not in (victim, stopped)])
            self._hear([stopped])
        else:
            if kill and self.random.random() < LEASES:
                self._lease_comes_or_goes()
            victim = self._kill_somebody() if kill else None
            self._hear([worker for worker in self.workers if worker is not victim])
        if victim is not None:
            self._replace(victim)

    def _kill_somebody(self, spared: Worker | None = None) -> Worker | None:
        """Returns the worker that is dead, if it is a worker."""
        time.sleep(self.random.random() * 0.1)
        victim = self.random.choice([None, *(worker for worker in self.workers if worker is not spared)])
        if victim is not None:
            victim.kill()
            return victim
        self.ended.add(self.daemon.pid)
        self.random.choice([self.daemon.kill, self.daemon.stop])()
        time.sleep(self.random.random() * 0.5)
        self.start_daemon()
        return None

    def _replace(self, victim: Worker) -> None:
        self.workers.remove(victim)
        if victim is self.leasing:
            self.leasing = None
        else:
            self.start_worker()

    def _lease_comes_or_goes(self) -> None:
        if self.leasing is None:
            self.start_leasing()
            self.leasing.order()
        else:
            self._hear([self.leasing])
            assert self.leasing.leave() == 0
            self.workers.remove(self.leasing)
            self.leasing = None

    def _hear(self, workers: list[Worker]) -> None:
        for worker in workers:
            before = worker.report
            worker.hear()
            self._account(worker, before, worker.report)
            worker.stopped_seconds = 0.0

    def _account(self, worker: Worker, before: dict[str, Any], after: dict[str, Any]) -> None:
        said = after["said"][len(before["said"]) :]
        alone = [line for line in said if "going on without it" in line]
        gone = sum(pid in self.ended for pid in self.daemons[worker.first_daemon :])
        assert len(alone) <= gone, f"{gone} of its daemons have ended, worker {worker.process.pid} says: {alone}"
        pid = after["daemon_pid"]
        # one that is alone may have been attached by a daemon that has ended since, and joins it at its next step
        worker.first_daemon = self.daemons.index(pid) if pid else worker.first_daemon + len(alone)
        self.failovers += len(alone)
        self.comebacks += sum("again" in line for line in said)
        self.steps += STEPS
        self._account_waits(worker, after["waits"][len(before["waits"]) :])

    def _account_waits(self, worker: Worker, waits: list[tuple[float, float]]) -> None:
        for seconds, for_a_cpu in waits:
            known = for_a_cpu + worker.stopped_seconds
            if seconds <= LONGEST_WAIT_SECONDS:
                self.longest_wait = max(self.longest_wait, seconds)
            elif seconds - known <= LONGEST_WAIT_SECONDS:
                self.accounted.append((seconds, known))
            else:
                self.unaccounted.append(
                    f"worker {worker.process.pid} waited for {seconds:.2f} s, {for_a_cpu:.2f} s of it for a CPU, and "
                    f"was stopped for {worker.stopped_seconds:.2f} s; it said {worker.report['said'][-2:]}"
                )

    def outlive_a_daemon(self) -> None:
        """Everybody works on while there is no daemon, and joins the next one."""
        self.ended.add(self.daemon.pid)
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
        attached = [worker.pid for model in self.daemon.status().models for worker in model.workers]
        assert sorted(attached) == sorted(worker.process.pid for worker in self.workers)
        wait_until(lambda: self._resident_bytes() <= self.budget, "what was lent beyond the budget is back")

    def _resident_bytes(self) -> int:
        return sum(model.stats["resident_bytes"] for model in self.daemon.status().models)

    def end(self) -> None:
        """All leave; nothing is attached any more, and the daemon ends when told."""
        for worker in self.workers:
            assert worker.leave() == 0
        wait_until(
            lambda: not any(model.workers for model in self.daemon.status().models),
            "those who left are detached",
            ANSWER_SECONDS,
        )
        self.daemon.stop()

    def abandon(self) -> None:
        """After a failure: leave no process behind."""
        self.daemon.abandon()
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.kill()


def run(folder: Path, kills: int, workers: int, seed: int) -> Host:
    """Raises AssertionError if anything goes wrong: a wrong record, a hang, a living daemon given up, a leak."""
    shared_memory = set(Path("/dev/shm").glob("*moe-offload*"))
    made = build_store(folder / "stores", LAYERS, seed)
    leased = build_store(folder / "stores", LEASED_LAYERS, seed + 1)
    budget = int(_bytes(LAYERS) * RECORDS) + _bytes(LEASED_LAYERS)
    host = Host(folder, made.store.path, leased.store.path, budget, random.Random(seed))
    for built in (made, leased):
        built.store.close()
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
    assert set(Path("/dev/shm").glob("*moe-offload*")) <= shared_memory
    for store in (made, leased):
        assert not _mapped_arenas(store.store.path.name), "a process that lives still maps an arena"
    return host


def _bytes(layers: list[tuple[Any, int]]) -> int:
    return sum(part.payload_bytes * experts for part, experts in layers)


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
    accounted = ", ".join(f"{seconds:.1f} s ({known:.1f} s)" for seconds, known in host.accounted) or "none"
    print(
        f"{options.kills} kills, {host.stops} workers stopped, {host.leases} leases, {host.steps} steps checked: no "
        "wrong record, no hang, nothing left behind, no daemon given up that lived; "
        f"{host.failovers} times a worker went on alone, {host.comebacks} times one came back; waits of more than a "
        f"second, and how much of each was for a CPU or while stopped: {accounted}; the longest other "
        f"{host.longest_wait:.2f} s"
    )
    if host.unaccounted:
        sys.exit("\n".join(["waits that are not accounted for:", *host.unaccounted]))


if __name__ == "__main__":
    main()
