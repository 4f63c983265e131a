"""The server as a process: from a socket to a clean end."""

from __future__ import annotations

import ipaddress
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from equipoise.serve.app import Served, make_app
from equipoise.settings import ConfigError

GRACE = 5
"""Seconds uvicorn has, once the scheduler is done, to send what it still holds."""
SWITCH_INTERVAL = 5e-4
"""Seconds after which Python's threads take turns. At its own 5 ms the scheduler would wait so long for the
event loop after every operation of PyTorch."""


class Server(uvicorn.Server):
    """uvicorn, with the scheduler's life bound to its own.

    Args:
        served: what it serves; its scheduler is started and ended here.
        ready: called when connections are accepted.
    """

    def __init__(self, served: Served, ready: Callable[[], object] | None = None) -> None:
        settings = served.scheduler.settings
        super().__init__(
            uvicorn.Config(
                make_app(served), log_level="warning", access_log=False, lifespan="off", server_header=False,
                timeout_graceful_shutdown=int(settings.shutdown_timeout) + GRACE, ws="none",
            )
        )  # fmt: skip
        self.scheduler, self.ready = served.scheduler, ready
        self.grace = settings.shutdown_timeout

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.scheduler.start()
        await super().startup(sockets)
        if self.ready is not None and not self.should_exit:
            self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.scheduler.drain(self.grace)
        await super().shutdown(sockets)
        self.scheduler.drain(0.0)
        self.scheduler.thread.join(GRACE)


def run(server: Server, bound: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; a second SIGINT does not wait for what is in flight."""
    before = {number: signal.signal(number, _nothing) for number in (signal.SIGINT, signal.SIGTERM)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        server.run(sockets=[bound])  # hands the signals on, when it is done, to whoever had them before
    finally:
        sys.setswitchinterval(interval)
        for number, handler in before.items():
            signal.signal(number, handler)


def _nothing(number: int, frame: FrameType | None) -> None:
    """A signal that has done its work."""


def bind(host: str, port: int) -> socket.socket:
    """A socket to listen on.

    Raises:
        ConfigError: no such address, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}.") from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --port, or 0 for any that "
            "is free."
        ) from None
    return bound


def loopback_hosts(bound: socket.socket) -> frozenset[str] | None:
    """The names of a socket on loopback; None for others."""
    address = bound.getsockname()[0]
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return None
    return frozenset({"localhost", "127.0.0.1", "::1", address})
