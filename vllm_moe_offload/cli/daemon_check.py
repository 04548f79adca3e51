"""What `doctor` says of a daemon that runs at the usual place. Must never raise for what it finds, nor start one."""

import contextlib
import os

from vllm_moe_offload.client.connection import Connection
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.ipc.address import default_socket_path
from vllm_moe_offload.ipc.protocol import GetStatus

ANSWER_SECONDS = 5.0


def daemon_health() -> tuple[str, bool] | None:
    """A sentence about the daemon, and whether all is well with it; None where there is none."""
    try:
        path = default_socket_path()
        if not os.path.lexists(path):
            return None
        with contextlib.closing(Connection.connect(path, "control", ANSWER_SECONDS)) as connection:
            report = connection.request(GetStatus())
    except OffloadError as error:
        return str(error), False
    if report.failed_threads:
        return f"pid {report.pid}: threads have ended by errors, restart it: {'; '.join(report.failed_threads)}", False
    return f"pid {report.pid} answers at {path}", True
