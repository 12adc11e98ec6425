"""What every application of the package has: files of its page, and errors as JSON."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files as resources
from pathlib import Path
from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from threefold.serving.limits import Refusal

MEDIA_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def add_pages(app: FastAPI, routes: Mapping[str, str]) -> None:
    """Serve files of `web/` from memory; `routes` maps a route to a file."""
    for route, name in routes.items():
        content = (resources("threefold.serving") / "web" / name).read_bytes()
        endpoint = _file_endpoint(content, MEDIA_TYPES[Path(name).suffix])
        app.add_api_route(route, endpoint, include_in_schema=False, response_model=None)


def _file_endpoint(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    """Build an endpoint without parameters: FastAPI would read those from the query."""

    async def send_file() -> Response:
        return Response(content, media_type=media_type)

    return send_file


def add_error_handlers(app: FastAPI) -> None:
    """Send every error as the JSON of a Refusal, without details of the machine."""

    def respond(refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.body(), refusal.status, refusal.headers())

    @app.exception_handler(Refusal)
    async def on_refusal(_: Request, error: Refusal) -> JSONResponse:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_query(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        message = f"{first['loc'][-1]}: {first['msg']}"
        return respond(Refusal(400, "bad_request", message[:200]))

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> JSONResponse:
        refusal = Refusal(error.status_code, "http", str(error.detail)[:200])
        # Such as `allow`, which a response of status 405 must have.
        headers = {**(error.headers or {}), **refusal.headers()}
        return JSONResponse(refusal.body(), refusal.status, headers)

    @app.exception_handler(Exception)
    async def on_failure(_: Request, error: Exception) -> JSONResponse:
        return respond(Refusal(500, "internal", "the server failed; see its log"))
