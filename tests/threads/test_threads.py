"""A thread that ends by an exception is never silent, and one that may not be bound to processors runs all the same."""

import logging
import re
import threading
from pathlib import Path

import numpy as np
import pytest

import vllm_moe_offload
from tests.runtime.record_stores import ALIGNED, build_store
from vllm_moe_offload import threads
from vllm_moe_offload.cli.check import OK, WARNING
from vllm_moe_offload.cli.checks import check_affinity
from vllm_moe_offload.learning.background import Background
from vllm_moe_offload.pool import HostMemory
from vllm_moe_offload.pool.loader import Load, RecordLoader
from vllm_moe_offload.threads import ReportedThread, failed_threads, processors_for_reading

NO_SUCH_PROCESSOR = {100_000}


@pytest.fixture(autouse=True)
def nothing_logged_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_refused", set())
    monkeypatch.setattr(threads, "_failed", [])


def test_a_thread_that_ends_by_an_exception_is_logged_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hooked: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda fault: hooked.append(fault.exc_type))

    def work() -> None:
        raise KeyError("lost")

    with caplog.at_level(logging.ERROR, "vllm_moe_offload"):
        for target in (work, lambda: None):
            thread = ReportedThread(target=target, name="the reader")
            thread.start()
            thread.join(30)
    assert failed_threads() == ["the reader: KeyError: 'lost'"] and hooked == [KeyError]
    assert [record.message for record in caplog.records] == [
        "a thread has ended by an error: the reader: KeyError: 'lost'"
    ]


def test_readers_that_may_not_be_bound_read_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    built, memory = build_store(tmp_path, [(ALIGNED, 8)]), HostMemory(ALIGNED, 8)
    with caplog.at_level(logging.WARNING, "vllm_moe_offload"):
        loader = RecordLoader(built.store, cpus=NO_SUCH_PROCESSOR)
        load = Load(0, 1, memory, 1)
        loader.start([load], speculative=True)
        assert load.done.acquire(timeout=30), "nobody has read it"
        loader.close()
    assert load.error is None and np.array_equal(memory.targets(1)[0], built.records[0][1][0])
    assert len(caplog.records) == 1 and "not bound to processors 100000" in caplog.text


def test_the_background_thread_may_not_be_bound_and_works(caplog: pytest.LogCaptureFixture) -> None:
    done, failures = threading.Event(), []
    background = Background(lambda: None, 3600.0, failures.append, cpus=NO_SUCH_PROCESSOR)
    background.soon(done.set)
    assert done.wait(30)
    background.close()
    assert not failures and not failed_threads() and "not bound to processors" in caplog.text


def test_processors_are_found_while_threads_come_and_go() -> None:
    enough = threading.Event()

    def come_and_go() -> None:
        while not enough.is_set():
            short = threading.Thread(target=lambda: None)
            short.start()
            short.join()

    others = threading.Thread(target=come_and_go)
    others.start()
    try:
        for _ in range(3000):
            assert processors_for_reading()
    finally:
        enough.set()
        others.join(30)


def test_no_thread_of_the_package_is_of_another_kind() -> None:
    texts = {file: file.read_text() for file in Path(vllm_moe_offload.__file__).parent.rglob("*.py")}
    assert sum("ReportedThread(" in text for text in texts.values()) >= 7
    others = [file.name for file, text in texts.items() if re.search(r"\b(Thread|Timer)\(", text)]
    assert others == [], (
        "use threads.ReportedThread, which reports its end (an executor hands exceptions on by its futures)"
    )


def test_doctor_tries_to_bind_a_thread() -> None:
    assert check_affinity().state in (OK, WARNING) and not failed_threads()
