"""Which engine a process belongs to: an id in the environment, which its processes inherit."""

import os
from uuid import uuid4

VARIABLE = "MOE_OFFLOAD_ENGINE"


def begin_engine(launches: bool) -> str:
    """The id of an engine that this process is configuring: a new one, or that of the process that launched it.

    vLLM's API servers configure their engine again, each in a process of its own.

    Args:
        launches: this process will launch API servers.
    """
    inherited = os.environ.get(VARIABLE, "")
    if inherited.endswith(f"@{os.getppid()}"):
        return inherited
    engine = uuid4().hex[:12]
    os.environ[VARIABLE] = f"{engine}@{os.getpid()}" if launches else engine
    return os.environ[VARIABLE]


def engine_id() -> str:
    """Of the engine configured last here, or by the process that started this one; empty where there is none."""
    return os.environ.get(VARIABLE, "")
