"""What `doctor` says of a daemon that runs at the usual place. Must never raise for what it finds, nor start one."""

import contextlib
import os

from vllm_moe_offload.client.connection import Connection
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.ipc.address import default_socket_path
from vllm_moe_offload.ipc.protocol import GetStatus

from .check import OK, WARNING, Check

ANSWER_SECONDS = 5.0


def check_daemon() -> Check:
    """The daemon at the usual place."""
    subject = "daemon"
    try:
        path = default_socket_path()
        if not os.path.lexists(path):
            return Check(subject, OK, f"none at {path}: each engine keeps experts for itself")
        with contextlib.closing(Connection.connect(path, "control", ANSWER_SECONDS)) as connection:
            report = connection.request(GetStatus())
    except OffloadError as error:
        return Check(subject, WARNING, str(error), "see the daemon's log, and start it again")
    if report.failed_threads:
        detail = f"pid {report.pid}: threads have ended by errors: {'; '.join(report.failed_threads)}"
        return Check(subject, WARNING, detail, "restart it, and please report this")
    return Check(subject, OK, f"pid {report.pid} answers at {path}")
