"""What systemd is told."""

import asyncio
import socket
from types import SimpleNamespace

import pytest

from server.api import supervisor
from server.api.watchdog import Watchdog

pytestmark = pytest.mark.anyio


async def test_the_supervisor_is_told_while_the_engine_is_well_and_not_when_it_is_stuck(monkeypatch):
    monkeypatch.setattr("server.api.watchdog.WATCH_S", 0.001)
    watchdog, engine = Watchdog(0.005), SimpleNamespace(alive=True, step_in_hand=None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind("")  # Linux picks an abstract name; a path in a temporary folder may be too long for one
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + notified.getsockname()[1:].decode())
        notified.setblocking(False)
        watching = asyncio.ensure_future(watchdog.watch(lambda: engine))
        assert await asyncio.get_running_loop().sock_recv(notified, 100) == b"WATCHDOG=1"
        engine.step_in_hand = 3
        while not watchdog.is_stuck:
            await asyncio.sleep(0.001)
        watching.cancel()
        supervisor.tell("STOPPING=1")
        told = []
        while b"STOPPING=1" not in told:
            told.append(await asyncio.get_running_loop().sock_recv(notified, 100))
        assert len(told) < 20


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/at/all"])
def test_nobody_to_tell_is_no_fault(monkeypatch, address):
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert supervisor.tell("READY=1") is None
