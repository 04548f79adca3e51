"""A worker that lost its daemon joins the next one: never while a read is under way, and wholly or not at all."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.daemon.processes import DaemonProcess, running_daemon
from tests.daemon.reading_worker import Reader
from tests.daemon.wire import wait_until
from tests.runtime.record_stores import build_store, layout
from vllm_moe_offload.client import attachment, client
from vllm_moe_offload.client.client import ALONE, CLOSED, CONNECTED, REJOINING, TRANSITIONS, ClientState
from vllm_moe_offload.client.connection import Connection, DaemonGoneError
from vllm_moe_offload.ipc.death import Death
from vllm_moe_offload.ipc.protocol import GetStatus, StatusReport
from vllm_moe_offload.pool import loader
from vllm_moe_offload.runtime import Batch

SMALL, LARGE = layout(8192, 4096), layout(6000, 100)
BUDGET = 1 << 20


def status_of(reader: Reader) -> StatusReport:
    control = Connection.connect(reader.client.path, "control", 60)
    try:
        return control.request(GetStatus())
    finally:
        control.close()


@pytest.fixture
def survivor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """A worker whose daemon was killed; the next one has attached it, and it is between two steps."""
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.05)
    made = build_store(tmp_path / "stores", [(SMALL, 24), (LARGE, 24), (LARGE, 24)])
    socket, root = tmp_path / "daemon.sock", made.store.path.parent
    daemon = DaemonProcess(socket, BUDGET, root)
    try:
        reader = Reader(socket, made.store.path, seed=1)
        reader.step()
        daemon.kill()
        reader.step()
        assert reader.client.daemon_pid == 0
        daemon = DaemonProcess(socket, BUDGET, root)
        wait_until(lambda: reader.client.state is REJOINING, "the next daemon has attached it", 60)
        yield reader
        reader.close()
        daemon.stop()
    finally:
        daemon.abandon()


def test_the_states_it_goes_through(survivor: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its daemon was killed and missed in a step, and the next one has attached it."""
    monkeypatch.setattr(client, "_DYING_SECONDS", 0.0)
    it, entered = survivor.client, [survivor.client.state]
    enter = it._enter

    def note(state: ClientState) -> None:
        enter(state)
        entered.append(state)

    monkeypatch.setattr(it, "_enter", note)
    survivor.step()
    assert it.state is CONNECTED and it.daemon_pid
    it.fail_over(DaemonGoneError("it is given up"))
    it.fail_over(DaemonGoneError("it is given up twice"))
    assert not it.daemon_pid and not any("twice" in line for line in survivor.said)
    wait_until(lambda: it.state is REJOINING, "it asks again", 60)
    it.close()
    it.close()
    assert entered == [REJOINING, CONNECTED, ALONE, REJOINING, CLOSED]


def test_a_daemon_that_died_unmissed_is_succeeded_without_a_time_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.05)
    made = build_store(tmp_path / "stores", [(SMALL, 24)])
    socket, root = tmp_path / "daemon.sock", made.store.path.parent
    daemon = DaemonProcess(socket, BUDGET, root)
    try:
        reader = Reader(socket, made.store.path, seed=1)
        reader.step()
        assert reader.client.state is CONNECTED
        daemon.kill()
        daemon = DaemonProcess(socket, BUDGET, root)
        wait_until(lambda: reader.client.state is REJOINING, "the next daemon has attached it", 60)
        reader.client.check_integrity()
        reader.step()
        assert reader.client.state is CONNECTED and not any("without it" in line for line in reader.said)
        reader.close()
        daemon.stop()
    finally:
        daemon.abandon()


@pytest.mark.parametrize("state", ClientState)
def test_no_other_transition_is_made(survivor: Reader, state: ClientState) -> None:
    it = survivor.client
    assert it.state is REJOINING
    for old in ClientState:
        if state not in TRANSITIONS[old]:
            it.state = old
            with pytest.raises(AssertionError, match=f"{old.value} -> {state.value}"):
                it._enter(state)
            assert it.state is old
    it.state = REJOINING


