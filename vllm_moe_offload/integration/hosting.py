"""Where a worker's slots come from: the daemon of this host, or this process itself."""

import os
from pathlib import Path
from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ..client.client import DaemonClient
from ..client.joining import join_daemon, socket_of
from ..config import OffloadConfig
from ..ipc.protocol import Attach
from ..stats import Stats
from ..store.reader import Store

logger = init_logger("vllm.moe_offload")


def attach_to_daemon(
    vllm_config: Any,
    config: OffloadConfig,
    store: Store,
    wanted_bytes: int,
    wants_all: bool,
    least_slots: list[int],
    io_cpus: set[int],
    counters: Stats,
    model: int,
    daemon_bytes: int,
) -> DaemonClient | None:
    """The daemon that ``config.daemon`` asks for, or None where this worker keeps its own slots.

    Args:
        wanted_bytes: fast memory this worker would use for experts of this model.
        wants_all: whether that is every expert, so that the layers may rely on all being there.
        least_slots: per record layout, how many experts a single token needs.
        model: number of the model among those of this worker, the same for every rank.
        daemon_bytes: size of a daemon that is started: what all models of all workers want.

    Raises:
        ConfigError: the daemon that was named does not answer, will not serve this model, or could not be started.
    """
    request = Attach(
        store=store.path.name,
        pid=os.getpid(),
        wanted_bytes=wanted_bytes,
        lease=wants_all,
        group=f"{vllm_config.instance_id}.{vllm_config.parallel_config.data_parallel_rank}.{model}",
        rank=get_tensor_model_parallel_rank(),
        least_slots=least_slots,
    )
    client = join_daemon(config.daemon, request, store, config.policy, daemon_bytes, io_cpus, counters)
    if client is not None:
        logger.info("moe-offload: experts are kept by the daemon (pid %d) at %s", client.daemon_pid, client.path)
        if "policy" in config.model_fields_set and config.daemon != "start":
            logger.info(
                "moe-offload: policy = %r is used while there is no daemon; the daemon evicts by its own --policy",
                config.policy,
            )
    return client


def daemon_socket(config: OffloadConfig) -> Path:
    """Where the daemon of these settings serves."""
    return socket_of(config.daemon)


def predicts_on_other_rank(vllm_config: Any) -> bool:
    """Whether what this worker will need is foretold by a rank that splits the same experts with it.

    What that rank asks the daemon to prefetch, the daemon prefetches for all of its group.
    """
    return get_tensor_model_parallel_rank() > 0 and not vllm_config.parallel_config.enable_expert_parallel
