"""Where a worker's slots come from: the daemon of this host, or this process itself."""

import math
import os
from pathlib import Path
from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ..config import OffloadConfig
from ..daemon.client import DaemonClient
from ..daemon.connection import DaemonGoneError, RefusedError
from ..daemon.hosted_model import slot_bytes
from ..daemon.protocol import Attach
from ..daemon.socket_file import default_socket_path
from ..daemon.start import start_daemon
from ..errors import ConfigError
from ..slots import Ledger
from ..store.reader import Store

logger = init_logger("vllm.moe_offload")

LEAVE_AFTER_SECONDS = 60.0
"""A daemon started for an engine stays so long after its last one has gone."""


def attach_to_daemon(
    vllm_config: Any,
    config: OffloadConfig,
    store: Store,
    wanted_bytes: int,
    wants_all: bool,
    least_slots: list[int],
    io_cpus: set[int],
    ledger: Ledger,
) -> DaemonClient | None:
    """The daemon that ``config.daemon`` asks for, or None where this worker keeps its own slots.

    Args:
        wanted_bytes: fast memory this worker would use for experts.
        wants_all: whether that is every expert, so that the layers may rely on all being there.
        least_slots: per record layout, how many experts a single token needs.

    Raises:
        ConfigError: the daemon that was named does not answer, will not serve this model, or could not be started.
    """
    if config.daemon == "off":
        return None
    path = daemon_socket(config)
    if config.daemon == "auto" and not path.exists():
        return None
    if config.daemon == "start":
        options = ["--store", str(store.path.parent.absolute())]
        ranks = vllm_config.parallel_config.world_size
        start_daemon(path, f"{ranks * _with_pages(wanted_bytes, store)}B", LEAVE_AFTER_SECONDS, options, cpus=io_cpus)
    request = Attach(
        store=store.path.name,
        pid=os.getpid(),
        wanted_bytes=wanted_bytes,
        lease=wants_all,
        group=f"{vllm_config.instance_id}.{vllm_config.parallel_config.data_parallel_rank}",
        rank=get_tensor_model_parallel_rank(),
        least_slots=least_slots,
    )
    try:
        client = DaemonClient(path, request, store, config.policy, io_cpus, ledger, _say)
    except (DaemonGoneError, RefusedError) as error:
        if config.daemon != "auto":
            raise ConfigError(f"daemon = {config.daemon!r}: {error}; or choose 'auto' or 'off'") from None
        logger.warning("moe-offload: %s; this engine keeps its own experts", error)
        return None
    logger.info("moe-offload: experts are kept by the daemon (pid %d) at %s", client.daemon_pid, path)
    return client


def daemon_socket(config: OffloadConfig) -> Path:
    """Where the daemon of these settings serves."""
    named = config.daemon.startswith("unix:")
    return Path(config.daemon.removeprefix("unix:")) if named else default_socket_path()


def another_rank_foretells(vllm_config: Any) -> bool:
    """Whether what this worker will need is foretold by a rank that splits the same experts with it.

    What that rank asks the daemon to prefetch, the daemon prefetches for all of its group.
    """
    return get_tensor_model_parallel_rank() > 0 and not vllm_config.parallel_config.enable_expert_parallel


def _with_pages(nbytes: int, store: Store) -> int:
    """Memory that records of ``nbytes`` together take in a daemon, which gives every slot whole pages."""
    layouts = {entry.layout for entry in store.layers}
    return math.ceil(nbytes * max(slot_bytes(layout) / layout.payload_bytes for layout in layouts))


def _say(sentence: str) -> None:
    logger.warning("moe-offload: %s", sentence)
