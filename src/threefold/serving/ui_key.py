"""Let only those use a local page who have its whole address, with the key in it."""

from __future__ import annotations

import hmac
import secrets
from http.cookies import CookieError, SimpleCookie
from typing import Final
from urllib.parse import parse_qs

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from threefold.serving.limits import Refusal
from threefold.serving.middleware import send_refusal

PARAMETER: Final = "key"
COOKIE: Final = "threefold-ui"
HINT: Final = "open the whole address that `threefold ui` printed, with its key"


def make_key() -> str:
    """Return a new key."""
    return secrets.token_urlsafe(24)


class KeyMiddleware:
    """ASGI middleware that asks for a key: in the address of the page, then in a cookie.

    A port of this machine can be reached by all its users; the page reads and writes files with the
    rights of the one who started it. The cookie is sent to pages of the same site only.

    Args:
        app: the application.
        key: the key.
        cookie: name of the cookie, which servers on other ports of the machine must not share.
    """

    def __init__(self, app: ASGIApp, key: str, cookie: str = COOKIE) -> None:
        self.app, self.key, self.cookie = app, key, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        given = query.get(PARAMETER, [""])[0] if scope["path"] == "/" else ""
        is_new = self._matches(given)
        if not is_new and not self._matches(self._from_cookie(scope)):
            await send_refusal(send, Refusal(403, "no_key", HINT))
            return

        async def send_with_cookie(message: Message) -> None:
            if is_new and message["type"] == "http.response.start":
                value = f"{self.cookie}={self.key}; HttpOnly; SameSite=Strict; Path=/"
                headers = [*message.get("headers", ()), (b"set-cookie", value.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_cookie)

    def _from_cookie(self, scope: Scope) -> str:
        for name, value in scope["headers"]:
            if name == b"cookie":
                try:
                    cookies = SimpleCookie(value.decode("latin-1"))
                except CookieError:
                    continue
                if self.cookie in cookies:
                    return str(cookies[self.cookie].value)
        return ""

    def _matches(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.key.encode())
