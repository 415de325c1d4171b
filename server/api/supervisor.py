"""What systemd is told: ready, well, stopping (sd_notify(3)). Silence where nothing listens."""

from __future__ import annotations

import contextlib
import os
import socket


def tell(state: str) -> None:
    """Send a line such as ``READY=1`` to the socket that NOTIFY_SOCKET names."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
