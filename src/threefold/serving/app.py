"""HTTP over an exported file: images in, probabilities out, and a page to try it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.responses import Response

from threefold.errors import DataError, ExportError
from threefold.machine import usable_cores
from threefold.names import count_of
from threefold.runtime.json_text import as_json
from threefold.runtime.model import FULL, CascadePolicy, Model
from threefold.runtime.model_output import ModelOutput
from threefold.serving.batching import BATCH_PIXELS, Batcher
from threefold.serving.explain import add_explain_route
from threefold.serving.limits import Refusal, ServerLimits, reserve_descriptors
from threefold.serving.listen import (
    allowed_hosts,
    make_uvicorn,
    open_listener,
    url_host,
)
from threefold.serving.metrics import Metrics
from threefold.serving.middleware import GuardMiddleware, clean_key
from threefold.serving.pages import add_error_handlers, add_pages
from threefold.serving.requests import (
    ImageFile,
    measure_image,
    read_images,
    request_body,
    unreadable_image,
)
from threefold.serving.responses import (
    ERRORS,
    MultilabelResponse,
    PredictResponse,
    describe_all,
    response_type,
)
from threefold.serving.workers import FileVersion, WorkerSettings, run_workers

MEMORY: Final = 2**30
"""Bytes that onnxruntime may use on top of twice the size of the model file."""
QUICK_BYTES: Final = 64 * 2**10
"""Bytes of files whose sizes are read in less time than it takes to ask a thread for it."""
BUDGET_IMAGE_SHAPE: Final = (256, 256, 3)
"""Shape of the grey image on which a time budget is measured."""
PAGE: Final = {
    "/": "index.html",
    "/style.css": "style.css",
    "/app.js": "app.js",
    "/facts.js": "facts.js",
    "/labels.js": "labels.js",
    "/parts.js": "parts.js",
    "/backend.js": "server.js",
    "/icon.svg": "icon.svg",
}
"""Route -> file of `web/`."""
PUBLIC_LIMITS: Final = ("files", "file_bytes", "pixels", "side")
"""Limits that GET /card states."""
Mode = Literal["full", "fast"]


def make_app(
    model: Model,
    limits: ServerLimits | None = None,
    api_key: str = "",
    hosts: Collection[str] = (),
    policy: CascadePolicy = FULL,
) -> FastAPI:
    """Build the application: the page, POST /predict and /explain, GET /card, /health, /metrics.

    Args:
        model: the loaded model.
        limits: the limits (default: `ServerLimits()`).
        api_key: the key for /predict, /explain, /card and /metrics; empty = none is needed.
        hosts: the only host names that are accepted; empty = any.
        policy: its mode applies to requests that name none; its limit on the stages applies to
            mode "fast".

    Raises:
        ExportError: the policy needs a cascade and the model has none.
    """
    model.stop_thresholds(policy)
    fast = replace(policy, mode="fast")
    limits = limits or ServerLimits()
    if model.canvas is None:  # the graph itself resizes large images
        limits = replace(limits, pixels=min(limits.pixels, limits.graph_pixels))
    batchers: list[Batcher] = []  # one, while the application runs
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        infer = ModelInference(model)
        resize = None if model.canvas is None else model.fit_canvas
        observers = (metrics.batches.observe, metrics.waiting.set)
        batchers.append(Batcher(infer, limits.batch, resize, *observers))
        yield
        await asyncio.to_thread(batchers.pop().close, limits.answer_seconds, infer.interrupt)

    name = str(model.card.get("name") or "model")
    app = FastAPI(
        title="threefold",
        description=f"{name}: {count_of(len(model.classes), 'class', 'classes')}, "
        f"{count_of(len(model.members), 'member')}",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.add_middleware(
        GuardMiddleware, limits=limits, metrics=metrics, api_key=api_key, hosts=hosts
    )
    add_error_handlers(app)
    add_pages(app, PAGE)
    _add_status_routes(app, model, limits, metrics, policy)

    @app.post(
        "/predict",
        response_model=response_type(model),
        response_model_exclude_none=True,
        responses=ERRORS,
        openapi_extra=request_body(limits.files),
    )
    async def predict(
        request: Request, top: Annotated[int, Query(ge=1, le=1000)] = 3, mode: Mode | None = None
    ) -> PredictResponse | MultilabelResponse:
        """Predict each image: its class or labels, the most probable ones, and each member's."""
        if mode == "fast" and model.cascade is None:
            raise Refusal(400, "mode", "this model has no cascade: the only mode is full")
        images = await read_images(request, limits)
        request_policy = fast if (mode or policy.mode) == "fast" else FULL
        try:
            async with asyncio.timeout(limits.answer_seconds):
                outputs = await _infer(batchers[0], images, limits, request_policy)
        except TimeoutError:
            message = f"no answer within {limits.answer_seconds} seconds; try again"
            raise Refusal(503, "timeout", message) from None
        metrics.images.inc(len(outputs))
        return describe_all(model, [image.name for image in images], outputs, top)

    add_explain_route(app, model, limits, lambda: batchers[0])
    return app


