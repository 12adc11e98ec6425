"""A local page that shows what to look at in a data set, and writes what is decided.

It listens on this machine only. The images are read, and one CSV file is written: nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, Protocol

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict

from threefold.errors import DataError, ThreefoldError
from threefold.serving.limits import Refusal, ServerLimits, reserve_descriptors
from threefold.serving.listen import allowed_hosts, make_uvicorn, open_listener
from threefold.serving.metrics import Metrics
from threefold.serving.middleware import GuardMiddleware
from threefold.serving.pages import add_error_handlers, add_pages

HOST: Final = "127.0.0.1"
PAGE: Final = {
    "/": "review.html",
    "/style.css": "style.css",
    "/review.css": "review.css",
    "/review.js": "review.js",
    "/icon.svg": "icon.svg",
}
"""Route -> file of `web/`."""


class DecisionRequest(BaseModel):
    """What the page sends for an image."""

    model_config = ConfigDict(extra="forbid")
    id: str
    action: Literal["accept", "relabel", "drop", "undo"]
    label: str = ""


class ReviewBackend(Protocol):
    """What the page needs; `threefold.evaluation.review_state` has it."""

    def describe(self) -> dict[str, Any]:
        """Return what the page shows."""

    def picture(self, name: str) -> bytes:
        """Return a small PNG of an image; a DataError if there is none."""

    def decide(self, name: str, action: str, label: str) -> dict[str, Any]:
        """Keep a decision and write the file; a DataError if it is impossible."""


def make_review_app(
    state: ReviewBackend, limits: ServerLimits | None = None, hosts: set[str] | None = None
) -> FastAPI:
    """Build the application: the page, GET /items, GET /picture, POST /decide.

    Args:
        state: the review.
        limits: the limits (default: `ServerLimits()`).
        hosts: the only host names that are answered (default: those of this machine).
    """
    app = FastAPI(title="threefold review", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(
        GuardMiddleware,
        limits=limits or ServerLimits(),
        metrics=Metrics(),
        hosts=allowed_hosts(HOST) if hosts is None else hosts,
    )
    add_error_handlers(app)
    add_pages(app, PAGE)

    @app.get("/items")
    async def items() -> dict[str, Any]:
        """What to look at, and what is decided so far."""
        return state.describe()

    @app.get("/picture", response_class=Response)
    async def picture(name: Annotated[str, Query(alias="id")]) -> Response:
        """A small PNG of an image."""
        try:
            content = await asyncio.to_thread(state.picture, name)
        except DataError as error:
            raise Refusal(404, "no_image", str(error)[:200]) from None
        return Response(content, media_type="image/png")

    @app.post("/decide")
    async def decide(request: Request, decision: DecisionRequest) -> dict[str, Any]:
        """Keep a decision, and write the file."""
        # Only this type makes a browser ask first before a page of another origin may send it.
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise HTTPException(415, "send JSON")
        try:
            return await asyncio.to_thread(
                state.decide, decision.id, decision.action, decision.label
            )
        except DataError as error:
            raise Refusal(400, "bad_request", str(error)[:200]) from None
        except ThreefoldError as error:  # the disk is full, say
            raise Refusal(503, "file", str(error)[:200]) from None

    return app


def run_review(
    state: ReviewBackend, port: int = 0, ready: Callable[[str], object] = lambda _: None
) -> None:
    """Show the page on this machine until SIGINT or SIGTERM.

    Args:
        state: the review.
        port: the port; 0 = any free one.
        ready: called with the URL of the page once the port is open.

    Raises:
        RunError: the port is not available.
    """
    limits = ServerLimits()
    reserve_descriptors(limits)
    with open_listener(HOST, port) as listener:
        ready(f"http://{HOST}:{listener.getsockname()[1]}")
        make_uvicorn(make_review_app(state, limits), limits).run(sockets=[listener])
