"""Explain an answer: POST /explain hides parts of an image and sends where that costs the class.

One explanation is 65 answers, so it must not keep other clients from theirs: only one is worked on
at a time, in steps of at most one batch, and each step waits until no image is ready
(`Batcher.submit_task`).
"""

from __future__ import annotations

import asyncio
import base64
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Final, Literal, NamedTuple

import numpy as np
from fastapi import FastAPI, Query, Request
from fastapi.responses import Response
from PIL import Image

from threefold.data.images import decode
from threefold.errors import DataError, ExportError
from threefold.runtime.heat import (
    LARGEST,
    Occlusion,
    is_cropped,
    occlude,
    overlay_png,
    spread_cells,
)
from threefold.runtime.model import Model
from threefold.serving.batching import BATCH_PIXELS, Batcher
from threefold.serving.limits import Refusal, ServerLimits
from threefold.serving.requests import (
    ImageFile,
    measure_image,
    read_images,
    request_body,
    unreadable_image,
)
from threefold.serving.responses import ERRORS, Explanation

PNG: Final = "image/png"


class _Abandoned(Exception):
    """Nobody waits for the explanation any more."""


class _Prepared(NamedTuple):
    """An image as the model takes it, and as the answer shows it."""

    image: np.ndarray
    cropped: bool
    shown: np.ndarray


class _Explained(NamedTuple):
    occlusion: Occlusion
    cropped: bool
    png: bytes


def add_explain_route(
    app: FastAPI, model: Model, limits: ServerLimits, batcher: Callable[[], Batcher]
) -> None:
    """Add POST /explain.

    Args:
        app: the application.
        model: the loaded model.
        limits: the limits.
        batcher: returns the batcher of the running application.
    """
    explainer = Explainer(model, limits)

    @app.post(
        "/explain",
        response_model=Explanation,
        responses={
            200: {"content": {PNG: {"schema": {"type": "string", "format": "binary"}}}},
            **ERRORS,
        },
        openapi_extra=request_body(1),
    )
    async def explain(
        request: Request,
        label: Annotated[str | None, Query(alias="class")] = None,
        form: Annotated[Literal["json", "png"], Query(alias="format")] = "json",
    ) -> Explanation | Response:
        """Where the evidence for a class is in one image: what hiding parts of it costs the class.

        `class` is the class to explain (default: the most probable one); a model that gives an
        image any number of labels needs it. With `format=png` the response is the picture alone.
        """
        if label is None and model.task == "multilabel":
            raise Refusal(400, "class", "this model gives several labels: say which with ?class=")
        if label is not None and label not in model.classes:
            raise Refusal(400, "class", "this model has no such class; GET /card names them")
        (image,) = await read_images(request, replace(limits, files=1))
        number = None if label is None else model.classes.index(label)
        found = await explainer.explain(request, batcher(), image, number)
        if form == "png":
            return Response(found.png, media_type=PNG)
        return Explanation(
            file=image.name,
            label=model.classes[found.occlusion.number],
            probability=found.occlusion.probability,
            lowest=found.occlusion.lowest,
            cells=found.occlusion.cells.tolist(),
            cropped=found.cropped,
            picture=base64.b64encode(found.png).decode(),
        )


class Explainer:
    """Explains one image after the other.

    Args:
        model: the loaded model.
        limits: the limits.
    """

    def __init__(self, model: Model, limits: ServerLimits) -> None:
        self._model, self._limits = model, limits
        self._turn = asyncio.Lock()
        self._count = 0

    async def explain(
        self, request: Request, batcher: Batcher, image: ImageFile, number: int | None
    ) -> _Explained:
        """Explain an image, unless its client leaves.

        Args:
            request: whose body has been read.
            batcher: runs the model.
            image: the image file.
            number: of the class; None = the most probable one.

        Raises:
            Refusal: status 413 or 415 for the image, 429 if too many explanations are wanted, 503
                if it takes too long or the model fails.
        """
        limits = self._limits
        size = await asyncio.to_thread(measure_image, image, limits)
        if self._count >= limits.explanations:
            message = f"the server is explaining {limits.explanations} images; try again"
            raise Refusal(429, "busy", message)
        self._count += 1
        stop = threading.Event()
        watcher = asyncio.create_task(_stop_if_left(request, stop))
        try:
            async with asyncio.timeout(limits.explain_seconds), self._turn:
                return await asyncio.to_thread(
                    self._work, batcher, image.content, math.prod(size), number, stop
                )
        except TimeoutError:
            seconds = limits.explain_seconds
            message = f"not explained within {seconds} seconds, as answers come first; try again"
            raise Refusal(503, "timeout", message) from None
        except _Abandoned:  # the status is for the metrics only: nobody is there to read it
            raise Refusal(499, "aborted", "the client left before its explanation") from None
        except DataError as error:
            raise unreadable_image(error, image.name) from None
        except ExportError:
            raise Refusal(503, "model", "the model failed on this image", image.name) from None
        finally:
            stop.set()
            watcher.cancel()
            self._count -= 1

    def _work(
        self,
        batcher: Batcher,
        content: bytes,
        pixels: int,
        number: int | None,
        stop: threading.Event,
    ) -> _Explained:
        """Explain an image, step by step; runs in a thread of its own."""

        def answer(images: np.ndarray) -> np.ndarray:
            if stop.is_set():
                raise _Abandoned
            try:
                return batcher.submit_pixels(images).result().probs
            except ExportError:
                if len(images) == 1:
                    raise
                # A batch may need more memory than there is where each image alone does not.
                return np.concatenate([answer(one[None]) for one in images])

        if stop.is_set():
            raise _Abandoned
        is_large = pixels > BATCH_PIXELS
        prepared = batcher.submit_task(lambda: _prepare(self._model, content), is_large).result()
        found = occlude(answer, prepared.image, number, self._limits.batch)
        height, width = prepared.shown.shape[:2]
        heat = spread_cells(found.cells, height, width, prepared.cropped)
        return _Explained(found, prepared.cropped, overlay_png(prepared.shown, heat))


def _prepare(model: Model, content: bytes) -> _Prepared:
    """Decode an image, and keep what is needed of it only: it may be large.

    Where the graph itself resizes images, a large one is reduced before, since it is answered 65
    times.
    """
    pixels = decode(content)
    image = model.fit_canvas(pixels)
    cropped = is_cropped(model, pixels, image)
    height, width = image.shape[:2]
    if height * width > BATCH_PIXELS:
        factor = math.sqrt(BATCH_PIXELS / (height * width))
        size = max(1, int(factor * width)), max(1, int(factor * height))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    shown = Image.fromarray(pixels)
    shown.thumbnail((LARGEST, LARGEST))
    return _Prepared(image, cropped, np.asarray(shown))


async def _stop_if_left(request: Request, stop: threading.Event) -> None:
    """Set an event once the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    stop.set()
