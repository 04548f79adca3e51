"""Why a worker could not start is the last thing that the output of an engine says."""

import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.e2e.live_engine import PRELOADED
from tests.e2e.served import SMALL, run_vllm
from vllm_moe_offload.client.launch import StartError
from vllm_moe_offload.errors import ConfigError, OffloadError, StoreError
from vllm_moe_offload.integration.start_errors import expect_errors, leaving_errors, raising_left_errors
from vllm_moe_offload.trace.trace_recording import TraceRecording

_FORKS = multiprocessing.get_context("fork")


def engine(name: str) -> Any:
    """Of vLLM's configuration, what is looked at."""
    return SimpleNamespace(instance_id=f"{name}-{os.getpid()}")


def fail(config: Any, error: Exception) -> None:
    """Be a worker that cannot start."""
    with leaving_errors(config):
        raise error


def run_worker(config: Any, error: Exception) -> None:
    worker = _FORKS.Process(target=fail, args=(config, error))
    worker.start()
    worker.join()


def start() -> None:
    """Be the first process, whose wait for workers ends with what vLLM says."""
    with raising_left_errors():
        raise RuntimeError("Engine core initialization failed")


def test_the_error_of_a_worker_is_that_of_the_first_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = engine("one")
    expect_errors(config, from_command_line=False)
    run_worker(config, StoreError("the disk is full"))
    run_worker(config, ConfigError("what follows from the first"))
    with pytest.raises(StoreError, match="the disk is full"):
        start()
    with pytest.raises(RuntimeError, match="Engine core initialization failed"):
        start()
    assert not list(tmp_path.iterdir())


def test_an_error_of_another_room_is_one_of_its_base_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = engine("two")
    expect_errors(config, from_command_line=False)
    run_worker(config, StartError("it ended"))
    with pytest.raises(OffloadError) as raised:
        start()
    assert type(raised.value) is ConfigError


def test_what_is_no_error_of_ours_and_what_others_have_left_stays_vllms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = engine("three")
    expect_errors(config, from_command_line=False)
    run_worker(config, ValueError("of vLLM"))
    run_worker(engine("somebody else's"), ConfigError("of another engine"))
    with pytest.raises(RuntimeError, match="Engine core initialization failed"):
        start()
    (left,) = tmp_path.iterdir()
    assert left.stat().st_mode & 0o777 == 0o600


def test_an_engine_in_one_process_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = engine("four")
    expect_errors(config, from_command_line=False)
    with pytest.raises(ConfigError):
        fail(config, ConfigError("said by the process itself"))
    assert not list(tmp_path.iterdir())


def test_vllm_serve_ends_with_what_only_a_worker_could_know(tiny_moe: Path, tmp_path: Path) -> None:
    """A trace of another model: known to be one when the checkpoint has been identified."""
    trace, output = tmp_path / "another.trace", tmp_path / "output"
    TraceRecording(trace, (1, 2, 1), "another-model", "0" * 32).close()
    options = ["--moe-offload-cache", "25%", "--moe-offload-trace", str(trace), "--moe-offload-daemon", "off"]
    command = ["serve", str(tiny_moe), *options, *SMALL, "--port", "0"]
    server = PRELOADED.Process(target=run_vllm, args=(command, output))
    server.start()
    server.join()
    assert server.exitcode == 1
    assert output.read_text().splitlines()[-1] == (
        f"error: TraceError: trace = {trace}: it is a trace of another-model; give another file, or move that one away"
    )
