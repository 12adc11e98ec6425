"""Image files to pixels: the one way in which training, evaluation, export and serving read an image.

The content decides what a file is, never its name. Six formats are read; everything else (EPS, PSD, SVG, ...) is
refused, because some of their readers start other programs. Sizes are checked before anything is decoded.
Imports no torch. No setting of Pillow is changed and no warning is relied on, so any number of threads may read.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from threefold.errors import DataError

MAX_PIXELS = 89_478_485
"""Largest width x height that is decoded (a quarter of a GiB as RGB); more is taken for a decompression bomb."""

MAX_SCANS = 100
"""Most scans of a JPEG that `measure` lets pass; encoders make about ten, and each may cost as much as a whole image."""

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
}
"""File name suffix (lower case) -> the format that it promises."""

# The classes are called directly: Image.open would warn about large images, and warnings cannot be caught per thread.
_READERS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "GIF": GifImagePlugin.GifImageFile,
}

_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(NamedTuple):
    """A file that `check` objects to."""

    path: Path
    reason: str
    """One line, for people."""
    readable: bool = False
    """True where the pixels can be read and only the name promises another format."""


class TooManyPixels(DataError):
    """An image is larger than what is read; it may be sound."""


class _Unreadable(Exception):
    """The reason why there are no pixels."""


class _TooManyPixels(_Unreadable):
    """There are too many."""


def decode(source: str | Path | bytes | BinaryIO) -> NDArray[np.uint8]:
    """Read an image as it is meant to be seen: the first frame, upright, on white, as RGB.

    EXIF rotation is applied; grey is repeated; palettes, CMYK and YCbCr are converted; transparent pixels are laid on
    white. 16-bit grey is scaled by 255/65535. 32-bit grey (integer or float) has no fixed white: the smallest of the
    ranges 0..1 (float only), 0..255 and 0..65535 that holds all its values is taken.

    Args:
        source: a path, the bytes of a file, or an open binary file (read from where it stands).

    Returns:
        uint8 pixels (h, w, 3).

    Raises:
        DataError: missing, empty, damaged, truncated, more than `MAX_PIXELS`, or none of the six formats.
    """
    try:
        return _read(source)[0]
    except _Unreadable as error:
        where = (
            source
            if isinstance(source, (str, Path))
            else getattr(source, "name", "") or "image bytes"
        )
        raise DataError("cannot read the image", where=where, got=error) from None


def measure(content: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of an image as its header gives them (EXIF not applied); no pixel is decoded.

    Raises:
        TooManyPixels: more than `max_pixels`.
        DataError: not one of the six formats, a damaged header, or a JPEG of more than `MAX_SCANS` scans, which takes
            minutes to decode.
    """
    stream = io.BytesIO(content)
    try:
        image = _open(stream, max_pixels)[0]
        if image.format == "JPEG" and content.count(b"\xff\xda") > MAX_SCANS:
            raise _Unreadable(f"a JPEG of more than {MAX_SCANS} scans")
        return image.size
    except _Unreadable as error:
        kind = TooManyPixels if isinstance(error, _TooManyPixels) else DataError
        raise kind("cannot read the image", where="image bytes", got=error) from None


def check(path: str | Path, content: bytes | None = None) -> BadImage | None:
    """Decode a file completely; say what is wrong with it, also where its name promises another format.

    Args:
        path: the file, or the name of `content`.
        content: the file's bytes, where they lie elsewhere.
    """
    path = Path(path)
    try:
        found = _read(path if content is None else content)[1]
    except _Unreadable as error:
        return BadImage(path, " ".join(str(error).split()))
    if IMAGE_SUFFIXES.get(path.suffix.lower(), found) != found:
        return BadImage(path, f"content is {found}, name says {path.suffix}", readable=True)
    return None


def check_all(
    paths: Sequence[str | Path], workers: int = 4, contents: Sequence[bytes] | None = None
) -> list[BadImage]:
    """What `check` objects to among many files, in their order; decoded by that many threads."""

    def check_one(place: int) -> BadImage | None:
        return check(paths[place], None if contents is None else contents[place])

    with ThreadPoolExecutor(workers) as pool:
        return [bad for bad in pool.map(check_one, range(len(paths))) if bad is not None]


def same_content(paths: Sequence[Path], contents: Sequence[bytes] | None = None) -> list[list[int]]:
    """Positions of files that are equal byte for byte, one list per content that stands there more than once.

    Only files of equal size are read; of `contents`, where the bytes lie elsewhere, all are.

    Raises:
        DataError: a file cannot be read.
    """
    if contents is not None:
        return _positions([hashlib.sha256(content).digest() for content in contents])
    try:
        sizes = _positions([path.stat().st_size for path in paths])
        rows = sorted(row for same in sizes for row in same)
        digests = [_digest(paths[row]) for row in rows]
    except OSError as error:
        raise DataError(
            "cannot read the file", where=error.filename, got=error.strerror or error
        ) from None
    return [[rows[i] for i in same] for same in _positions(digests)]


