"""Which process an engine accepts as its daemon. It must never trust a process for where it listens alone.

A daemon learns what its engines are asked, and gives them the weights they compute with.
"""

import os
from collections.abc import Container
from pathlib import Path

from ..ipc.address import SHARED, writable_by_others
from ..ipc.credentials import Peer
from ..users import is_known


def objection_to(daemon: Peer, socket: Path) -> str | None:
    """Why the process that listens at a socket may not be used as a daemon; None if it may.

    This user and root may. Another user may where nobody else can have put the socket there: then root or this user has
    made the folder for that user, and who names a socket in it means that user's daemon.
    """
    if not is_known(daemon.uid, "uid"):
        return f"it runs as a user who does not exist in this container (seen as {daemon.uid})"
    own = {0, os.geteuid()}
    folder = socket.resolve().parent
    if daemon.uid in own or _belongs_to(folder, own, daemon.uid):
        return None
    return (
        f"it runs as user {daemon.uid}. User {os.geteuid()} uses daemons of its own, of root, and those of others only "
        f"where {folder} and every folder above it belongs to root or one of the two and nobody else can write there"
    )


def _belongs_to(folder: Path, own: Container[int], other: int) -> bool:
    """Whether no user but ``own`` and ``other`` can put anything at this path, and ``other`` only if ``own`` let it."""
    statuses = [each.stat() for each in (folder, *folder.parents)]
    if statuses[0].st_mode & SHARED:
        return False
    for status, below in zip(statuses[1:], statuses, strict=False):
        if status.st_mode & SHARED and below.st_uid not in own:
            return False
    return not any(writable_by_others(status, (0, os.geteuid(), other)) for status in statuses)
