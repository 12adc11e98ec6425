"""The images of a request: multipart files or base64 in JSON, within limits, or a refusal that names the file."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from typing import Any, Final, NamedTuple

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from threefold.errors import DataError
from threefold.images import TooManyPixels, measure
from threefold.limits import Limits, Refusal

BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}}
                    },
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {
                        "images": {
                            "type": "array",
                            "items": {"type": "string", "format": "byte"},
                            "description": "Image files in base64; no addresses, nothing is fetched.",
                        }
                    },
                }
            },
        },
    }
}


class Image(NamedTuple):
    """An image file as it was sent.

    Attributes:
        name: the client's name for it.
        content: its bytes.
    """

    name: str
    content: bytes


async def read_images(request: Request, limits: Limits) -> list[Image]:
    """The image files of a request, in its order, at least one.

    Raises:
        Refusal: 400, 413 or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        images = await _read_form(request, limits)
    elif kind == "application/json":
        images = await asyncio.to_thread(_read_json, await request.body(), limits)
    else:
        raise Refusal(
            415,
            "media_type",
            "send multipart/form-data with `files`, or application/json with `images`",
        )
    if not images:
        raise Refusal(
            400,
            "no_images",
            "the request has no images: multipart `files`, or JSON `images` in base64",
        )
    for image in images:
        if len(image.content) > limits.file_bytes:
            raise Refusal(
                413, "too_many_bytes", f"a file may have {limits.file_bytes:,} bytes", image.name
            )
    return images


async def _read_form(request: Request, limits: Limits) -> list[Image]:
    try:
        async with request.form(max_files=limits.files, max_fields=16, max_part_size=4096) as form:
            parts = [part for name, part in form.multi_items() if name == "files"]
            if not all(isinstance(part, UploadFile) for part in parts):
                raise Refusal(
                    400, "not_a_file", "`files` must be files: give each part a file name"
                )
            return [
                Image(_named(p.filename, i), await p.read())
                for i, p in enumerate(parts)
                if isinstance(p, UploadFile)
            ]
    except HTTPException as error:
        if "Too many files" in str(error.detail):
            raise _too_many(limits) from None
        raise Refusal(400, "bad_form", str(error.detail)[:200]) from None


def _read_json(body: bytes, limits: Limits) -> list[Image]:
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "bad_json", "the body is not JSON") from None
    texts = tree.get("images") if isinstance(tree, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Refusal(400, "bad_json", 'expected {"images": ["base64 of a file", ...]}')
    if len(texts) > limits.files:
        raise _too_many(limits)
    images = []
    for i, text in enumerate(texts):
        try:
            images.append(Image(_named(None, i), base64.b64decode(text, validate=True)))
        except (binascii.Error, ValueError):
            raise Refusal(
                400,
                "bad_base64",
                "not base64 (no data: prefix, no address, no line breaks)",
                _named(None, i),
            ) from None
    return images


def _too_many(limits: Limits) -> Refusal:
    return Refusal(413, "too_many_files", f"a request may have {limits.files} files")


def _named(name: str | None, place: int) -> str:
    return (name or f"image {place}")[:200]


def size_of(image: Image, limits: Limits) -> tuple[int, int]:
    """Width and height by the header; no pixel is decoded.

    Raises:
        Refusal: 413 where it is too large, 415 where it is no image.
    """
    try:
        size = measure(image.content, limits.pixels)
    except TooManyPixels:
        raise Refusal(
            413, "too_many_pixels", f"an image may have {limits.pixels:,} pixels", image.name
        ) from None
    except DataError as error:
        raise unreadable(error, image.name) from None
    if max(size) > limits.side:
        raise Refusal(
            413, "too_long", f"an image may be {limits.side:,} pixels wide or high", image.name
        )
    return size


def unreadable(error: DataError, name: str) -> Refusal:
    """The refusal of a file whose pixels cannot be had."""
    reason = str(error).partition("got ")[2] or "it cannot be read"
    return Refusal(415, "not_an_image", reason[:300], name)
