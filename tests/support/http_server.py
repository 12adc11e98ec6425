"""A server on this machine, around any handler of requests or a folder."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def running(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer requests in threads; yields the address, and stops at the end."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class QuietHandler(SimpleHTTPRequestHandler):
    """Python's static server without its log."""

    def log_message(self, *_: object) -> None:
        """Write nothing."""


@contextmanager
def hosting(folder: Path) -> Iterator[str]:
    """Serve a folder with a static server; yields its URL."""
    with running(functools.partial(QuietHandler, directory=folder)) as url:
        yield f"{url}/"
