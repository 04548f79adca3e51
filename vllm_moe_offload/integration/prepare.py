"""Builds the stores of a model through vLLM's own start-up, which ends when they are complete.

The workers are those of a real engine, so the stores bear exactly the fingerprints that engine will look for. It must
never take slots or a KV cache.
"""

from pathlib import Path
from typing import Any

from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.executor import Executor

from ..config import PLUGIN_NAME
from .engine_config import PREPARE_ONLY
from .start_errors import raising_left_errors
from .worker import PreparedStore

NO_KV_CACHE = 0.01
"""Share of the machine's memory that vLLM is to find free: it refuses to start where its KV cache would not fit."""


def prepare_stores(model: str, arguments: list[str], store: Path | None) -> list[PreparedStore]:
    """Build or find the stores of every worker of an engine, its drafter's included.

    Args:
        model: as given to ``vllm serve``.
        arguments: command line arguments that engine would be given; unknown ones end the process with exit code 2.
        store: folder of the stores; None for what ``arguments`` and environment say.

    Raises:
        ConfigError, UnsupportedError, StoreError: what serving would raise.
    """
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="vllm-moe-offload prepare MODEL --"))
    flags = [] if store is None else ["--moe-offload-store", str(store)]
    engine_arguments = AsyncEngineArgs.from_cli_args(
        parser.parse_args(["--model", model, "--plugin", PLUGIN_NAME, *arguments, *flags])
    )
    engine_arguments.additional_config = {**engine_arguments.additional_config, PREPARE_ONLY: True}
    vllm_config = engine_arguments.create_engine_config()
    vllm_config.cache_config.gpu_memory_utilization = NO_KV_CACHE
    if vllm_config.parallel_config.world_size == 1:
        # in this process, where errors keep their type
        vllm_config.parallel_config.distributed_executor_backend = "uni"
    with raising_left_errors():
        executor = Executor.get_class(vllm_config)(vllm_config)
    try:
        return [PreparedStore(*found) for worker in executor.collective_rpc(_prepared) for found in worker]
    finally:
        executor.shutdown()
        cleanup_dist_env_and_memory()


def _prepared(worker: Any) -> list[tuple[str, int, bool]]:
    return [tuple(found) for found in worker.moe_offload_prepared]
