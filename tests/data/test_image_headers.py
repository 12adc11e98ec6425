"""What surrounds an image's pixels costs little time, and never changes or refuses the pixels."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from threefold.data import image_headers
from threefold.data.images import decode, measure
from threefold.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
ORIENTATION_6 = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"


def encode(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, kind, **options)
    return stream.getvalue()


JPEG = encode(PIXELS, "JPEG")
PNG = encode(PIXELS, "PNG")
GIF = encode(Image.fromarray(PIXELS[..., 0]), "GIF")
GIF_HEADER = 13 + 3 * 256
BMP_RLE = (
    b"BM"
    + struct.pack("<LHHL", 0, 0, 0, 54 + 1024)
    + struct.pack("<LiiHHLLiiLL", 40, 4, 2, 1, 8, 1, 0, 0, 0, 256, 0)
    + b"".join(bytes([i, i, i, 0]) for i in range(256))
    + b"\x04\x07\0\0\x04\x09\0\x01"
)
"""4 x 2 pixels: a row of 7, above it a row of 9."""


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def chunk(kind: bytes, body: bytes, damage: int = 0) -> bytes:
    checksum = zlib.crc32(kind + body) ^ damage
    return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", checksum)


def in_jpeg(*parts: bytes) -> bytes:
    return JPEG[:2] + b"".join(parts) + JPEG[2:]


def in_png(*parts: bytes) -> bytes:
    return PNG[:33] + b"".join(parts) + PNG[33:]


def in_gif(*parts: bytes) -> bytes:
    return GIF[:GIF_HEADER] + b"".join(parts) + GIF[GIF_HEADER:]


def film() -> bytes:
    """The film that phones append to a motion photo, with bytes that look like JPEG markers."""
    return b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x02\xff\xd8\xff\xe1" * 5000


def png_of_many_chunks() -> bytes:
    """A PNG with its pixels in chunks of one byte, as some encoders write them."""
    (length,) = struct.unpack_from(">L", PNG, 33)
    pixels = PNG[41 : 41 + length]
    parts = [chunk(b"IDAT", pixels[i : i + 1]) for i in range(length)]
    return PNG[:33] + b"".join(parts) + chunk(b"IEND", b"")


BESIDE = {
    "motion photo": (JPEG + film(), JPEG),
    "preview": (in_jpeg(segment(0xE2, b"MPF\0" + JPEG * 50)), JPEG),
    "three megabytes of profile": (in_jpeg(segment(0xE2, b"ICC_PROFILE\0" * 5000) * 50), JPEG),
    "damaged Photoshop block": (in_jpeg(segment(0xED, b"Photoshop 3.0\0" + b"8BIM" * 9)), JPEG),
    "bytes between segments": (in_jpeg(segment(0xFE, b"x"), b"\0\x17\xff\xff\xff"), JPEG),
    "png text of 80 MB": (in_png(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80 << 20)))), PNG),
    "png text with a wrong checksum": (in_png(chunk(b"tEXt", b"k\0hello", damage=1)), PNG),
    "png text that is not compressed": (in_png(chunk(b"zTXt", b"k\0\0not zlib")), PNG),
    "png profile of 2 MB": (
        in_png(chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2 << 20)))),
        PNG,
    ),
    "png profile that is damaged": (in_png(chunk(b"iCCP", b"p\0\0damaged")), PNG),
    "png exif with a wrong checksum": (in_png(chunk(b"eXIf", ORIENTATION_6[6:], damage=1)), PNG),
    "png of many chunks": (png_of_many_chunks(), PNG),
    "bytes after a png": (PNG + film(), PNG),
    "png without an end": (PNG[:-12], PNG),
    "gif comments": (in_gif(b"!\xfe" + (b"\xff" + b"a" * 255) * 9000 + b"\0"), GIF),
    "gif applications": (in_gif(b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0" * 2000), GIF),
    "bytes in a gif": (in_gif(bytes(5000)), GIF),
    "bytes after a bmp": (BMP_RLE + bytes(10**6), BMP_RLE),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_the_pixels_changes_nothing(name: str) -> None:
    content, plain = BESIDE[name]

    assert np.array_equal(decode(content), decode(plain))
    assert measure(content) == measure(plain)


def test_the_blocks_that_pixels_depend_on_are_kept() -> None:
    turned = in_jpeg(segment(0xE1, ORIENTATION_6), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0"))
    cmyk = encode(Image.fromarray(PIXELS).convert("CMYK"), "JPEG", quality=100)
    grey = encode(Image.fromarray(PIXELS[..., 0]), "PNG", transparency=int(PIXELS[0, 0, 0]))

    assert np.array_equal(decode(turned), np.rot90(decode(JPEG), -1))
    assert b"Adobe" in cmyk
    assert np.abs(decode(cmyk).astype(int) - PIXELS).mean() < 30  # inverted, it would be 85
    assert (decode(grey)[0, 0] == 255).all()
    assert np.array_equal(decode(BMP_RLE)[:, 0, 0], [9, 7])


def test_a_jpeg_in_several_scans_is_read_to_its_end() -> None:
    smooth = Image.radial_gradient("L").convert("RGB")

    progressive = encode(smooth, "JPEG", progressive=True, quality=95)
    sequential = encode(smooth, "JPEG", quality=95)

    assert progressive.count(b"\xff\xda") > 5
    assert np.array_equal(decode(progressive), decode(sequential))


def jpeg_of_scans(number: int) -> bytes:
    """A progressive JPEG whose last scan is repeated up to that number."""
    sound = encode(PIXELS, "JPEG", progressive=True)
    scan = sound[sound.rindex(b"\xff\xda") : -2]
    return sound[:-2] + scan * (number - sound.count(b"\xff\xda")) + b"\xff\xd9"


def tiff(*tags: tuple[int, int, int, int]) -> bytes:
    """A TIFF of one pixel, with further tags (tag, type, count, offset)."""
    usual = [(t, 4, 1, v) for t, v in ((256, 1), (257, 1), (258, 8), (262, 1), (273, 8), (279, 1))]
    entries = sorted(usual + list(tags))
    table = b"".join(struct.pack("<HHLL", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<LH", 8, len(entries)) + table + bytes(4 + 600_000)


def wide_bmp() -> bytes:
    return BMP_RLE[:18] + struct.pack("<ii", 30_000, 30_000) + BMP_RLE[26:]


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "1.75 million segments": (
        lambda: in_jpeg(segment(0xE1, b"x" * 8) * 1_750_000),
        "more than 100,000 segments",
    ),
    "Photoshop blocks": (
        lambda: in_jpeg(segment(0xED, b"Photoshop 3.0\0") * 200_000),
        "more than 100,000 segments",
    ),
    "tables": (lambda: in_jpeg(segment(0xDB, bytes(65 * 900)) * 20), "bytes of tables"),
    "segments between scans": (
        lambda: JPEG[:-2] + segment(0xFE, b"") * 150_000 + JPEG[-2:],
        "more than 100,000 segments",
    ),
    "scans": (lambda: jpeg_of_scans(101), "more than 100 scans"),
    "scans of a large image": (
        lambda: encode(Image.new("L", (6000, 6000)), "JPEG")[:-2] + segment(0xDA, b"") * 27,
        "36,000,000 pixels in more than 27 scans",
    ),
    "chunks": (lambda: in_png(chunk(b"IDAT", b"") * 1_000_000), "more than 100,000 chunks"),
    "palettes": (lambda: in_png(chunk(b"PLTE", bytes(9000)) * 200), "bytes of tables"),
    "gif blocks": (
        lambda: in_gif(b"!\xfe" + b"\1a" * 5_000_000 + b"\0"),
        "more than 100,000 blocks",
    ),
    "gif extensions": (lambda: in_gif(b"!\xfe\0" * 3_000_000), "more than 100,000 blocks"),
    "tags that share bytes": (
        lambda: tiff(*((60_000 + i, 7, 500_000, 200) for i in range(4))),
        "share bytes",
    ),
    "tiff positions": (lambda: tiff((330, 3, 270_000, 200)), "270,000 values in tag 330"),
    "run-length codes": (wide_bmp, "900,000,000 pixels"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_would_take_minutes_are_refused(name: str) -> None:
    make, reason = HOSTILE[name]
    content = make()

    for read in (decode, measure):
        with pytest.raises(DataError, match=reason) as error:
            read(content)
        assert "\n" not in str(error.value)


def test_as_many_scans_as_are_allowed_are_read() -> None:
    assert decode(jpeg_of_scans(100)).shape == PIXELS.shape


def test_a_file_of_two_gigabytes_is_not_read(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sparse.jpg"
    with path.open("wb") as file:
        file.write(JPEG)
        file.truncate(2**31)

    with pytest.raises(DataError, match="2,147,483,648 bytes, more than the 1,073,741,824"):
        decode(path)


def test_run_length_codes_are_cut_where_no_pixel_needs_them() -> None:
    endless = BMP_RLE[:-8] + b"\0\0" * 1_000_000

    limited = image_headers.essential_parts(io.BytesIO(endless), "BMP").read()

    assert len(limited) < 10_000