def _positions(keys: Sequence[object]) -> list[list[int]]:
    """Positions of equal keys, for the keys that stand there more than once."""
    where: dict[object, list[int]] = defaultdict(list)
    for position, key in enumerate(keys):
        where[key].append(position)
    return [positions for positions in where.values() if len(positions) > 1]


def _digest(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _read(source: str | Path | bytes | BinaryIO) -> tuple[NDArray[np.uint8], str]:
    """Pixels and format name of any source."""
    if not isinstance(source, (str, Path)):
        return _decode(io.BytesIO(source if isinstance(source, bytes) else source.read()))
    try:
        # A pipe or a device would keep the reader waiting for ever.
        if not stat.S_ISREG(os.stat(source).st_mode):
            raise _Unreadable("not a regular file")
        stream = open(source, "rb")  # noqa: SIM115 (closed by the with below; only the opening may fail here)
    except (OSError, ValueError) as error:
        raise _Unreadable(getattr(error, "strerror", None) or error) from None
    with stream:
        return _decode(stream)


def _open(stream: BinaryIO, max_pixels: int = MAX_PIXELS) -> tuple[ImageFile.ImageFile, str]:
    """The image, its pixels not decoded, and its format."""
    head = stream.read(32)
    stream.seek(0)
    content = _sniff(head)
    _require_size(_declared_size(head, content), max_pixels)
    try:
        image = _READERS[content](stream)
    except Exception as error:  # on damaged content Pillow raises errors of nearly every type
        raise _Unreadable(
            f"damaged or truncated {content}: {error or type(error).__name__}"
        ) from None
    _require_size(image.size, max_pixels)
    return image, content


def _decode(stream: BinaryIO) -> tuple[NDArray[np.uint8], str]:
    image, content = _open(stream)
    try:
        image.load()
        return _to_rgb(_upright(image)), content
    except _Unreadable:
        raise
    except Exception as error:
        raise _Unreadable(
            f"damaged or truncated {content}: {error or type(error).__name__}"
        ) from None


def _sniff(head: bytes) -> str:
    """Format by the first bytes of a file."""
    if not head:
        raise _Unreadable("the file is empty (0 bytes)")
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    for magic, content in _MAGIC:
        if head.startswith(magic):
            return content
    raise _Unreadable(f"not an image (the content is none of {', '.join(_READERS)})")


def _declared_size(head: bytes, content: str) -> tuple[int, int]:
    """Width and height that a GIF or WebP header declares; (1, 1) for the others.

    Pillow's readers of these two reserve memory of that size before they can be asked for it; the others do not.
    """
    try:
        if content == "GIF":
            return struct.unpack_from("<HH", head, 6)
        if content == "WebP" and head[12:16] == b"VP8X":
            return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(
                head[27:30], "little"
            ) + 1
        if content == "WebP" and head[12:16] == b"VP8L":
            (bits,) = struct.unpack_from("<L", head, 21)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if content == "WebP":
            width, height = struct.unpack_from("<HH", head, 26)
            return width & 0x3FFF, height & 0x3FFF
    except struct.error:
        raise _Unreadable(f"damaged or truncated {content}: the header is not complete") from None
    return 1, 1


def _require_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise _TooManyPixels(
            f"{width} x {height} pixels, more than the {max_pixels:,} that are read"
        )


def _upright(image: ImageFile.ImageFile) -> Image.Image:
    """The image turned as its EXIF block says (TIFF files have none: Pillow turns them itself while it loads them)."""
    turn = _UPRIGHT.get(_orientation(image.info.get("exif", b"")))
    return image if turn is None else image.transpose(turn)


def _orientation(exif: bytes) -> int:
    """Tag 0x0112 of an EXIF block (1 to 8); 1 where it is absent or the block is damaged, as viewers take it.

    Read here and not by Pillow, which warns about damaged blocks and also believes XMP, which viewers do not.
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


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Any mode of Pillow as uint8 (h, w, 3)."""
    if image.mode.startswith(("I", "F")):
        return _deep_grey_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))


def _deep_grey_to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """16-bit and 32-bit grey; Pillow's own conversion to RGB clips these at 255 instead of scaling."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535):  # also true of NaN
        raise _Unreadable(
            f"32-bit values from {low} to {high}, known are 0..1, 0..255 and 0..65535"
        )
    whites = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    white = next(white for white in whites if high <= white)
    grey = np.rint(values * (255.0 / white)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[values == transparent] = 255
    return np.repeat(grey[..., None], 3, axis=2)
