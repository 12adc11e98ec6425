"""A local page from a folder of images to a trained model: check, plan, train, report, try it.

It listens on this machine only, and answers only those who have the key in its address. What the
page asks for is done by child processes; closing the page, or the browser, stops nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.routing import Mount

from threefold.arguments import QUALITIES, parse_minutes
from threefold.errors import ThreefoldError
from threefold.serving.limits import Refusal, ServerLimits, reserve_descriptors
from threefold.serving.listen import allowed_hosts, make_uvicorn, open_listener
from threefold.serving.metrics import Metrics
from threefold.serving.middleware import GuardMiddleware
from threefold.serving.pages import add_error_handlers, add_pages
from threefold.serving.ui_jobs import Workbench
from threefold.serving.ui_key import COOKIE, PARAMETER, KeyMiddleware, make_key
from threefold.serving.ui_models import ModelApps
from threefold.serving.ui_places import list_places
from threefold.serving.ui_uploads import Uploads

HOST: Final = "127.0.0.1"
PIECE_BYTES: Final = 8 * 2**20
"""Bytes of a piece of a file, as the page sends them."""
PAGE: Final = {
    "/": "ui.html",
    "/style.css": "style.css",
    "/ui.css": "ui.css",
    "/ui.js": "ui.js",
    "/ui_common.js": "ui_common.js",
    "/ui_new.js": "ui_new.js",
    "/ui_run.js": "ui_run.js",
    "/ui_training.js": "ui_training.js",
    "/ui_result.js": "ui_result.js",
    "/icon.svg": "icon.svg",
}
"""Route -> file of `web/`."""
REPORT_CSP: Final = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox"
)
"""A report is one page with its pictures and styles inside, and no script."""


class DataRequest(BaseModel):
    """The images of a new run: a path on this machine, or a name on the hub."""

    model_config = ConfigDict(extra="forbid")
    data: str = Field(max_length=4096)


class PlanRequest(BaseModel):
    """What a plan depends on besides the images."""

    model_config = ConfigDict(extra="forbid")
    budget: str = Field("20m", max_length=20)
    quality: Literal["fast", "good", "best"] = "good"
    skip_bad: bool = False
    """Leave out images that cannot be read."""


class EmptyRequest(BaseModel):
    """A request whose address says everything."""

    model_config = ConfigDict(extra="forbid")


def make_ui_app(
    workbench: Workbench,
    uploads: Uploads,
    key: str,
    limits: ServerLimits | None = None,
    hosts: set[str] | None = None,
    cookie: str = COOKIE,
) -> FastAPI:
    """Build the application.

    Args:
        workbench: the runs.
        uploads: receives the images that the page sends.
        key: what the address of the page has to hold.
        limits: the limits (default: `ServerLimits()`).
        hosts: the only host names that are answered (default: those of this machine).
        cookie: name of the cookie for the key.
    """
    limits = limits or ServerLimits()
    models = ModelApps(lambda name: workbench.file(name, "model.onnx"), limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await models.close()

    app = FastAPI(
        title="threefold ui", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    app.add_middleware(KeyMiddleware, key=key, cookie=cookie)
    app.add_middleware(  # the last one added is asked first
        GuardMiddleware,
        limits=limits,
        metrics=Metrics(),
        hosts=allowed_hosts(HOST) if hosts is None else hosts,
    )
    add_error_handlers(app)

    @app.exception_handler(ThreefoldError)
    async def on_bad_input(_: Request, error: ThreefoldError) -> JSONResponse:
        return JSONResponse(Refusal(400, "bad_input", str(error)[:1000]).body(), 400)

    add_pages(app, PAGE)
    _add_list_routes(app, workbench)
    _add_upload_routes(app, uploads)
    _add_task_routes(app, workbench, uploads)
    app.router.routes.append(Mount("/try", app=models))
    return app


def _require_json(request: Request) -> None:
    """Refuse other types: only for this one a browser asks before another page may send it."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "send JSON")


def _add_list_routes(app: FastAPI, workbench: Workbench) -> None:
    @app.get("/state")
    async def state() -> dict[str, Any]:
        """All runs, and what can be chosen."""
        runs = await asyncio.to_thread(workbench.list_runs)
        return {
            "runs": runs,
            "folder": str(workbench.runs),
            "qualities": QUALITIES,
            "piece_bytes": PIECE_BYTES,
        }

    @app.get("/places")
    async def places(path: Annotated[str, Query(max_length=4096)] = "") -> dict[str, Any]:
        """Folders, archives and tables in a folder of this machine."""
        return await asyncio.to_thread(list_places, path)

    @app.get("/runs/{name}")
    async def run(name: str) -> dict[str, Any]:
        """One run, with the check of its images and its plan."""
        return await asyncio.to_thread(workbench.details, name)

    @app.get("/runs/{name}/events")
    async def events(name: str, after: Annotated[int, Query(ge=0)] = 0) -> dict[str, Any]:
        """What its child processes have reported since a position of the file."""
        found, position = await asyncio.to_thread(workbench.events, name, after)
        return {"events": found, "next": position}

    @app.get("/runs/{name}/report.html", response_class=FileResponse)
    async def report(name: str) -> FileResponse:
        """The report."""
        path = await asyncio.to_thread(workbench.file, name, "report.html")
        return FileResponse(path, headers={"content-security-policy": REPORT_CSP})

    @app.get("/runs/{name}/model.onnx", response_class=FileResponse)
    async def model(name: str) -> FileResponse:
        """The exported file."""
        path = await asyncio.to_thread(workbench.file, name, "model.onnx")
        return FileResponse(path, filename=f"{name}.onnx", media_type="application/octet-stream")


