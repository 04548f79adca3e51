"""What can be refused before any worker starts: folders, the trace file, the daemon, settings of another platform.

A worker would refuse the same, but only once it has loaded the model.
"""

from pathlib import Path
from typing import Any

from ..client.joining import refuse_missing_daemon
from ..config import OffloadConfig
from ..errors import ConfigError
from ..store.root import StoreRoot
from ..trace.archive import HistoryArchive
from ..trace.trace_recording import refuse_unusable_file
from . import machine


def refuse_what_is_known(vllm_config: Any, config: OffloadConfig, serves: bool) -> None:
    """Refuse settings with which no worker of this engine can start.

    Args:
        serves: whether requests will be served; else only stores are built.

    Raises:
        ConfigError, StoreError, TraceError: naming the setting and what would work.
    """
    refuse_memory_of_gpus(config)
    parallel = vllm_config.parallel_config
    if parallel.nnodes > 1 or parallel.distributed_executor_backend == "ray":
        return
    StoreRoot(config.store).require_usable()
    if serves:
        refuse_unusable_files(config)


def refuse_memory_of_gpus(config: OffloadConfig) -> None:
    """Refuse ``host_cache`` where there is no memory of a device in front of it.

    Raises:
        ConfigError: it was given, and experts are computed on the CPU.
    """
    if "host_cache" in config.model_fields_set and not machine.computes_on_device():
        raise ConfigError(
            "host_cache is memory behind slots of a GPU, and this engine computes on the CPU, whose slots are host "
            "memory: leave host_cache out; cache says how much there is"
        )


def refuse_unusable_files(config: OffloadConfig) -> None:
    """Refuse folders, files and sockets on this machine that workers on it cannot use.

    Raises:
        ConfigError: the history's folder cannot be written, or the daemon that was named does not answer.
        TraceError: the trace cannot be recorded there.
    """
    if config.history not in (None, "off") and config.predictor != "none":
        named_history(config.history)
    if config.trace is not None:
        refuse_unusable_file(config.trace)
    refuse_missing_daemon(config.daemon)


def named_history(folder: str) -> HistoryArchive:
    """The histories in a folder that the settings name.

    Raises:
        ConfigError: it cannot be written.
    """
    archive = HistoryArchive(Path(folder))
    if problem := archive.problem():
        raise ConfigError(f"history = {folder!r}: {problem}; name a folder that can be written, or 'off'")
    return archive
