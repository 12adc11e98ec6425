"""HTTP over an exported file: images in, probabilities out, and a page to try it. Sees only the file, never the run."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.resources import files as resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from threefold.batching import BATCH_PIXELS, Batcher, Run
from threefold.errors import DataError, ExportError, RunError
from threefold.gauges import Gauges
from threefold.guard import Guard, protocol
from threefold.intake import BODY, Image, read_images, size_of, unreadable
from threefold.limits import Limits, Refusal
from threefold.replies import Answers, Failure, describe
from threefold.runtime import FULL, CascadePolicy, Model, ModelOutput, as_json

MEMORY: Final = 2**30
"""Bytes that onnxruntime may take beside twice the size of the model file."""
SAMPLE: Final = (256, 256, 3)
"""The grey image on which a budget is measured."""
Mode = Literal["full", "fast"]
LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
PAGE: Final = {
    "/": "index.html",
    "/style.css": "style.css",
    "/app.js": "app.js",
    "/backend.js": "server.js",
    "/icon.svg": "icon.svg",
}
KINDS: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


def make_app(
    model: Model,
    limits: Limits | None = None,
    api_key: str = "",
    hosts: Collection[str] = (),
    policy: CascadePolicy = FULL,
) -> FastAPI:
    """The application around a loaded model: the page, POST /predict, GET /card, /health, /metrics, /openapi.json.

    Args:
        model: what answers.
        limits: what is taken (default: `Limits()`).
        api_key: what /predict, /card and /metrics ask for; empty = nothing.
        hosts: the only host names that are answered to; empty = any.
        policy: its mode is that of requests that name none; its limit on the stages is that of mode "fast".

    Raises:
        ExportError: the model has no cascade and one is asked for.
    """
    model.stop_thresholds(policy)
    fast = replace(policy, mode="fast")
    limits = limits or Limits()
    batcher: list[Batcher] = []
    gauges = Gauges(lambda: sum(b.waiting() for b in batcher))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.append(Batcher(runner(model), limits.batch, gauges.batches.observe))
        yield
        await asyncio.to_thread(batcher.pop().close)  # what is in flight has been answered by now

    name = str(model.card.get("name") or "model")
    about = f"{name}: {len(model.classes)} classes, {len(model.members)} members"
    app = FastAPI(
        title="threefold",
        description=about,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.add_middleware(Guard, limits=limits, gauges=gauges, api_key=api_key, hosts=hosts)
    _add_errors(app)
    _add_page(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether requests are answered."""
        return {"status": "ok"}

    @app.get("/card")
    async def card() -> dict[str, Any]:
        """The model card: what the model is, how it was scored, with which versions; this server's limits and mode."""
        return {
            **as_json(model.card),
            "limits": {k: getattr(limits, k) for k in ("files", "file_bytes", "pixels", "side")},
            **(
                {}
                if model.cascade is None
                else {"mode": policy.mode, "max_stages": policy.max_stages}
            ),
        }

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(gauges.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    failures = {s: {"model": Failure} for s in (400, 401, 408, 413, 415, 429, 503)}

    @app.post(
        "/predict",
        response_model=Answers,
        response_model_exclude_none=True,
        responses=failures,  # type: ignore[arg-type]
        openapi_extra=BODY,
    )
    async def predict(
        request: Request, top: Annotated[int, Query(ge=1, le=1000)] = 3, mode: Mode | None = None
    ) -> Answers:
        """The most probable classes of each image, each member's opinion, and the prediction set if the model has one."""
        if mode == "fast" and model.cascade is None:
            raise Refusal(400, "mode", "this model has no cascade, so there is no mode but full")
        images = await read_images(request, limits)
        try:
            async with asyncio.timeout(limits.answer_seconds):
                policy_used = fast if (mode or policy.mode) == "fast" else FULL
                outputs = await _answer_all(batcher[0], images, limits, policy_used)
        except TimeoutError:
            raise Refusal(
                503, "timeout", f"no answer within {limits.answer_seconds} seconds; try again"
            ) from None
        gauges.images.inc(len(outputs))
        return Answers(
            answers=[
                describe(model, image.name, output, top)
                for image, output in zip(images, outputs, strict=True)
            ]
        )

    return app


def runner(model: Model) -> Run:
    """Run the model on a batch and give back the memory that a large image took."""
    import onnxruntime

    frugal = onnxruntime.RunOptions()
    frugal.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def run(images: np.ndarray, policy: CascadePolicy) -> ModelOutput:
        return model.run(images, policy, frugal if images.size > BATCH_PIXELS else None)

    return run


async def _answer_all(
    batcher: Batcher, images: Sequence[Image], limits: Limits, policy: CascadePolicy
) -> list[ModelOutput]:
    """Answers in the order of the images; if one cannot be had the request fails and what still waits is dropped."""
    sizes = await asyncio.to_thread(lambda: [size_of(image, limits) for image in images])
    futures = [
        asyncio.wrap_future(batcher.submit(i.content, s, policy))
        for i, s in zip(images, sizes, strict=True)
    ]
    outputs: list[ModelOutput] = []
    try:
        for image, future in zip(images, futures, strict=True):
            outputs.append(await _refusing(future, image.name))
    finally:
        for future in futures:
            future.cancel()
            future.add_done_callback(
                lambda f: f.cancelled() or f.exception()
            )  # an error that nobody waits for any more
    return outputs


async def _refusing(answer: Awaitable[Any], name: str) -> Any:
    try:
        return await answer
    except DataError as error:
        raise unreadable(error, name) from None
    except ExportError:
        raise Refusal(503, "model", "the model cannot answer for this image", name) from None


def _add_page(app: FastAPI) -> None:
    """The page's files, from memory."""
    for route, name in PAGE.items():
        content, kind = (
            (resources("threefold") / "web" / name).read_bytes(),
            KINDS[name.rpartition(".")[2]],
        )

        async def file(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind)

        app.add_api_route(route, file, include_in_schema=False, response_model=None)


def _add_errors(app: FastAPI) -> None:
    """Every error as one kind of JSON; nothing of the machine in it."""

    def told(refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.tree(), refusal.status, refusal.headers())

    @app.exception_handler(Refusal)
    async def refused(_: Request, error: Refusal) -> JSONResponse:
        return told(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return told(Refusal(400, "bad_request", f"{first['loc'][-1]}: {first['msg']}"[:200]))

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return told(Refusal(error.status_code, "http", str(error.detail)[:200]))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return told(Refusal(500, "internal", "the server failed; its log says more"))


class _Server(uvicorn.Server):
    """uvicorn's server; a signal that has been obeyed is not raised again, so that an orderly end is exit code 0."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        super().handle_exit(sig, frame)
        self._captured_signals.clear()


def run_server(
    path: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str = "",
    limits: Limits | None = None,
    ready: Callable[[str], object] = lambda _: None,
    policy: CascadePolicy = FULL,
) -> None:
    """Serve an exported file until SIGINT or SIGTERM; what is in flight then is still answered.

    Args:
        path: the file.
        host: address to listen on; on a loopback address only requests to that name are answered.
        port: 0 = any free one.
        api_key: what /predict, /card and /metrics ask for; empty = nothing.
        limits: what is taken.
        ready: told the address of the page once the port is open.
        policy: how many members answer; a time budget is measured on an image of 256 x 256.

    Raises:
        ExportError: the file is not a threefold model, has no cascade where one is asked for, or the budget is too small.
        RunError: the address cannot be had.
    """
    model = Model(path, memory=MEMORY, spin=False)
    if policy.budget_ms:
        policy = model.resolve_budget(policy, np.full(SAMPLE, 128, np.uint8))
    server, listener = make_server(model, host, port, limits or Limits(), api_key, policy)
    with listener:
        ready(f"http://{_shown(host)}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])


def make_server(
    model: Model,
    host: str,
    port: int,
    limits: Limits,
    api_key: str = "",
    policy: CascadePolicy = FULL,
) -> tuple[uvicorn.Server, socket.socket]:
    """A server that is not running yet, and the open port that it is to be run with; the arguments are those of `make_app`.

    Raises:
        ExportError: the policy needs a cascade and the model has none.
        RunError: the address cannot be had.
    """
    model.stop_thresholds(policy)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise RunError(
            "cannot listen",
            where=f"{host}:{port}",
            got=error.strerror or error,
            fix="choose another --port",
        ) from None
    hosts = {*map(_shown, LOOPBACK), _shown(host.lower())} if host in LOOPBACK else set()
    config = uvicorn.Config(
        make_app(model, limits, api_key, hosts, policy),
        http=protocol(limits),
        ws="none",
        lifespan="on",
        log_level="warning",
        server_header=False,
        access_log=False,
        timeout_graceful_shutdown=limits.body_seconds + limits.answer_seconds,
    )
    return _Server(config), listener


def _shown(host: str) -> str:
    """A host as addresses have it."""
    return f"[{host}]" if ":" in host else host
