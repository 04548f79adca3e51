"""Tells systemd how the service is doing (sd_notify); does nothing where no systemd asked for it."""

import os
import socket


def notify(state: str) -> None:
    """Send ``READY=1``, ``STOPPING=1`` or another state to ``$NOTIFY_SOCKET``.

    Raises:
        OSError: the socket it names cannot be written.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
