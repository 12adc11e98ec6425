"""Decode image files; training, evaluation, export and serving all read images through this module.

The content of a file, never its name, decides its format. Eight formats are read, HEIF only if the
extra `heif` is installed; all others (EPS, PSD, SVG, ...) are refused, because some of their
readers start other programs. Sizes are checked
before decoding. Imports no torch. Thread-safe: it changes no setting of Pillow.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from threefold.counting import counted
from threefold.data.content_kinds import HEAD, describe_other, find_format
from threefold.data.deep_grey import GreyScale, is_deep, read_scale, to_eight_bits
from threefold.data.image_headers import UnreadableImage, essential_parts
from threefold.errors import DataError, MissingImageError, refuse_address, seems_address
from threefold.extras import install_command

MAX_PIXELS = 89_478_485
"""Largest width x height to decode (a quarter of a GiB as RGB), against decompression bombs."""

BAND_PIXELS = 250_000
"""Pixels of a large image that are converted at the same time."""

IMAGE_SUFFIXES = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WebP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".gif": "GIF",
    ".avif": "AVIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
    ".hif": "HEIF",
}
"""Format of each file name suffix (lower case)."""

# Called directly: Image.open warns about large images, and warnings cannot be caught per thread.
_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
_FORMATS = ", ".join((*_READERS, "HEIF"))

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


T = TypeVar("T")

TASK = 16
"""Images that a thread takes at a time."""


class BadImage(NamedTuple):
    """A file that `check` rejects."""

    path: Path | str
    """Of the file, or the name of an image that is none."""
    reason: str
    """One line for people to read."""
    readable: bool = False
    """True if only the suffix is wrong and the pixels can be read."""


class TooManyPixels(DataError):
    """An image exceeds the size limit; it may be sound otherwise."""


class _TooManyPixels(UnreadableImage):
    """The image has too many pixels."""


def decode(source: str | Path | bytes | BinaryIO) -> NDArray[np.uint8]:
    """Read an image as viewers show it: the first frame, upright, on white, as RGB.

    EXIF rotation is applied; grey is repeated; palettes, CMYK and YCbCr are converted; transparent
    images are composited on white. Grey of more than 8 bits is scaled as `deep_grey` says: white is
    1 in floating point and 65535 in integers, whatever the values of the image.

    Args:
        source: a path, the bytes of a file, or an open binary file (read from its position).

    Returns:
        uint8 pixels (h, w, 3).

    Raises:
        DataError: the file is missing, empty, damaged or truncated, has more than `MAX_PIXELS`,
            would take too much time or memory to decode (`image_headers`), or is of no format
            that is read.
    """
    try:
        return _read(source)[0]
    except UnreadableImage as error:
        where = source if isinstance(source, str | Path) else getattr(source, "name", "")
        refuse_address(where)
        where = where or "image bytes"
        raise DataError("cannot read the image", where=where, got=error) from None


def rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Convert a Pillow image as `decode` converts a file: upright, on white, as RGB.

    Raises:
        DataError: it is not loaded yet and its file cannot be read, or its grey has another scale.
    """
    try:
        scale = read_scale(image) if is_deep(image) else None
        image.load()
        return _to_rgb(_upright(image), scale)
    except Exception as error:  # Pillow raises nearly any type for damaged content
        raise DataError(
            "cannot read the image", where="a Pillow image", got=error or type(error).__name__
        ) from None


