"""Read the images of a request: multipart files, or base64 in JSON."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
from contextlib import aclosing
from typing import Any, Final, NamedTuple

from fastapi import Request
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from threefold.data.images import TooManyPixels, measure
from threefold.errors import DataError
from threefold.serving.limits import Refusal, ServerLimits

MAX_FIELDS: Final = 16
"""Form fields that are not files; they are ignored."""
MAX_FIELD_BYTES: Final = 4096
"""Bytes per form field that is not a file."""
MAX_NAME: Final = 200
"""Characters of a file name that are sent back."""


class ImageFile(NamedTuple):
    """An image file as the client sent it."""

    name: str
    """The client's name of the file."""
    content: bytes


def request_body(most: int) -> dict[str, Any]:
    """The request body of a route that takes images, as OpenAPI describes it.

    Args:
        most: images in a request.
    """
    bounds = {"type": "array", "minItems": 1, "maxItems": most}
    files = {**bounds, "items": {"type": "string", "format": "binary"}}
    images = {
        **bounds,
        "items": {"type": "string", "format": "byte"},
        "description": "Image files in base64. URLs are refused.",
    }

    def schema(name: str, images: dict[str, Any]) -> dict[str, Any]:
        return {"schema": {"type": "object", "required": [name], "properties": {name: images}}}

    content = {
        "multipart/form-data": schema("files", files),
        "application/json": schema("images", images),
    }
    return {"requestBody": {"required": True, "content": content}}


async def read_images(request: Request, limits: ServerLimits) -> list[ImageFile]:
    """Read the image files of a request, in its order; at least one.

    Raises:
        Refusal: status 400, 413 or 415.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        images = await _read_form(request, limits)
    elif media_type == "application/json":
        images = await asyncio.to_thread(_read_json, await request.body(), limits)
    else:
        message = "send multipart/form-data with `files`, or application/json with `images`"
        raise Refusal(415, "media_type", message)
    if not images:
        message = "the request has no images: send multipart `files`, or JSON `images` in base64"
        raise Refusal(400, "no_images", message)
    for image in images:
        if len(image.content) > limits.file_bytes:
            message = f"an image file may have at most {limits.file_bytes:,} bytes"
            raise Refusal(413, "too_many_bytes", message, image.name)
    return images


class _FormParser(MultiPartParser):
    """Starlette's parser, with an error of its own for too many files.

    Starlette raises one exception for every fault of a form; only its text tells them apart.
    """

    def __init__(self, headers: Headers, stream: Any, limits: ServerLimits) -> None:
        super().__init__(
            headers,
            stream,
            max_files=math.inf,
            max_fields=MAX_FIELDS,
            max_part_size=MAX_FIELD_BYTES,
        )
        self.limits = limits

    def on_part_end(self) -> None:
        super().on_part_end()
        num_files = sum(isinstance(value, UploadFile) for _, value in self.items)
        if num_files > self.limits.files:
            raise _too_many_files(self.limits)


async def _read_form(request: Request, limits: ServerLimits) -> list[ImageFile]:
    try:
        async with aclosing(request.stream()) as stream:
            form = await _FormParser(request.headers, stream, limits).parse()
    except MultiPartException as error:
        raise Refusal(400, "bad_form", error.message[:200]) from None
    try:
        images: list[ImageFile] = []
        for part in form.getlist("files"):
            if not isinstance(part, UploadFile):
                message = "`files` must be files: give each part a file name"
                raise Refusal(400, "not_a_file", message)
            images.append(ImageFile(_display_name(part.filename, len(images)), await part.read()))
        return images
    finally:
        await form.close()


def _read_json(body: bytes, limits: ServerLimits) -> list[ImageFile]:
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "bad_json", "the body is not JSON") from None
    texts = tree.get("images") if isinstance(tree, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refusal(400, "bad_json", 'expected {"images": ["base64 of a file", ...]}')
    if len(texts) > limits.files:
        raise _too_many_files(limits)
    images = []
    for i, text in enumerate(texts):
        name = _display_name(None, i)
        try:
            content = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            message = "not base64 (data: prefixes, URLs and line breaks are not allowed)"
            raise Refusal(400, "bad_base64", message, name) from None
        images.append(ImageFile(name, content))
    return images


def _too_many_files(limits: ServerLimits) -> Refusal:
    files = "1 file" if limits.files == 1 else f"{limits.files} files"
    return Refusal(413, "too_many_files", f"a request may have at most {files}")


def _display_name(name: str | None, index: int) -> str:
    return (name or f"image {index}")[:MAX_NAME]


def measure_image(image: ImageFile, limits: ServerLimits) -> tuple[int, int]:
    """Read width and height from the header of an image; no pixel is decoded.

    Raises:
        Refusal: status 413 if the image is too large, 415 if it is not an image.
    """
    try:
        size = measure(image.content, limits.pixels)
    except TooManyPixels:
        message = f"an image may have at most {limits.pixels:,} pixels"
        raise Refusal(413, "too_many_pixels", message, image.name) from None
    except DataError as error:
        raise unreadable_image(error, image.name) from None
    if max(size) > limits.side:
        message = f"an image may be at most {limits.side:,} pixels wide or high"
        raise Refusal(413, "too_long", message, image.name)
    return size


def unreadable_image(error: DataError, name: str) -> Refusal:
    """The refusal of a file that cannot be decoded."""
    return Refusal(415, "not_an_image", (error.got or "it cannot be read")[:300], name)
