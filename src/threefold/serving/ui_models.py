"""The server of `threefold serve` for each exported file of a page, below a path of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote

from starlette.types import ASGIApp, Receive, Scope, Send

from threefold.errors import ThreefoldError
from threefold.runtime.model import Model
from threefold.serving.app import MEMORY, make_app
from threefold.serving.limits import Refusal, ServerLimits
from threefold.serving.middleware import send_refusal

PREFIX: Final = "/try/"
KEPT: Final = 2
"""Models that stay in memory, the ones used last."""


class _Loaded(NamedTuple):
    """A running application, and what stops it."""

    app: ASGIApp
    version: tuple[int, int]
    """Time and size of the file."""
    stack: AsyncExitStack


class ModelApps:
    """ASGI application that answers `/try/NAME/...` with the server of the run's exported file.

    Args:
        find: returns the exported file of a run; a Refusal if there is none.
        limits: of the servers.
    """

    def __init__(self, find: Callable[[str], Path], limits: ServerLimits) -> None:
        self._find, self._limits = find, limits
        self._loaded: dict[str, _Loaded] = {}
        self._lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        raw = scope.get("raw_path") or scope["path"].encode()
        name, slash, rest = raw.decode("latin-1").removeprefix(PREFIX).partition("/")
        try:
            if not slash:
                raise Refusal(404, "http", "Not Found")
            app = await self._open(unquote(name))
        except Refusal as refusal:
            await send_refusal(send, refusal)
            return
        except ThreefoldError as error:
            await send_refusal(send, Refusal(503, "model", str(error)[:200]))
            return
        path = "/" + unquote(rest)
        inner = {**scope, "path": path, "raw_path": f"/{rest}".encode("latin-1"), "root_path": ""}
        await app(inner, receive, send)

    async def _open(self, name: str) -> ASGIApp:
        """Return the application of a run's file as it is now."""
        path = await asyncio.to_thread(self._find, name)
        status = path.stat()
        version = (status.st_mtime_ns, status.st_size)
        async with self._lock:
            loaded = self._loaded.pop(name, None)
            if loaded is not None and loaded.version != version:
                await loaded.stack.aclose()
                loaded = None
            if loaded is None:
                model = await asyncio.to_thread(Model, path, memory=MEMORY, spin=False)
                app = make_app(model, self._limits)
                stack = AsyncExitStack()
                await stack.enter_async_context(app.router.lifespan_context(app))
                loaded = _Loaded(app, version, stack)
            self._loaded[name] = loaded
            while len(self._loaded) > KEPT:
                oldest = self._loaded.pop(next(iter(self._loaded)))
                await oldest.stack.aclose()
        return loaded.app

    async def close(self) -> None:
        """Stop all servers."""
        while self._loaded:
            _, loaded = self._loaded.popitem()
            await loaded.stack.aclose()