def _add_upload_routes(app: FastAPI, uploads: Uploads) -> None:
    @app.post("/uploads")
    async def begin(request: Request, _: EmptyRequest) -> dict[str, str]:
        """Begin to send files."""
        _require_json(request)
        return {"upload": await asyncio.to_thread(uploads.begin)}

    @app.put("/uploads/{upload}")
    async def write(
        request: Request,
        upload: str,
        name: Annotated[str, Query(max_length=4096)],
        offset: Annotated[int, Query(ge=0, lt=2**50)] = 0,
    ) -> dict[str, int]:
        """Send a piece of a file, as it is."""
        if request.headers.get("content-type") != "application/octet-stream":
            raise HTTPException(415, "send application/octet-stream")
        content = await request.body()
        return {"size": await asyncio.to_thread(uploads.write, upload, name, offset, content)}

    @app.post("/uploads/{upload}/finish")
    async def finish(request: Request, upload: str, _: EmptyRequest) -> dict[str, str]:
        """End it; returns where the files are."""
        _require_json(request)
        return {"data": str(await asyncio.to_thread(uploads.finish, upload))}

    @app.post("/uploads/{upload}/discard")
    async def discard(request: Request, upload: str, _: EmptyRequest) -> dict[str, str]:
        """Delete what has arrived."""
        _require_json(request)
        await asyncio.to_thread(uploads.discard, upload)
        return {}


def _add_task_routes(app: FastAPI, workbench: Workbench, uploads: Uploads) -> None:
    async def start(name: str, task: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        await asyncio.to_thread(workbench.start, name, task, dict(settings))
        return await asyncio.to_thread(workbench.look_up, name)

    @app.post("/runs")
    async def create(request: Request, body: DataRequest) -> dict[str, str]:
        """Begin a run on images of this machine with their check."""
        _require_json(request)
        try:
            return {"name": await asyncio.to_thread(workbench.create, body.data)}
        except ThreefoldError:  # images that were sent in vain
            await asyncio.to_thread(uploads.delete_with, Path(body.data))
            raise

    @app.post("/runs/{name}/check")
    async def check(request: Request, name: str, _: EmptyRequest) -> dict[str, Any]:
        """Check the images again."""
        _require_json(request)
        return await start(name, "check", {})

    @app.post("/runs/{name}/plan")
    async def plan(request: Request, name: str, body: PlanRequest) -> dict[str, Any]:
        """Make a plan, in place of one that training has not begun with."""
        _require_json(request)
        parse_minutes(body.budget, "time budget")
        return await start(name, "plan", body.model_dump())

    @app.post("/runs/{name}/fit")
    async def fit(request: Request, name: str, _: EmptyRequest) -> dict[str, Any]:
        """Train by the plan, or resume."""
        _require_json(request)
        return await start(name, "fit", {})

    @app.post("/runs/{name}/stop")
    async def stop(request: Request, name: str, _: EmptyRequest) -> dict[str, Any]:
        """Save what is done, and end."""
        _require_json(request)
        await asyncio.to_thread(workbench.stop, name)
        return {}

    @app.post("/runs/{name}/discard")
    async def discard(request: Request, name: str, _: EmptyRequest) -> dict[str, Any]:
        """Take a run off the list that has not been trained, with the images that were sent."""
        _require_json(request)
        data = await asyncio.to_thread(workbench.discard, name)
        await asyncio.to_thread(uploads.delete_with, Path(data))
        return {}


def run_ui(
    workbench: Workbench,
    uploads: Uploads,
    port: int = 0,
    ready: Callable[[str], object] = lambda _: None,
) -> list[str]:
    """Show the page on this machine until SIGINT or SIGTERM; then stop what is at work.

    Args:
        workbench: the runs.
        uploads: receives the images that the page sends.
        port: the port; 0 = any free one.
        ready: called with the address of the page, with its key, once the port is open.

    Returns:
        Names of the runs that were stopped; all of them can be resumed.

    Raises:
        RunError: the port is not available.
    """
    limits, key = ServerLimits(), make_key()
    reserve_descriptors(limits)
    with open_listener(HOST, port) as listener:
        number = listener.getsockname()[1]
        app = make_ui_app(workbench, uploads, key, limits, cookie=f"{COOKIE}-{number}")
        ready(f"http://{HOST}:{number}/?{PARAMETER}={key}")
        try:
            make_uvicorn(app, limits).run(sockets=[listener])
        finally:
            stopped = workbench.close()
    return stopped
