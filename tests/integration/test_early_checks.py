"""What no worker could use is refused while the engine is configured, before any process starts."""

import socket
from pathlib import Path
from typing import Any

import pytest

from vllm_moe_offload.errors import ConfigError, StoreError, TraceError
from vllm_moe_offload.store import StoreRoot
from vllm_moe_offload.trace.trace_recording import TraceRecording

FINGERPRINT = "0" * 32


def configure(model: Path, **settings: Any) -> None:
    """What ``LLM`` and ``vllm serve`` do before they start processes."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    EngineArgs(str(model), additional_config={"moe_offload": settings}).create_engine_config()


@pytest.fixture
def a_file(tmp_path: Path) -> Path:
    """In whose place not even the superuser can make a folder."""
    path = tmp_path / "a file"
    path.write_text("no trace")
    return path


def test_a_folder_for_stores_that_cannot_be_made(tiny_moe: Path, a_file: Path) -> None:
    for folder in (a_file, a_file / "stores"):
        with pytest.raises(StoreError, match=f"cannot build a store at {folder}: "):
            configure(tiny_moe, store=str(folder))


def test_a_folder_for_histories_that_cannot_be_made_even_if_none_would_be_kept(tiny_moe: Path, a_file: Path) -> None:
    """All experts fit here, so that nothing would be predicted."""
    with pytest.raises(ConfigError, match="name a folder that can be written, or 'off'"):
        configure(tiny_moe, cache="100%", history=str(a_file / "history"))
    configure(tiny_moe, history=str(a_file / "history"), predictor="none")


def test_a_trace_that_cannot_be_recorded(tiny_moe: Path, a_file: Path, tmp_path: Path) -> None:
    other = a_file.rename(a_file.with_suffix(".trace"))
    with pytest.raises(TraceError, match="it is no trace that can be continued; give another file"):
        configure(tiny_moe, trace=str(other))
    with pytest.raises(TraceError, match=r"missing/a\.trace cannot be written \(No such file or directory\)"):
        configure(tiny_moe, trace=str(tmp_path / "missing" / "a.trace"))
    assert other.read_text() == "no trace"


def test_a_trace_that_can_be_recorded_is_left_alone(tiny_moe: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.trace"
    configure(tiny_moe, trace=str(path))
    assert not path.exists()
    recording = TraceRecording(path, (1, 2, 1), "a model", FINGERPRINT)
    before = path.read_bytes()
    configure(tiny_moe, trace=str(path))  # as an API server does while its engine records
    recording.close()
    assert path.read_bytes() == before


def test_a_daemon_that_is_named_and_not_there(tiny_moe: Path, tmp_path: Path) -> None:
    path = tmp_path / "daemon.sock"
    with pytest.raises(ConfigError, match=f"no daemon answers at {path} .*or choose 'auto' or 'off'"):
        configure(tiny_moe, daemon=f"unix:{path}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        left.bind(str(path))
    with pytest.raises(ConfigError, match=f"no daemon answers at {path} .*Connection refused"):
        configure(tiny_moe, daemon=str(path))


def test_memory_behind_a_gpu_that_is_not_there(tiny_moe: Path) -> None:
    with pytest.raises(ConfigError, match="leave host_cache out"):
        configure(tiny_moe, host_cache="1GiB")


def test_a_folder_that_cannot_be_written_is_no_obstacle_where_it_has_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("vllm_moe_offload.store.root.tempfile.TemporaryFile", refuse)
    with pytest.raises(StoreError, match="grant access to it"):
        StoreRoot(tmp_path).require_usable()
    (tmp_path / FINGERPRINT).mkdir()
    StoreRoot(tmp_path).require_usable()
