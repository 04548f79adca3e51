"""What one worker keeps in files: the history of its model, and the trace it was asked for.

Settings and ranks decide here who reads and writes what; the files themselves are the matter of chronicle/.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ..chronicle.keeper import HistoryKeeper, Keeper
from ..chronicle.trace_recording import TraceRecording
from ..config import OffloadConfig
from ..daemon.protocol import OpenHistory
from ..daemon.remote_history import RemoteKeeper
from ..errors import ConfigError
from ..history.archive import HistoryArchive
from ..predict.base import ModelShape
from ..predict.registry import MAX_CANDIDATES
from ..store.reader import Store
from ..store.root import default_root
from .embedding import PromptEmbedder, UserEmbedder

logger = init_logger("vllm.moe_offload")


def history_fingerprint(store: Store, embed: PromptEmbedder | None) -> str:
    """Of the checkpoint's content and configuration alone (see store/identity.py): histories outlive another vLLM,
    torch or transformers, another kernel, dtype or machine.

    Embeddings of two functions cannot be compared, so each of the user's has a history of its own.
    """
    facts = {name: store.identity.facts[name] for name in ("checkpoint", "model")}
    facts["pipeline_stage"] = get_pp_group().rank_in_group if get_pp_group().world_size > 1 else 0
    if isinstance(embed, UserEmbedder):
        facts["embedding"] = [embed.setting, embed.width]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def writes_files() -> bool:
    """Whether this worker keeps files: ranks that split the same layers all see the same routing."""
    return get_tensor_model_parallel_rank() == 0


def trace_recording(
    vllm_config: Any, config: OffloadConfig, shape: ModelShape, fingerprint: str
) -> TraceRecording | None:
    """The trace file of this worker, or None if nobody wants one or another rank writes it.

    Raises:
        TraceError: it cannot be written, or holds something else.
    """
    if config.trace is None or not writes_files():
        return None
    stage, replica = get_pp_group().rank_in_group, vllm_config.parallel_config.data_parallel_rank
    suffix = "".join(f".{name}{rank}" for name, rank in (("pp", stage), ("dp", replica)) if rank)
    path = config.trace.with_name(f"{config.trace.stem}{suffix}{config.trace.suffix}")
    name = Path(vllm_config.model_config.model).name
    logger.info("moe-offload: recording a trace of every request in %s", path)
    return TraceRecording(path, shape, name, fingerprint, _warn)


def history_keeper(
    vllm_config: Any, config: OffloadConfig, shape: ModelShape, fingerprint: str, store: Store, daemon: Path | None
) -> Keeper | None:
    """What is remembered of this model; None where nothing is to be predicted.

    Args:
        daemon: socket of the daemon that keeps the experts, and the history with them unless the settings say where
            else; None where this worker keeps its own.

    Raises:
        ConfigError: the folder that was named for histories cannot be written.
    """
    if config.predictor == "none":
        return None
    keeper: Keeper
    if daemon is not None and config.history is None:
        request = OpenHistory(fingerprint, shape, store.path.name)
        keeper = RemoteKeeper(daemon, request, MAX_CANDIDATES, writes_files(), _warn)
    else:
        first = vllm_config.parallel_config.data_parallel_rank == 0
        keeper = HistoryKeeper(_archive(config), fingerprint, shape, _warn, first and writes_files())
    logger.info(
        "moe-offload: predicting by '%s', from %d tokens of %d earlier requests",
        config.predictor,
        keeper.history.num_tokens,
        keeper.history.num_requests,
    )
    return keeper


def _archive(config: OffloadConfig) -> HistoryArchive | None:
    """Where histories are kept; None for nowhere: nobody wants them kept, or named a place and the usual one is barred.

    Raises:
        ConfigError: the folder that was named cannot be written.
    """
    if config.history == "off":
        return None
    folder = Path(config.history) if config.history else (config.store or default_root()).parent / "history"
    archive = HistoryArchive(folder)
    problem = archive.problem()
    if problem is None:
        return archive
    if config.history is not None:
        raise ConfigError(f"history = {config.history!r}: {problem}; name a folder that can be written, or 'off'")
    _warn(f"the history stays in memory and ends with this engine: {problem}")
    return None


def _warn(sentence: str) -> None:
    logger.warning("moe-offload: %s", sentence)
