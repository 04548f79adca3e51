"""Which daemon an engine uses: what its setting ``daemon`` means on this host.

With ``auto`` nothing about a daemon may keep an engine from starting.
"""

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError, OffloadError
from ..ipc.address import default_socket_path
from ..ipc.arena import slot_bytes
from ..ipc.protocol import Attach
from ..stats import Stats
from ..store.reader import Store
from .client import DaemonClient
from .connection import Connection, DaemonGoneError
from .launch import start_daemon

logger = logging.getLogger(__name__)

LEAVE_AFTER_SECONDS = 60.0
"""A daemon started for an engine stays so long after its last one has gone."""
ANSWER_SECONDS = 20.0
"""For a daemon to say that it is there."""
STARTS = 3
"""A daemon that answers may be about to leave; then another is started."""

Join = Callable[[Path], DaemonClient]


def join_daemon(
    setting: str,
    request: Attach,
    store: Store,
    policy: str,
    daemon_bytes: int,
    io_cpus: set[int] | None,
    stats: Stats,
) -> DaemonClient | None:
    """The daemon that the setting ``daemon`` asks for, or None where this worker keeps its own slots.

    Args:
        request: what to attach to.
        store: the model's.
        policy: name of the eviction policy while there is no daemon, and of a daemon that is started.
        daemon_bytes: size of a daemon that is started, whole pages of slots included (``bytes_with_pages``).
        io_cpus: where a daemon that is started, and loader threads while there is none, may run; None for anywhere.
        stats: the worker's.

    Raises:
        ConfigError: the daemon that was named does not answer, will not serve this model, or could not be started.
    """

    def join(path: Path) -> DaemonClient:
        return DaemonClient(path, request, store, policy, io_cpus, stats)

    if setting == "off":
        return None
    try:
        path = socket_of(setting)
        if setting == "auto":
            return join(path) if path.exists() else None
        if setting == "start":
            return _start_and_join(path, store, policy, daemon_bytes, io_cpus, join)
        return join(path)
    except (OffloadError, OSError) as error:
        reason = str(error)
        if setting != "auto":
            raise _unusable(setting, reason) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if setting != "auto":
            raise
    logger.warning(
        "no daemon can be used: %s; this engine keeps its own experts (daemon 'off' does so without looking)", reason
    )
    return None


def refuse_missing_daemon(setting: str) -> None:
    """Refuse a daemon that is named by its socket and does not answer.

    Raises:
        ConfigError: naming the setting and the reason.
    """
    if setting in ("auto", "start", "off"):
        return
    try:
        Connection.connect(socket_of(setting), "control", ANSWER_SECONDS).close()
    except OffloadError as error:
        raise _unusable(setting, str(error)) from error


def socket_of(setting: str) -> Path:
    """Where the daemon of the setting ``unix:PATH``, ``PATH``, ``auto`` or ``start`` serves.

    Raises:
        ConfigError: the default place cannot be trusted.
    """
    path = setting.removeprefix("unix:")
    return Path(path) if path.startswith("/") else default_socket_path()


def _unusable(setting: str, reason: str) -> ConfigError:
    return ConfigError(f"daemon = {setting!r}: {reason}; or choose 'auto' or 'off'")


def _start_and_join(
    path: Path, store: Store, policy: str, nbytes: int, cpus: set[int] | None, join: Join
) -> DaemonClient:
    cache = f"{nbytes}B"
    options = ["--store", str(store.path.parent.absolute()), "--policy", policy]
    for _ in range(STARTS - 1):
        start_daemon(path, cache, LEAVE_AFTER_SECONDS, options, cpus=cpus)
        with suppress(DaemonGoneError):
            return join(path)
    start_daemon(path, cache, LEAVE_AFTER_SECONDS, options, cpus=cpus)
    return join(path)


def bytes_with_pages(nbytes: int, store: Store) -> int:
    """Memory that records of ``nbytes`` together take in a daemon, which gives every slot whole pages."""
    layouts = {entry.layout for entry in store.layers}
    return math.ceil(nbytes * max(slot_bytes(layout) / layout.payload_bytes for layout in layouts))
