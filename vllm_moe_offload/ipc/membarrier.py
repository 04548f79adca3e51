"""A memory barrier on every processor that runs a registered process, paid for by the caller alone.

It lets readers go without fences of their own (epochs.py). It must never do nothing silently: without the system
call, reading without asking is not safe.
"""

import ctypes
import os
import platform

from ..errors import UnsupportedError

_SYSCALL = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "s390x": 356, "ppc64le": 365}
_GLOBAL_EXPEDITED = 1 << 1
_REGISTER_GLOBAL_EXPEDITED = 1 << 2

_syscall = ctypes.CDLL(None, use_errno=True).syscall


def register() -> None:
    """Let ``barrier`` of any process reach this one, all its threads and what it forks. Repeating it is harmless.

    Raises:
        UnsupportedError: the kernel lacks the call, or forbids it.
    """
    _membarrier(_REGISTER_GLOBAL_EXPEDITED)


def barrier() -> None:
    """Every running thread of a registered process, and the caller, pass a full memory barrier before this returns.

    Raises:
        UnsupportedError: the kernel lacks the call, or forbids it.
    """
    _membarrier(_GLOBAL_EXPEDITED)


def _membarrier(command: int) -> None:
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise UnsupportedError(
            f"the daemon's shared experts need membarrier(2), whose number on {platform.machine()} is not known; "
            "use --moe-offload-daemon off"
        )
    if _syscall(number, command, 0, 0):
        reason = os.strerror(ctypes.get_errno())
        raise UnsupportedError(
            f"the daemon's shared experts need membarrier(2) with MEMBARRIER_CMD_GLOBAL_EXPEDITED: {reason}; "
            "use a kernel from 4.16 on that a seccomp profile does not keep it from, or --moe-offload-daemon off"
        )
