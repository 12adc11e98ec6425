"""Open a port and make the server that answers on it."""

from __future__ import annotations

import signal
import socket
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Final

import uvicorn
from fastapi import FastAPI

from threefold.errors import RunError
from threefold.serving.limits import ServerLimits
from threefold.serving.middleware import make_protocol

LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
"""Addresses that only this machine can reach."""
MAX_PORT: Final = 65_535
BACKLOG: Final = 256
"""Connections that may wait to be accepted. All of them are accepted at once."""


class _Server(uvicorn.Server):
    """uvicorn's server without raising a handled signal again: an orderly end is exit code 0.

    A closed terminal ends it in order, too.
    """

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle SIGINT and SIGTERM, and SIGHUP unless it is ignored, as under nohup."""
        number = getattr(signal, "SIGHUP", None)
        is_main = threading.current_thread() is threading.main_thread()
        if number is None or not is_main or signal.getsignal(number) == signal.SIG_IGN:
            with super().capture_signals():
                yield
            return
        before = signal.signal(number, self.handle_exit)
        try:
            with super().capture_signals():
                yield
        finally:
            signal.signal(number, before)

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        self._captured_signals.clear()


def open_listener(host: str, port: int) -> socket.socket:
    """Open a port; 0 = any free one.

    Raises:
        RunError: the address is not available.
    """
    if not 0 <= port <= MAX_PORT:
        raise RunError(
            "cannot listen", where=f"{host}:{port}", expected=f"a port of 0 to {MAX_PORT}"
        )
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # the second for a host of 70 letters
        raise _cannot_listen(host, port, error) from None


def _cannot_listen(host: str, port: int, error: Exception) -> RunError:
    return RunError(
        "cannot listen", where=f"{host}:{port}", got=error, fix="choose another --host or --port"
    )


def open_listeners(host: str, port: int, count: int) -> list[socket.socket]:
    """Open a port for several processes; the arguments and errors are those of `open_listener`.

    Returns:
        A socket for each process. On Linux each has a queue of its own, among which the system
        spreads the connections; elsewhere they share one.
    """
    first = open_listener(host, port)
    if sys.platform != "linux":
        return [first, *(first.dup() for _ in range(count - 1))]
    # The first socket shows that the port is free: one that shares its port could be opened beside
    # those of another server.
    family, address = first.family, first.getsockname()[:2]
    first.close()
    try:
        return [
            socket.create_server(address, family=family, backlog=BACKLOG, reuse_port=True)
            for _ in range(count)
        ]
    except OSError as error:  # another program was quicker
        raise _cannot_listen(host, port, error) from None


def allowed_hosts(host: str) -> set[str]:
    """Return the host names to answer to: loopback names on a loopback address, else any."""
    return {*map(url_host, LOOPBACK), url_host(host.lower())} if host in LOOPBACK else set()


def make_uvicorn(app: FastAPI, limits: ServerLimits) -> uvicorn.Server:
    """Make a server that does not run yet."""
    config = uvicorn.Config(
        app,
        http=make_protocol(limits),
        ws="none",
        lifespan="on",
        log_level="warning",
        server_header=False,
        access_log=False,
        timeout_graceful_shutdown=limits.body_seconds + limits.answer_seconds,
        backlog=BACKLOG,
    )
    return _Server(config)


def url_host(host: str) -> str:
    """The host as URLs and Host headers write it: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host