def measure(content: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return width and height from an image's header, before EXIF rotation, without decoding.

    Raises:
        TooManyPixels: more than `max_pixels`.
        DataError: the format is unknown, the header is damaged, or the file would take too much
            time to decode (`image_headers`).
    """
    stream = io.BytesIO(content)
    try:
        return _open(stream, max_pixels)[0].size
    except UnreadableImage as error:
        kind = TooManyPixels if isinstance(error, _TooManyPixels) else DataError
        raise kind("cannot read the image", where="image bytes", got=error) from None


def check(path: str | Path, content: bytes | None = None) -> BadImage | None:
    """Read a file completely and return what is wrong with it, including a misleading suffix.

    A JPEG image is decoded at an eighth of its size. That takes a third of the time, and its reader
    goes through all of the same bytes.

    Args:
        path: the file, or the name of `content`. The end of an address is no suffix: what a server
            sends can have another format.
        content: the bytes, if they are not in the file.
    """
    return _check(path, content)[0]


def check_hashed(path: str | Path, content: bytes | None = None) -> tuple[BadImage | None, bytes]:
    """Return what `check` does, and the SHA-256 of the encoded image; empty if it is unread."""
    return _check(path, content, hashlib.sha256())


def _check(
    path: str | Path, content: bytes | None, digest: Any = None
) -> tuple[BadImage | None, bytes]:
    """Decode a file; its bytes are given to `digest`, if there is one."""
    try:
        _, image_format = _read(path if content is None else content, digest, shrink=True)
    except UnreadableImage as error:
        return BadImage(path, " ".join(str(error).split())), b""
    found = b"" if digest is None else digest.digest()
    suffix = "" if seems_address(path) else Path(path).suffix
    if IMAGE_SUFFIXES.get(suffix.lower(), image_format) != image_format:
        reason = f"content is {image_format}, suffix is {suffix}"
        return BadImage(path, reason, readable=True), found
    return None, found


def check_all(
    paths: Sequence[str | Path], workers: int = 4, contents: Sequence[bytes] | None = None
) -> list[BadImage]:
    """Run `check` on many files in threads; return the rejected ones, in order.

    Args:
        paths: the files, or the names of `contents`.
        workers: threads.
        contents: the encoded images, if they are not in files. One whose access raises a
            MissingImageError is rejected for that reason.
    """

    def check_one(index: int) -> BadImage | None:
        if contents is None:
            return check(paths[index])
        try:
            content = contents[index]
        except MissingImageError as error:
            return BadImage(paths[index], f"{error.what}: {error.got}" if error.got else error.what)
        return check(paths[index], content)

    checked = map_in_threads(check_one, len(paths), workers)
    checked = counted(checked, "images verified", len(paths))
    return [bad for bad in checked if bad is not None]


def map_in_threads(
    function: Callable[[int], T], count: int, workers: int, *, size: int = 0, ahead: int = 4
) -> Iterator[T]:
    """Yield function(0), ..., function(count - 1) in order, from threads a little ahead.

    Args:
        function: of a number.
        count: of the numbers.
        workers: threads.
        size: numbers that a thread takes at a time; 0 = `TASK`.
        ahead: how often each thread may have taken some before the first are asked for.
    """
    size = size or TASK

    def run(begin: int) -> list[T]:
        return [function(row) for row in range(begin, min(begin + size, count))]

    begins = iter(range(0, count, size))
    with ThreadPoolExecutor(workers) as pool:
        # Not pool.map, which would make an object for each of a million images at once.
        running = deque(pool.submit(run, begin) for begin in islice(begins, ahead * workers))
        try:
            while running:
                results = running.popleft().result()
                running.extend(pool.submit(run, begin) for begin in islice(begins, 1))
                yield from results
        finally:
            for task in running:
                task.cancel()


def _read(
    source: str | Path | bytes | BinaryIO, digest: Any = None, *, shrink: bool = False
) -> tuple[NDArray[np.uint8], str]:
    """Return pixels and format of any source.

    Args:
        source: see `decode`.
        digest: is given the bytes of a file.
        shrink: decode a JPEG image at an eighth of its size.
    """
    if isinstance(source, bytes):
        if digest is not None:
            digest.update(source)
        return _decode(io.BytesIO(source), shrink=shrink)
    if not isinstance(source, (str, Path)):
        return _decode(io.BytesIO(source.read()), shrink=shrink)
    try:
        # Reading a pipe or a device could block for ever.
        if not stat.S_ISREG(os.stat(source).st_mode):
            raise UnreadableImage("not a regular file")
        stream = open(source, "rb")  # noqa: SIM115 (closed by the `with` below)
    except (OSError, ValueError) as error:
        raise UnreadableImage(getattr(error, "strerror", None) or error) from None
    with stream:
        if digest is not None:
            while block := stream.read(1 << 20):
                digest.update(block)
            stream.seek(0)
        return _decode(stream, shrink=shrink)


def _open(stream: BinaryIO, max_pixels: int = MAX_PIXELS) -> tuple[ImageFile.ImageFile, str]:
    """Return the image, not yet decoded, and its format."""
    head = stream.read(HEAD)
    stream.seek(0)
    image_format = _sniff(head)
    _require_size(_declared_size(head, image_format), max_pixels)
    parts = essential_parts(stream, image_format)
    reader = _reader(image_format)
    try:
        image = reader(parts)
    except Exception as error:  # Pillow raises nearly any type for damaged content
        raise _damaged(image_format, error) from None
    _require_size(image.size, max_pixels)
    return image, image_format


def _decode(stream: BinaryIO, *, shrink: bool) -> tuple[NDArray[np.uint8], str]:
    image, image_format = _open(stream)
    try:
        if shrink and image_format == "JPEG":
            image.draft(None, (1, 1))
        scale = read_scale(image) if is_deep(image) else None
        image.load()
        upright = _upright(image)
        del image  # a photo of 48 megapixels takes 200 MB
        return _to_rgb(upright, scale), image_format
    except UnreadableImage:
        raise
    except Exception as error:
        raise _damaged(image_format, error) from None


def _damaged(image_format: str, error: Exception) -> UnreadableImage:
    """Return the error of a file that Pillow cannot decode.

    Pillow counts the bytes of a truncated file that it has not processed, which differ from format
    to format and say nothing about what is missing.
    """
    reason = str(error) or type(error).__name__
    if reason.startswith("image file is truncated"):
        reason = "the file ends before all of its pixels"
    return UnreadableImage(f"damaged or truncated {image_format}: {reason}")


def _sniff(head: bytes) -> str:
    """Return the format that the first bytes of a file indicate."""
    if not head:
        raise UnreadableImage("the file is empty (0 bytes)")
    found = find_format(head)
    if found:
        return found
    what = describe_other(head)
    if what:
        raise UnreadableImage(f"not an image but {what}")
    raise UnreadableImage(f"not an image (the content is none of {_FORMATS})")


def _reader(image_format: str) -> Callable[[BinaryIO], ImageFile.ImageFile]:
    """Return what opens a format."""
    if image_format != "HEIF":
        return _READERS[image_format]
    try:
        from pi_heif import HeifImageFile
    except ImportError:
        raise UnreadableImage(
            f"a HEIC or HEIF image, which needs {install_command('heif')}; or save it as JPEG"
        ) from None
    reader: Callable[[BinaryIO], ImageFile.ImageFile] = HeifImageFile
    return reader


def _declared_size(head: bytes, image_format: str) -> tuple[int, int]:
    """Return the width and height in a GIF or WebP header; (1, 1) for other formats.

    Pillow allocates the memory of a GIF or WebP image before it reports the size.
    """
    try:
        if image_format == "GIF":
            return struct.unpack_from("<HH", head, 6)
        if image_format == "WebP" and head[12:16] == b"VP8X":
            width = int.from_bytes(head[24:27], "little") + 1
            height = int.from_bytes(head[27:30], "little") + 1
            return width, height
        if image_format == "WebP" and head[12:16] == b"VP8L":
            (bits,) = struct.unpack_from("<L", head, 21)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if image_format == "WebP":
            width, height = struct.unpack_from("<HH", head, 26)
            return width & 0x3FFF, height & 0x3FFF
    except struct.error:
        raise UnreadableImage(
            f"damaged or truncated {image_format}: the header is not complete"
        ) from None
    return 1, 1


def _require_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise _TooManyPixels(
            f"{width} x {height} pixels, more than the {max_pixels:,} that are read"
        )


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; Pillow itself applies that of TIFF files while loading."""
    transpose = _UPRIGHT.get(_orientation(image.info.get("exif", b"")))
    return image if transpose is None else image.transpose(transpose)


def _orientation(exif: bytes) -> int:
    """Return the orientation (tag 0x0112, 1 to 8) of an EXIF block; 1 if absent or damaged.

    Like viewers, and unlike Pillow, this neither warns about damaged blocks nor reads XMP.
    """
    block = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "L", block, 4)
        (entries,) = struct.unpack_from(order + "H", block, start)
        for entry in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHLH", block, entry)
            if (tag, kind) == (0x0112, 3):
                return int(value)
    except struct.error:
        return 1
    return 1


def _to_rgb(image: Image.Image, scale: GreyScale | None) -> NDArray[np.uint8]:
    """Convert an image of any Pillow mode to uint8 (h, w, 3); `scale` is that of deep grey.

    Large images are converted in bands of rows: each step of a conversion takes a copy.
    """
    width, height = image.size
    band = BAND_PIXELS // max(width, 1)
    if band >= height:
        return _band_to_rgb(image, scale)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, max(band, 1)):
        bottom = min(top + max(band, 1), height)
        pixels[top:bottom] = _band_to_rgb(image.crop((0, top, width, bottom)), scale)
    return pixels


def _band_to_rgb(image: Image.Image, scale: GreyScale | None) -> NDArray[np.uint8]:
    """Convert some rows of an image."""
    if scale is not None:
        # Pillow's own conversion clips at 255 in place of scaling.
        try:
            return np.repeat(to_eight_bits(image, scale)[..., None], 3, axis=2)
        except ValueError as error:
            raise UnreadableImage(error) from None
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))