def test_no_memory_is_mapped_over_a_read_that_is_under_way(survivor: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, go_on = threading.Event(), threading.Event()
    read = loader.os.preadv

    def slow_disk(fd: int, buffers: list[object], offset: int) -> int:
        count = read(fd, buffers, offset)
        reading.set()
        assert go_on.wait(60)
        return count

    layer = list(survivor.runtime.layers.values())[-1]
    absent = layer.first + np.flatnonzero(layer.pool.absent(layer.span))
    monkeypatch.setattr(loader.os, "preadv", slow_disk)
    assert layer.pool.prefetch(layer.span, absent[:1]).started == 1
    assert reading.wait(60)
    step = threading.Thread(target=survivor.runtime.begin_step, args=(Batch(1),))
    step.start()
    step.join(0.2)
    mappings = [arena.mapping for arena in survivor.client._arenas]
    try:
        assert all(mapping.writable for mapping in mappings), "memory was replaced under a read"
    finally:
        go_on.set()
        step.join(60)
    assert survivor.client.daemon_pid and not any(mapping.writable for mapping in mappings)
    monkeypatch.undo()
    survivor.step()


def test_a_daemon_that_detaches_it_before_it_has_come_back_is_left_alone(survivor: Reader) -> None:
    successor = survivor.client._successor
    assert successor is not None
    successor.connection.close()
    wait_until(lambda: not status_of(survivor).models[0].workers, "the daemon has detached it")
    survivor.step()
    assert survivor.client.daemon_pid == 0, "it is not attached to what has detached it"
    survivor.step()
    wait_until(lambda: survivor.client.state is REJOINING, "it asks again")
    survivor.step()
    assert survivor.client.daemon_pid != 0


def test_half_of_a_daemon_s_memory_is_none_of_it(survivor: Reader) -> None:
    successor = survivor.client._successor
    assert successor is not None
    other = os.memfd_create("other", os.MFD_CLOEXEC)
    os.close(successor._arenas.pop())
    successor._arenas.append(other)
    loads = survivor.stats.loads
    survivor.step()
    assert survivor.client.daemon_pid == 0 and "goes on without it" in survivor.said[-1]
    assert survivor.stats.loads > loads, "nothing in the slots is believed"
    wait_until(lambda: survivor.client.state is REJOINING, "it asks again")
    survivor.step()
    assert survivor.client.daemon_pid != 0


def test_a_watch_that_meets_something_unforeseen_goes_on(survivor: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    successor = survivor.client._successor
    assert successor is not None
    successor.connection.close()
    survivor.client._end_rejoining(None)
    with monkeypatch.context() as broken:
        broken.setattr(survivor.client, "_attach", lambda: 1 / 0)
        wait_until(lambda: any("ZeroDivisionError" in line for line in survivor.said), "it is said", 60)
    wait_until(lambda: survivor.client.state is REJOINING, "it asks again", 60)


def test_whether_a_process_is_dead_can_be_asked_while_another_thread_stops_asking() -> None:
    for _ in range(200):
        death, answers = Death(os.getpid()), []

        def ask(death: Death = death, answers: list[bool] = answers) -> None:
            answers.extend(death.known() for _ in range(20))

        asking = threading.Thread(target=ask)
        asking.start()
        death.close()
        asking.join()
        assert answers == [False] * 20


def test_nothing_is_believed_of_a_daemon_that_only_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may go on at any time and overwrite every slot the worker saw."""
    monkeypatch.setattr(attachment, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(client, "_DYING_SECONDS", 0.1)
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.05)
    made = build_store(tmp_path / "stores", [(SMALL, 24), (LARGE, 24)])
    with running_daemon(tmp_path / "daemon.sock", 300_000, made.store.path.parent) as daemon:
        reader = Reader(tmp_path / "daemon.sock", made.store.path, seed=1)
        other = Reader(tmp_path / "daemon.sock", made.store.path, seed=2)
        other.step()
        daemon.suspend()
        while not reader.said:
            reader.step()
        assert "sent nothing for 0.5 s; going on without it, with 0 experts that were loaded" in reader.said[0]
        os.kill(daemon.pid, signal.SIGCONT)

        def is_back() -> bool:
            other.step()
            reader.step()
            return reader.client.daemon_pid == daemon.pid

        wait_until(is_back, "it has come back", 60)
        reader.close()
        other.close()