def _add_status_routes(
    app: FastAPI, model: Model, limits: ServerLimits, metrics: Metrics, policy: CascadePolicy
) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server answers requests."""
        return {"status": "ok"}

    @app.get("/card")
    async def card() -> dict[str, Any]:
        """The model card (classes, score, versions), and this server's limits and mode."""
        tree = dict(as_json(model.card))
        tree["limits"] = {name: getattr(limits, name) for name in PUBLIC_LIMITS}
        if model.cascade is not None:
            tree["mode"] = policy.mode
            tree["max_stages"] = policy.max_stages
        return tree

    @app.get("/metrics")
    async def metrics_text() -> Response:
        """Metrics in Prometheus' text format."""
        media_type = "text/plain; version=0.0.4; charset=utf-8"
        return Response(metrics.text(), media_type=media_type)


class ModelInference:
    """`model.run` for the batcher: it frees the memory of large images, and can be interrupted."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._running: set[Any] = set()  # onnxruntime's RunOptions
        self._lock = threading.Lock()

    def __call__(self, images: np.ndarray, policy: CascadePolicy) -> ModelOutput:
        """Run the model on a batch; several threads may call this at the same time."""
        options = onnxruntime.RunOptions()
        if images.size > BATCH_PIXELS:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        with self._lock:
            self._running.add(options)
        try:
            return self._model.run(images, policy, options)
        finally:
            with self._lock:
                self._running.discard(options)

    def interrupt(self) -> None:
        """Make the batches that are running fail, at the end of the operator that runs now."""
        with self._lock:
            for options in self._running:
                options.terminate = True


async def _infer(
    batcher: Batcher, images: Sequence[ImageFile], limits: ServerLimits, policy: CascadePolicy
) -> list[ModelOutput]:
    """Run images through the batcher, in order; if one fails, those still waiting are dropped."""
    sizes = await _measure(images, limits)
    contents = [image.content for image in images]
    jobs = batcher.submit(zip(contents, sizes, strict=True), policy)
    futures = [asyncio.wrap_future(job) for job in jobs]
    outputs: list[ModelOutput] = []
    try:
        for image, future in zip(images, futures, strict=True):
            outputs.append(await _await_output(future, image.name))
    finally:
        for future in futures:
            future.cancel()
            # asyncio logs exceptions that nobody retrieves.
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return outputs


async def _measure(images: Sequence[ImageFile], limits: ServerLimits) -> list[tuple[int, int]]:
    """Width and height of each image; in a thread if that may hold up other requests."""

    def measure_all() -> list[tuple[int, int]]:
        return [measure_image(image, limits) for image in images]

    if sum(len(image.content) for image in images) <= QUICK_BYTES:
        return measure_all()
    return await asyncio.to_thread(measure_all)


async def _await_output(future: Awaitable[ModelOutput], name: str) -> ModelOutput:
    try:
        return await future
    except DataError as error:
        raise unreadable_image(error, name) from None
    except ExportError:
        raise Refusal(503, "model", "the model failed on this image", name) from None


def run_server(
    path: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str = "",
    limits: ServerLimits | None = None,
    ready: Callable[[str], object] = lambda _: None,
    policy: CascadePolicy = FULL,
    workers: int = 1,
) -> None:
    """Serve an exported file until SIGINT or SIGTERM; requests in flight are still answered.

    Args:
        path: the exported file.
        host: the address to listen on. On a loopback address, only requests to loopback names are
            answered.
        port: the port; 0 = any free one.
        api_key: the key for /predict, /explain, /card and /metrics; empty = none is needed.
        limits: the limits (default: `ServerLimits()`).
        ready: called with the URL of the page once the port is open.
        policy: how many members answer; a time budget is measured on an image of 256 x 256.
        workers: number of processes that answer. Each loads the model, has its own limits, and
            uses its share of the cores.

    Raises:
        ExportError: the file is not a threefold model, the policy needs a cascade and the file has
            none, or the budget is too small.
        RunError: the address is not available, or a process cannot be started.
    """
    api_key = clean_key(api_key)  # before the model is loaded, which may take long
    threads = max(1, usable_cores() // workers) if workers > 1 else 0
    model = Model(path, threads, memory=MEMORY, spin=False)
    if policy.budget_ms:
        policy = model.resolve_budget(policy, np.full(BUDGET_IMAGE_SHAPE, 128, np.uint8))
    if workers > 1:
        model.stop_thresholds(policy)
        settings = WorkerSettings(
            path=model.path,
            version=FileVersion.of(model.path),
            threads=threads,
            api_key=api_key,
            hosts=allowed_hosts(host),
            limits=limits or ServerLimits(),
            policy=policy,
        )
        del model  # each process loads its own
        run_workers(settings, host, port, workers, ready)
        return
    server, listener = make_server(model, host, port, limits or ServerLimits(), api_key, policy)
    with listener:
        ready(f"http://{url_host(host)}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])


def make_server(
    model: Model,
    host: str,
    port: int,
    limits: ServerLimits,
    api_key: str = "",
    policy: CascadePolicy = FULL,
) -> tuple[uvicorn.Server, socket.socket]:
    """Open a port; the arguments are those of `run_server`.

    Returns:
        A server that does not run yet, and the listening socket to run it with.

    Raises:
        ExportError: the policy needs a cascade and the model has none.
        RunError: the address or the API key cannot be used, or the process may not open enough
            files for the connections.
    """
    model.stop_thresholds(policy)
    reserve_descriptors(limits)
    listener = open_listener(host, port)
    application = make_app(model, limits, api_key, allowed_hosts(host), policy)
    return make_uvicorn(application, limits), listener
