"""Refuse slow, large, excess, foreign and unauthenticated requests before the application."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from threefold.errors import RunError
from threefold.serving.limits import Refusal, ServerLimits
from threefold.serving.metrics import Metrics

CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do: load its own files, show images from memory, call this server."""
HEADERS: Final = (
    (b"content-security-policy", CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
"""Headers of every response."""
IMAGE_ROUTES: Final = frozenset({"/predict", "/explain"})
"""Routes that take images; the number of their requests is limited."""
PROTECTED_ROUTES: Final = IMAGE_ROUTES | {"/card", "/metrics"}
"""Routes that need the API key, if there is one. The page itself holds nothing secret."""
KNOWN_ROUTES: Final = PROTECTED_ROUTES | {"/", "/health", "/openapi.json"}
"""Routes that the metrics name. Other paths come from clients, so there is no end of them."""
GRACE_SECONDS: Final = 2
"""How long a request may take to arrive before it gives way to another one."""


@dataclass(eq=False)
class _RequestState:
    """A request in progress: what it has sent, and until when the rest of it is awaited."""

    start: float
    deadline: float
    status: int = 500
    body_bytes: int = 0
    is_complete: bool = False
    must_close: bool = False
    waiting: asyncio.Timeout | None = None
    slow: str = ""
    """The refusal if the rest does not arrive."""

    def give_way(self, now: float) -> None:
        """Stop waiting for the rest of the request."""
        self.slow = "the request was slow to arrive, and others wait; try again"
        self.deadline = now
        if self.waiting is not None:
            self.waiting.reschedule(now)


class GuardMiddleware:
    """ASGI middleware that enforces the server's limits and adds headers to every response.

    It checks the API key, the Host and Origin headers, and the size, duration and number of
    requests. Starlette's TrustedHostMiddleware and `max_body_size` cannot take over a part of this:
    they answer in plain text instead of the JSON of `Refusal`, and they do not count the bytes of
    all requests together.

    Args:
        app: the application.
        limits: the limits.
        metrics: updated with every response.
        api_key: the key for `PROTECTED_ROUTES`; empty = none is needed.
        hosts: the only accepted values of the Host header, without the port; empty = any. This
            stops web pages whose own host name resolves to this address (DNS rebinding).
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: ServerLimits,
        metrics: Metrics,
        api_key: str = "",
        hosts: Collection[str] = (),
    ) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self.api_key, self.hosts = clean_key(api_key).encode(), frozenset(hosts)
        self.requests: dict[_RequestState, None] = {}  # to `IMAGE_ROUTES`, oldest first
        self.request_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request to the application, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        takes_images = path in IMAGE_ROUTES
        start = asyncio.get_running_loop().time()
        seconds = self.limits.body_seconds
        state = _RequestState(start, start + seconds)
        state.slow = f"the request did not arrive within {seconds} seconds"
        guarded_send = self._guard_send(send, state)
        try:
            self._check_headers(scope, state)
            if takes_images:
                self._make_room(start)
                self.requests[state] = None
            self.metrics.in_flight.set(len(self.requests))
            if scope["method"] == "HEAD":  # the server sends no body to such a request
                scope = {**scope, "method": "GET"}
            try:
                await self.app(scope, self._guard_receive(receive, state), guarded_send)
            finally:
                self.requests.pop(state, None)
                self.request_bytes -= state.body_bytes
                self.metrics.in_flight.set(len(self.requests))
                self.metrics.request_bytes.set(self.request_bytes)
        except Refusal as refusal:
            await send_refusal(guarded_send, refusal)
        finally:
            route = path if path in KNOWN_ROUTES else "other"
            self.metrics.requests.labels(route, str(state.status)).inc()
            if takes_images:
                is_predict = path == "/predict"
                histogram = self.metrics.seconds if is_predict else self.metrics.explain_seconds
                histogram.observe(asyncio.get_running_loop().time() - start)

    def _check_headers(self, scope: Scope, state: _RequestState) -> None:
        """Raise a Refusal if the headers alone are reason enough."""
        headers = dict(scope["headers"])
        if b"content-length" in headers and b"transfer-encoding" in headers:
            # A proxy may take the one and this server the other for the end of the body.
            state.must_close = True
            raise Refusal(400, "bad_request", "a request has a content-length or comes in chunks")
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.hosts and _strip_port(host) not in self.hosts:
            names = ", ".join(sorted(self.hosts))
            raise Refusal(421, "wrong_host", f"this server answers requests to {names} only")
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower().partition("://")[2] != host:
            raise Refusal(403, "wrong_origin", "pages of other origins cannot use this server")
        if self.api_key and scope["path"] in PROTECTED_ROUTES and not self._has_key(headers):
            raise Refusal(401, "no_key", "send the API key as `Authorization: Bearer KEY`")
        length = headers.get(b"content-length", b"0")
        if len(length) > 15 or int(length) > self.limits.body_bytes:
            raise self._too_many_bytes()

    def _make_room(self, now: float) -> None:
        """Refuse a request too many, unless an older one has still not arrived.

        So clients that send nothing cannot keep others out.
        """
        if len(self.requests) < self.limits.requests:
            return
        slow = self._slow_requests(now)
        if slow:
            slow[0].give_way(now)
            del self.requests[slow[0]]
            return
        message = f"the server is answering {self.limits.requests} requests; try again"
        raise Refusal(429, "busy", message)

    def _make_room_for_bytes(self, now: float) -> bool:
        """Drop the largest request that has still not arrived; False if there is none."""
        slow = [state for state in self._slow_requests(now) if state.body_bytes]
        if not slow:
            return False
        largest = max(slow, key=lambda state: state.body_bytes)
        largest.give_way(now)
        del self.requests[largest]
        # At once: before its task ends, more bytes of others may arrive and drop a second one.
        self.request_bytes -= largest.body_bytes
        largest.body_bytes = 0
        return True

    def _slow_requests(self, now: float) -> list[_RequestState]:
        """Requests that have still not arrived after `GRACE_SECONDS`, the oldest first."""
        return [
            state
            for state in self.requests
            if not state.is_complete and now - state.start >= GRACE_SECONDS
        ]

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.api_key)

    def _guard_receive(self, receive: Receive, state: _RequestState) -> Receive:
        """Count and time the body."""
        loop = asyncio.get_running_loop()

        async def guarded_receive() -> Message:
            if state.is_complete:  # the caller waits for the client to disconnect: no deadline
                return await receive()
            try:
                async with asyncio.timeout_at(state.deadline) as state.waiting:
                    message = await receive()
            except TimeoutError:
                raise Refusal(408, "slow", state.slow) from None
            finally:
                state.waiting = None
            if message["type"] == "http.disconnect":
                # The status is for the metrics only: nobody is there to read it.
                raise Refusal(499, "aborted", "the client left before its request had arrived")
            state.is_complete = not message.get("more_body", False)
            size = len(message.get("body", b""))
            self.request_bytes += size
            state.body_bytes += size
            self.metrics.request_bytes.set(self.request_bytes)
            if state.body_bytes > self.limits.body_bytes:
                raise self._too_many_bytes()
            is_full = self.request_bytes > self.limits.total_bytes
            if is_full and not self._make_room_for_bytes(loop.time()):
                raise Refusal(503, "full", "the server is reading too many bytes; try again")
            return message

        return guarded_receive

    def _guard_send(self, send: Send, state: _RequestState) -> Send:
        """Add the headers, and give up on a client that does not read its response."""

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                state.status = message["status"]
                headers = [*message.get("headers", ())]
                names = {name.lower() for name, _ in headers}
                headers += [header for header in HEADERS if header[0] not in names]
                if state.status == 408 or state.must_close:
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            async with asyncio.timeout(self.limits.body_seconds):
                await send(message)

        return guarded_send

    def _too_many_bytes(self) -> Refusal:
        message = f"a request may have at most {self.limits.body_bytes:,} bytes"
        return Refusal(413, "too_many_bytes", message)


def clean_key(key: str) -> str:
    """Return an API key without the spaces and line ends around it, which no header can carry.

    Raises:
        RunError: nothing is left of the key, or it has control characters.
    """
    cleaned = key.strip()
    if key and not cleaned:
        raise RunError("the API key is empty", fix="give a key, or none at all")
    if any(ord(sign) < 32 or ord(sign) == 127 for sign in cleaned):
        raise RunError(
            "the API key has line breaks or control characters, which no request can send",
            fix="give a key of letters and digits",
        )
    return cleaned


def _strip_port(host: str) -> str:
    """The host without its port, also if it is an IPv6 address in brackets."""
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


async def send_refusal(send: Send, refusal: Refusal) -> None:
    """Send a refusal as JSON."""
    body = json.dumps(refusal.body()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **refusal.headers(),
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


class LimitedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with bounds on the connections and on the time for a header.

    uvicorn itself waits for ever for a header that does not end, and for a client that keeps
    sending after it has its response. `make_protocol` sets the limits.
    """

    limits: ServerLimits
    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse a connection too many; otherwise start the clock."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self.respond_and_close(503, "full", "too many connections are open; try again")
        else:
            self.update_deadline()

    def data_received(self, data: bytes) -> None:
        """Pass on data, which may complete a request."""
        super().data_received(data)
        self.update_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self.clear_deadline()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Abort the connection if the client does not read its response in time."""
        super().pause_writing()
        # The application gives up after `body_seconds`; without this, what it has written
        # would stay in memory for as long as the client stays connected.
        self.loop.call_later(self.limits.body_seconds + 1, self.abort_if_stuck)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP; abort if a response is already on its way."""
        cycle = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.abort()
        else:
            self.respond_and_close(400, "bad_request", "this is not HTTP/1.1")

    def is_answering(self) -> bool:
        """Whether a request has arrived that has no complete response yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def update_deadline(self) -> None:
        """Stop the clock while a request is being answered; otherwise start it."""
        if self.is_answering():
            self.clear_deadline()
        elif self.deadline is None:
            self.deadline = self.loop.call_later(self.limits.header_seconds, self.on_deadline)

    def clear_deadline(self) -> None:
        """Stop the clock."""
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def on_deadline(self) -> None:
        """Refuse or abort a connection whose header did not arrive in time."""
        self.deadline = None
        if self.is_answering():
            return
        if self.cycle is None:
            message = f"no request arrived within {self.limits.header_seconds} seconds"
            self.respond_and_close(408, "slow", message)
        else:
            self.transport.abort()

    def abort_if_stuck(self) -> None:
        """Abort a connection whose client still does not read."""
        if self.flow.write_paused:
            self.transport.abort()

    def respond_and_close(self, status: int, code: str, message: str) -> None:
        """Respond without the application, and close the connection."""
        if self.transport.is_closing():
            return
        body = json.dumps(Refusal(status, code, message).body()).encode()
        head = (
            f"HTTP/1.1 {status} {code}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def make_protocol(limits: ServerLimits) -> type[LimitedProtocol]:
    """Build the protocol class for some limits; uvicorn makes its instances."""

    class Protocol(LimitedProtocol):
        pass

    Protocol.limits = limits
    return Protocol
