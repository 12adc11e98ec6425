"""Bound the work that an image file can cause, before Pillow parses it.

Pillow reads every block of metadata, some of them in quadratic time, and refuses a sound image for
damage to a text beside it. The pixels depend on few of the blocks. `essential_parts` finds those in
one pass: a JPEG, PNG or GIF is handed on without the others, and without what follows its end. So
the time to open a file grows with its size only, and what browsers show is read. Other formats are
handed on as they are, after a check of what they declare.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Final

MAX_FILE_BYTES: Final = 2**30
"""Largest file that is read."""
MAX_BLOCKS: Final = 100_000
"""Largest number of blocks in a file: chunks of a PNG, segments of a JPEG, sub-blocks before the
first frame of a GIF. Sound files have up to a few thousand."""
MAX_TABLE_BYTES: Final = 2**20
"""Largest size of all blocks together that precede the pixels and that they depend on."""
MAX_SCANS: Final = 100
"""Largest number of scans in a JPEG. Encoders write about ten; each may take as long to decode as a
whole image."""
MAX_SCANNED_PIXELS: Final = 1_000_000_000
"""Largest product of pixels and scans of a JPEG with more than `USUAL_SCANS`."""
USUAL_SCANS: Final = 20
"""Number of scans that a JPEG of any size may have."""
MAX_TIFF_TAGS: Final = 4096
"""Largest number of tags in a TIFF directory."""
MAX_TIFF_VALUES: Final = 2**18
"""Largest number of values in a TIFF tag of numbers, such as the positions of strips."""
MAX_RLE_PIXELS: Final = 20_000_000
"""Largest number of pixels in a run-length coded BMP, which Pillow decodes in Python."""

# Markers of JPEG segments: not the escaped 0xFF, restarts and reserved ones.
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_SOI, _EOI, _SOS, _COM = 0xD8, 0xD9, 0xDA, 0xFE
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"tRNS", b"eXIf")  # of the chunks that need not be understood
_GIF_BLOCK = re.compile(rb"[!,;]")
_GIF_CONTROL = 0xF9
_TIFF_SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
}
"""Bytes of a value by the TIFF type."""
_TIFF_BYTES = (1, 2, 7)  # types that Pillow does not turn into numbers


class UnreadableImage(Exception):
    """Why an image cannot be decoded."""


def essential_parts(stream: BinaryIO, image_format: str) -> BinaryIO:
    """Return the file, or the parts of it that its pixels depend on.

    Args:
        stream: the file at its start; it can seek.
        image_format: as its first bytes say.

    Raises:
        UnreadableImage: the file is damaged, or would take too much time or memory to decode.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if size > MAX_FILE_BYTES:
        raise UnreadableImage(f"a file of {size:,} bytes, more than the {MAX_FILE_BYTES:,} allowed")
    if image_format == "JPEG":
        return io.BytesIO(_jpeg_parts(stream.read()))
    if image_format == "PNG":
        return io.BytesIO(_png_parts(stream.read()))
    if image_format == "GIF":
        return io.BytesIO(_gif_parts(stream.read()))
    if image_format == "TIFF":
        _check_tiff(stream, size)
    elif image_format == "BMP":
        stream = _limit_bmp(stream)
    stream.seek(0)
    return stream


class _Kept:
    """The kept parts of a file, of limited size."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = list(parts)
        self.bytes = 0

    def add(self, part: bytes) -> None:
        self.parts.append(part)
        self.bytes += len(part)
        if self.bytes > MAX_TABLE_BYTES:
            raise UnreadableImage(
                f"more than {MAX_TABLE_BYTES:,} bytes of tables before the pixels"
            )


def _too_many(what: str, limit: int) -> UnreadableImage:
    return UnreadableImage(f"more than {limit:,} {what}")


def _jpeg_parts(content: bytes) -> bytes:
    """Drop comments, profiles and previews; keep what libjpeg needs, and the first EXIF block.

    The walk goes on through the scans, because libjpeg does: segments may stand between them.
    """
    kept = _Kept(b"\xff\xd8")
    first_scan, end = -1, len(content)
    scans = pixels = 0
    has_exif = False
    for marker, begin, after in _jpeg_segments(content):
        if marker == _EOI:
            end = after
            break
        if marker == _SOS:
            first_scan = begin if first_scan < 0 else first_scan
            scans += 1
            if scans > min(MAX_SCANS, max(USUAL_SCANS, MAX_SCANNED_PIXELS // max(pixels, 1))):
                raise UnreadableImage(f"a JPEG of {pixels:,} pixels in more than {scans - 1} scans")
        elif marker in _FRAMES and len(content) >= begin + 9:
            height, width = struct.unpack_from(">HH", content, begin + 5)
            pixels = max(pixels, height * width)
        if first_scan < 0:
            body = content[begin + 4 : begin + 16]
            is_exif = marker == 0xE1 and body.startswith(b"Exif\0\0")
            is_needed = (
                (marker < 0xE0 or 0xEF < marker < _COM)
                or (marker == 0xE0 and body.startswith(b"JFIF\0"))
                or (marker == 0xEE and body.startswith(b"Adobe"))
                or (is_exif and not has_exif)
            )
            has_exif |= is_exif
            if is_needed:
                kept.add(content[begin:after])
    if first_scan < 0:
        raise UnreadableImage("damaged or truncated JPEG: no pixels")
    return b"".join([*kept.parts, content[first_scan:end]])


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the marker of each segment, its position, and that of its end, as libjpeg finds them.

    After a segment comes the next marker; what lies between is data of a scan, or is skipped.
    """
    position = 2
    for _ in range(MAX_BLOCKS):
        match = _JPEG_MARKER.search(content, position)
        if match is None:
            return
        begin, position = match.span()
        marker = content[begin + 1]
        if marker not in (_SOI, _EOI):
            # libjpeg takes a length below 2, which counts itself, for 2.
            position += max(int.from_bytes(content[position : position + 2], "big"), 2)
        yield marker, begin, position
    raise _too_many("segments in a JPEG", MAX_BLOCKS)


