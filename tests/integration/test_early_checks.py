"""What no worker could use is refused while the engine is configured, before any process starts."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.integration.dense import dense_llama
from tests.models.recipe import write
from vllm_moe_offload.config import OffloadConfig
from vllm_moe_offload.errors import ConfigError, StoreError, TraceError, UnsupportedError
from vllm_moe_offload.integration.engine_config import PREPARE_ONLY
from vllm_moe_offload.integration.header_checks import refuse_small_budget
from vllm_moe_offload.plan.checkpoint import read_folder
from vllm_moe_offload.plan.sizes import model_sizes
from vllm_moe_offload.store import StoreRoot
from vllm_moe_offload.trace.trace_recording import TraceRecording

FINGERPRINT = "0" * 32


def configure(model: Path, tokenizer: bool = True, more: dict[str, Any] | None = None, **settings: Any) -> None:
    """What ``LLM`` and ``vllm serve`` do before they start processes."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    asked = {"moe_offload": settings, **(more or {})}
    EngineArgs(str(model), skip_tokenizer_init=not tokenizer, additional_config=asked).create_engine_config()


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


def test_a_dense_model(tmp_path: Path) -> None:
    dense = write(dense_llama(), tmp_path / "dense")
    with pytest.raises(UnsupportedError, match=r"/dense has no MoE layers it could offload; switch moe-offload off"):
        configure(dense.path, tokenizer=False, store=str(tmp_path / "stores"))
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize("cache", ["1KiB", "0.1%"])
def test_a_budget_that_no_token_fits_in(tiny_moe: Path, cache: str) -> None:
    with pytest.raises(ConfigError, match=rf"cache = '{cache}' gives .* the smallest that works is '288KiB' \(0\.8%\)"):
        configure(tiny_moe, cache=cache, daemon="off")
    configure(tiny_moe, cache="288KiB", daemon="off")


def test_ranks_have_parts_of_experts_or_some_of_them(tiny_moe: Path) -> None:
    """The smallest budget of a rank: 4 experts of 72 KiB, of which two ranks have halves unless they divide experts."""
    sizes = model_sizes(read_folder(tiny_moe), on_cpu=True)
    for expert_parallel, least in ((False, 144 << 10), (True, 288 << 10)):
        ranks = SimpleNamespace(tensor_parallel_size=2, enable_expert_parallel=expert_parallel)
        refuse_small_budget(OffloadConfig(cache=f"{least}"), sizes, ranks, on_cpu=True)
        with pytest.raises(ConfigError, match=f"the smallest that works is '{least >> 10}KiB'"):
            refuse_small_budget(OffloadConfig(cache=f"{least - 1}"), sizes, ranks, on_cpu=True)


def test_on_a_gpu_every_layer_needs_slots_of_its_own(tiny_moe: Path) -> None:
    sizes = model_sizes(read_folder(tiny_moe), on_cpu=False)
    one = SimpleNamespace(tensor_parallel_size=1, enable_expert_parallel=False)
    least = len(sizes.layers) * sizes.top_k * sizes.record_bytes
    with pytest.raises(ConfigError, match=r"of device memory, too little .* of every layer"):
        refuse_small_budget(OffloadConfig(cache=f"{least - 1}"), sizes, one, on_cpu=False)
    refuse_small_budget(OffloadConfig(cache="100%"), sizes, one, on_cpu=False)


def test_building_stores_asks_for_nothing_that_only_serving_needs(tiny_moe: Path, tmp_path: Path) -> None:
    """The environment may be that of the engine, whose daemon does not run yet."""
    settings = {"cache": "1KiB", "daemon": f"unix:{tmp_path}/daemon.sock"}
    configure(tiny_moe, more={PREPARE_ONLY: True}, **settings)
    with pytest.raises(ConfigError, match="no daemon answers"):
        configure(tiny_moe, **settings)
