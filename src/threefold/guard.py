"""Between the network and the application: slow, large, many, foreign or unknown senders are stopped here."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

from threefold.gauges import Gauges
from threefold.limits import Limits, Refusal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do: load its own files, show images from memory, ask this server."""
HEADERS: Final = (
    (b"content-security-policy", CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
KEYED: Final = {"/predict", "/card", "/metrics"}
"""Routes that need the API key where there is one; the page itself holds nothing secret."""


class Guard:
    """ASGI middleware: key, host and origin, bytes, time and number of requests; and headers on every answer.

    Args:
        app: the application.
        limits: what is taken.
        gauges: told of every answer.
        api_key: what /predict, /card and /metrics ask for; empty = nothing.
        hosts: the only values of the Host header without its port, against pages that point a name of their own at this
            address; empty = any.
    """

    def __init__(
        self,
        app: Any,
        limits: Limits,
        gauges: Gauges,
        api_key: str = "",
        hosts: Collection[str] = (),
    ) -> None:
        self.app, self.limits, self.gauges = app, limits, gauges
        self.api_key, self.hosts = api_key.encode(), frozenset(hosts)
        self.running = self.held = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        predicts = scope["path"] == "/predict"
        began, state = asyncio.get_running_loop().time(), {"status": 500, "held": 0}
        told = self._answering(scope, send, state)
        try:
            self._admit(scope)
            self.running += predicts
            self.gauges.in_flight.set(self.running)
            try:
                await self.app(scope, self._reading(receive, state), told)
            finally:
                self.running -= predicts
                self.held -= state["held"]
                self.gauges.in_flight.set(self.running)
                self.gauges.bytes_held.set(self.held)
        except Refusal as refusal:
            await refuse(told, refusal)
        finally:
            self.gauges.requests.labels(self._route(scope["path"]), str(state["status"])).inc()
            if predicts:
                self.gauges.seconds.observe(asyncio.get_running_loop().time() - began)

    def _admit(self, scope: MutableMapping[str, Any]) -> None:
        """Refuse what can be refused by the headers alone."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.hosts and _without_port(host) not in self.hosts:
            raise Refusal(
                421, "wrong_host", f"this server answers to {', '.join(sorted(self.hosts))} only"
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower().partition("://")[2] != host:
            raise Refusal(403, "wrong_origin", "pages of other origins cannot use this server")
        if self.api_key and scope["path"] in KEYED and not self._has_key(headers):
            raise Refusal(401, "no_key", "send the API key as `Authorization: Bearer KEY`")
        length = headers.get(b"content-length", b"0")
        if len(length) > 15 or int(length) > self.limits.body_bytes:
            raise _too_long(self.limits)
        if scope["path"] == "/predict" and self.running >= self.limits.requests:
            raise Refusal(
                429, "busy", f"{self.limits.requests} requests are being answered; try again"
            )

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        word, _, key = headers.get(b"authorization", b"").partition(b" ")
        return word.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.api_key)

    def _reading(self, receive: Receive, state: dict[str, int]) -> Receive:
        """The body, counted and timed."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.limits.body_seconds
        whole = False

        async def read() -> Message:
            nonlocal whole
            if whole:  # all has been read: whoever asks now wants to know when the client leaves, which has no limit
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise Refusal(
                    408,
                    "slow",
                    f"the request did not arrive within {self.limits.body_seconds} seconds",
                ) from None
            whole = not message.get("more_body", False)
            size = len(message.get("body", b""))
            self.held += size
            state["held"] += size
            self.gauges.bytes_held.set(self.held)
            if state["held"] > self.limits.body_bytes:
                raise _too_long(self.limits)
            if self.held > self.limits.total_bytes:
                raise Refusal(503, "full", "too many bytes are being read at a time; try again")
            return message

        return read

    def _answering(
        self, scope: MutableMapping[str, Any], send: Send, state: dict[str, int]
    ) -> Send:
        """Answers with the headers that every one has; a client that does not take its answer is left."""

        async def write(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                named = {name.lower() for name, _ in message.get("headers", ())}
                own = [pair for pair in HEADERS if pair[0] not in named]
                own += [(b"connection", b"close")] if message["status"] == 408 else []
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            async with asyncio.timeout(self.limits.body_seconds):
                await send(message)

        return write

    @staticmethod
    def _route(path: str) -> str:
        """A path as a label: what clients make up is not kept."""
        return path if path in KEYED | {"/", "/health", "/openapi.json"} else "other"


def _too_long(limits: Limits) -> Refusal:
    return Refusal(413, "too_many_bytes", f"a request may have {limits.body_bytes:,} bytes")


def _without_port(host: str) -> str:
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


async def refuse(send: Send, refusal: Refusal) -> None:
    """Send a refusal as JSON."""
    body = json.dumps(refusal.tree()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **refusal.headers(),
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def protocol(limits: Limits) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 protocol, with a limit on connections and on the time that a request's header takes.

    uvicorn itself waits for ever for a header that does not end and for a client that goes on sending after its answer.
    """

    class Protocol(H11Protocol):
        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self.end(503, "full", "too many connections are open; try again")
            else:
                self.watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self.unwatch()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            # The application stops waiting after a while; what it wrote would stay in memory for as long as the client.
            self.loop.call_later(limits.body_seconds + 1, self.abort_if_stuck)

        def send_400_response(self, msg: str) -> None:
            if (
                self.cycle is not None
                and self.cycle.response_started
                and not self.cycle.response_complete
            ):
                self.transport.abort()
            else:
                self.end(400, "bad_request", "this is not HTTP/1.1")

        def watch(self) -> None:
            """Start the clock where no request is being answered, stop it where one is."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.unwatch()
            elif self.deadline is None:
                self.deadline = self.loop.call_later(limits.header_seconds, self.too_late)

        def unwatch(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def too_late(self) -> None:
            self.deadline = None
            if self.cycle is not None and not self.cycle.response_complete:
                return
            if self.cycle is None:
                self.end(408, "slow", f"no request within {limits.header_seconds} seconds")
            else:
                self.transport.abort()

        def abort_if_stuck(self) -> None:
            if self.flow.write_paused:
                self.transport.abort()

        def end(self, status: int, code: str, message: str) -> None:
            """Answer outside the application, and close."""
            if self.transport.is_closing():
                return
            body = json.dumps(Refusal(status, code, message).tree()).encode()
            head = f"HTTP/1.1 {status} {code}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
            self.transport.close()

    return Protocol