def _png_parts(content: bytes) -> bytes:
    """Drop texts, profiles and further frames; join the pixels to one chunk."""
    kept = _Kept(_PNG_SIGNATURE)
    pixels: list[bytes] = []
    is_complete = False  # the first run of chunks of pixels has ended
    for kind, begin, end in _png_chunks(content):
        if kind == b"IDAT":
            if not is_complete:
                pixels.append(content[begin:end])
            continue
        is_complete = bool(pixels)
        if kind == b"IEND":
            break
        if not kind.isalpha():
            if is_complete:
                break
            raise UnreadableImage(f"damaged or truncated PNG: no chunk has the name {kind!r}")
        if chr(kind[0]).isupper() or kind in _PNG_KEPT:
            checksum = content[end : end + 4]
            is_sound = checksum == struct.pack(">L", zlib.crc32(content[begin - 4 : end]))
            # As in viewers, a damaged EXIF block turns nothing.
            if is_sound or kind != b"eXIf":
                kept.add(content[begin - 8 : end + 4])
    if not pixels:
        raise UnreadableImage("damaged or truncated PNG: no pixels")
    data = b"".join(pixels)
    kept.parts += [_png_chunk(b"IDAT", data), _png_chunk(b"IEND", b"")]
    return b"".join(kept.parts)


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name of each chunk, and begin and end of its data."""
    position = len(_PNG_SIGNATURE)
    for _ in range(MAX_BLOCKS):
        if position + 8 > len(content):
            return
        length, kind = struct.unpack_from(">L4s", content, position)
        yield kind, position + 8, position + 8 + length
        position += 12 + length
    raise _too_many("chunks in a PNG", MAX_BLOCKS)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return b"".join([struct.pack(">L4s", len(data), kind), data, struct.pack(">L", checksum)])


def _gif_parts(content: bytes) -> bytes:
    """Drop comments and other extensions before the first frame; keep how to show the frame."""
    position = 13
    if len(content) < position:
        raise UnreadableImage("damaged or truncated GIF: the header is not complete")
    if content[10] & 0x80:  # a palette
        position += 3 << ((content[10] & 7) + 1)
    kept = _Kept(content[:position])
    blocks = 0
    while blocks <= MAX_BLOCKS:
        match = _GIF_BLOCK.search(content, position)
        if match is None or match[0] == b";":
            raise UnreadableImage("damaged or truncated GIF: no pixels")
        begin = match.start()
        if match[0] == b",":
            return b"".join([*kept.parts, content[begin:]])
        position, blocks = begin + 2, blocks + 1
        while blocks <= MAX_BLOCKS and content[position : position + 1] not in (b"", b"\0"):
            position, blocks = position + 1 + content[position], blocks + 1
        position += 1
        if content[begin + 1 : begin + 2] == bytes([_GIF_CONTROL]):
            kept.add(content[begin:position])
    raise _too_many("blocks before the first frame of a GIF", MAX_BLOCKS)


def _check_tiff(stream: BinaryIO, file_bytes: int) -> None:
    """Check that the first directory's tags have no more bytes than the file, and few values."""
    head = stream.read(16)
    order = "<" if head[:2] == b"II" else ">"
    is_big = head[2:4] in (b"+\0", b"\0+")
    try:
        if is_big:
            (start,) = struct.unpack_from(order + "Q", head, 8)
        else:
            (start,) = struct.unpack_from(order + "L", head, 4)
        # Python cannot seek to more than this.
        stream.seek(min(start, file_bytes))
        (count,) = struct.unpack(order + ("Q" if is_big else "H"), stream.read(8 if is_big else 2))
        if count > MAX_TIFF_TAGS:
            raise _too_many("tags in a TIFF", MAX_TIFF_TAGS)
        entry = struct.Struct(order + ("HHQQ" if is_big else "HHLL"))
        table = stream.read(entry.size * count)
        tags = list(entry.iter_unpack(table[: len(table) // entry.size * entry.size]))
    except struct.error:
        raise UnreadableImage("damaged or truncated TIFF: the header is not complete") from None
    total = 0
    for tag, kind, values, offset in tags:
        size = values * _TIFF_SIZES.get(kind, 0)
        if size <= (8 if is_big else 4) or offset + size > file_bytes:
            continue  # within the entry, or left out by Pillow
        total += size
        if kind not in _TIFF_BYTES and values > MAX_TIFF_VALUES:
            raise UnreadableImage(
                f"a TIFF with {values:,} values in tag {tag}, more than {MAX_TIFF_VALUES:,}"
            )
        if total > file_bytes:
            raise UnreadableImage("a TIFF whose tags share bytes")


def _limit_bmp(stream: BinaryIO) -> BinaryIO:
    """Check the size of a run-length coded BMP, and cut codes that its pixels cannot need."""
    head = stream.read(34)
    if len(head) < 34 or int.from_bytes(head[14:18], "little") < 40:
        return stream
    width, height, compression = struct.unpack_from("<ii4xL", head, 18)
    pixels = abs(width * height)
    if compression not in (1, 2):
        return stream
    if pixels > MAX_RLE_PIXELS:
        raise UnreadableImage(
            f"a run-length coded BMP of {pixels:,} pixels, more than {MAX_RLE_PIXELS:,}"
        )
    (offset,) = struct.unpack_from("<L", head, 10)
    stream.seek(0)
    return io.BytesIO(stream.read(offset + 4 * (pixels + abs(height)) + 4096))
