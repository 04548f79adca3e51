"""A trace file grows by what is new, can be read at any moment, and outlives its engine however that ends."""

import os
import resource
import signal
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.daemon.past import FINGERPRINT, SHAPE, past_request, same
from vllm_moe_offload.cli import app
from vllm_moe_offload.errors import TraceError
from vllm_moe_offload.trace import trace_recording
from vllm_moe_offload.trace.trace_file import read_trace
from vllm_moe_offload.trace.trace_recording import TraceRecording


def recording(path: Path, fingerprint: str = FINGERPRINT) -> TraceRecording:
    return TraceRecording(path, SHAPE, "model", fingerprint)


def test_every_request_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "engine.trace"
    with closing(recording(path)) as open_recording:
        assert read_trace(path).num_requests == 0 and read_trace(path).shape == SHAPE
        for seed in range(5):
            open_recording.add(past_request(seed))
            open_recording.write()
            trace = read_trace(path)
            assert trace.num_requests == seed + 1 and same(trace.request(seed), past_request(seed))
    with closing(recording(path)) as continued:
        continued.add(past_request(5))
    trace = read_trace(path)
    assert [same(request, past_request(seed)) for seed, request in enumerate(trace.requests())] == [True] * 6
    assert (trace.model, trace.fingerprint) == ("model", FINGERPRINT)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    imported = CliRunner().invoke(app, ["history", "import", str(path), "--history", str(tmp_path / "histories")])
    assert imported.exit_code == 0 and "6 requests" in imported.output


def test_what_is_written_is_written_once_and_no_longer_kept_in_memory(tmp_path: Path) -> None:
    path, one = tmp_path / "engine.trace", past_request(1, tokens=2000)
    with closing(recording(path)) as growing:
        sizes = []
        for _ in range(20):
            growing.add(one)
            before = written_bytes()
            growing.write()
            sizes.append(written_bytes() - before)
            assert growing._waiting == [] and growing._waiting_bytes == 0
    assert sum(sizes) < 1.1 * path.stat().st_size and max(sizes) < 1.1 * min(sizes)


def written_bytes() -> int:
    """By this process, to files."""
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("wchar"))
    return int(line.split()[1])


KILLED_ENGINE = """
import sys
from pathlib import Path
from tests.trace.test_appended_traces import recording
from tests.daemon.past import past_request
growing = recording(Path(sys.argv[1]))
for seed in range(3):
    growing.add(past_request(seed))
    growing.write()
print("written", flush=True)
sys.stdin.read()
"""


def test_an_engine_that_is_killed_leaves_a_file_that_is_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "engine.trace"
    command = [sys.executable, "-c", KILLED_ENGINE, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as engine:
        assert engine.stdout is not None and engine.stdout.readline() == b"written\n"
        with pytest.raises(TraceError, match="is being written by another engine"):
            recording(path)
        assert read_trace(path).num_requests == 3
        engine.send_signal(signal.SIGKILL)
    with closing(recording(path)) as continued:
        continued.add(past_request(3))
    assert same(read_trace(path).request(3), past_request(3))


def test_a_file_cut_at_any_byte_has_every_whole_request_and_is_continued(tmp_path: Path) -> None:
    whole = tmp_path / "whole.trace"
    ends = []
    with closing(recording(whole)) as growing:
        for seed in range(3):
            ends.append(whole.stat().st_size)
            growing.add(past_request(seed, tokens=2))
            growing.write()
        ends.append(whole.stat().st_size)
    content, cut = whole.read_bytes(), tmp_path / "cut.trace"
    for length in range(0, len(content), 83):
        for filling in (b"", bytes(len(content) - length)):  # killed; power lost while the file grew
            cut.write_bytes(content[:length] + filling)
            kept = sum(cut.read_bytes().startswith(content[:end]) for end in ends[1:])
            if length >= ends[0]:
                assert read_trace(cut).num_requests == kept
            try:
                with closing(recording(cut)) as continued:
                    continued.add(past_request(9, tokens=2))
            except TraceError:
                assert filling and length < ends[0], "a file that never was a trace"
                continue
            assert read_trace(cut).num_requests == kept + 1


def test_damage_before_the_end_is_refused_and_nothing_is_lost_by_continuing(tmp_path: Path) -> None:
    path = tmp_path / "engine.trace"
    with closing(recording(path)) as growing:
        growing.add(past_request(1))
        growing.write()
        end = path.stat().st_size
        growing.add(past_request(2))
    content, draw = path.read_bytes(), np.random.default_rng(0)
    for place in draw.choice(end, 200, replace=False).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(TraceError, match=r"engine\.trace"):
            read_trace(path)
        with pytest.raises(TraceError, match=r"engine\.trace.*move that one away"):
            recording(path)
        assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", [b"something else", b"PK\x03\x04"])
def test_a_file_that_is_no_trace_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "engine.trace"
    path.write_bytes(content)
    with pytest.raises(TraceError, match="it is no trace that can be continued; give another file"):
        recording(path)
    assert path.read_bytes() == content


def test_a_trace_of_another_model_is_left_alone(tmp_path: Path) -> None:
    recording(tmp_path / "engine.trace").close()
    with pytest.raises(TraceError, match="it is a trace of model; give another file"):
        recording(tmp_path / "engine.trace", fingerprint="cd" * 16)


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"trace = .*/missing/engine\.trace cannot be written \(No such file"):
        recording(tmp_path / "missing" / "engine.trace")


def test_a_file_of_the_largest_size_is_not_written_any_more_which_is_said_once(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = past_request(1, tokens=1000)
    monkeypatch.setattr(trace_recording, "MOST_BYTES", 3 * one.experts.nbytes * 3)
    with closing(recording(tmp_path / "engine.trace")) as growing:
        for _ in range(10):
            growing.add(one)
            growing.write()
    assert (tmp_path / "engine.trace").stat().st_size < trace_recording.MOST_BYTES * 1.1
    assert len(said) == 1 and "requests are missing from the trace" in said[0]
    assert 1 <= read_trace(tmp_path / "engine.trace").num_requests < 10


def test_what_cannot_be_written_now_waits_in_bounded_memory(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit on file sizes stands for a disk that is full, and then has room again."""
    monkeypatch.setattr(trace_recording, "MOST_WAITING_BYTES", 100_000)
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with closing(recording(tmp_path / "engine.trace")) as growing:
            growing.add(past_request(1))
            growing.write()
            size = (tmp_path / "engine.trace").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, limits[1]))
            for seed in range(2, 40):
                growing.add(past_request(seed, tokens=200))
            with pytest.raises(TraceError, match=r"engine\.trace cannot be written \(File too large\)"):
                growing.write()
            assert (tmp_path / "engine.trace").stat().st_size == size, "no half frame is left"
            assert growing._waiting_bytes <= 100_000 and len(said) == 1
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            growing.write()
            assert growing._waiting == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert read_trace(tmp_path / "engine.trace").num_requests > 2
    assert os.listdir(tmp_path) == ["engine.trace"]  # noqa: PTH208
