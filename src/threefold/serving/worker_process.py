"""The main program of one of several server processes.

`python -m threefold.serving.worker_process CONNECTION LISTENER`

Both are descriptors: of a connection to the parent, which sends the settings and gets None when
this process is ready or the texts of an error; and of the socket to listen on. When the connection
ends because the parent has died, this process answers what it has begun and ends, too.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from threefold.errors import RunError, ThreefoldError, error_texts
from threefold.lazy import importing_for_good

if TYPE_CHECKING:
    import uvicorn

    from threefold.serving.workers import WorkerSettings


def main() -> None:
    """Connect to the parent, load the model, and answer."""
    for name in ("SIGINT", "SIGHUP"):  # a terminal sends them to the parent, too
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    descriptor, listener = map(int, sys.argv[1:])
    for number in (descriptor, listener):
        os.set_inheritable(number, False)
    with (
        Connection(descriptor) as connection,
        socket.socket(fileno=listener) as opened,
        suppress(EOFError, BrokenPipeError),
    ):
        settings = connection.recv()
        try:
            server = _make_server(settings)
        except ThreefoldError as error:
            connection.send(error_texts(error))
            raise SystemExit(1) from None
        connection.send(None)
        threading.Thread(target=_end_with, args=(connection, server), daemon=True).start()
        server.run(sockets=[opened])


def _make_server(settings: WorkerSettings) -> uvicorn.Server:
    with importing_for_good():
        from threefold.runtime.model import Model
        from threefold.serving.app import MEMORY, make_app
        from threefold.serving.limits import reserve_descriptors
        from threefold.serving.listen import make_uvicorn
        from threefold.serving.workers import FileVersion

    if FileVersion.of(settings.path) != settings.version:
        raise RunError(
            "the model's file has changed while it was served",
            where=settings.path,
            fix="start the server again",
        )
    model = Model(settings.path, settings.threads, memory=MEMORY, spin=False)
    reserve_descriptors(settings.limits)
    hosts, limits = settings.hosts, settings.limits
    return make_uvicorn(make_app(model, limits, settings.api_key, hosts, settings.policy), limits)


def _end_with(connection: Connection[Any, Any], server: uvicorn.Server) -> None:
    """Stop the server when the parent is gone."""
    with suppress(EOFError, OSError):
        connection.recv()
    server.should_exit = True


if __name__ == "__main__":
    main()
