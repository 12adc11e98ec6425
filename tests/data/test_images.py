"""Decoding: all common modes and formats, upright and on white; all else refused in one line."""

from __future__ import annotations

import io
import os
import resource
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from threefold.data.images import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    BadImage,
    check,
    check_all,
    decode,
)
from threefold.data.same_content import same_content
from threefold.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
GREY16 = np.array([[0, 128, 129, 257], [25700, 32768, 65278, 65535]], dtype=np.uint16)
GREY16_AS_8 = np.array([[0, 0, 1, 1], [100, 128, 254, 255]], dtype=np.uint8)


def encode(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(stream, format, **options)
    return stream.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand: header, the given chunks, no pixels."""
    header = struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))
        for name, data in parts
    )


def webp(width: int, height: int, chunk: bytes) -> bytes:
    """The start of a WebP file by hand: extended, lossless or lossy."""
    body = {
        b"VP8X": b"\0" * 4 + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
        b"VP8L": b"\x2f" + struct.pack("<L", (width - 1) | (height - 1) << 14) + b"\0" * 5,
        b"VP8 ": b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height),
    }[chunk]
    payload = b"WEBP" + chunk + struct.pack("<L", len(body)) + body
    return b"RIFF" + struct.pack("<L", len(payload)) + payload


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"big_tiff": True}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_give_the_very_pixels(format: str, options: dict) -> None:
    assert np.array_equal(decode(encode(PIXELS, format, **options)), PIXELS)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_formats_give_nearly_the_pixels(format: str) -> None:
    smooth = np.array(Image.fromarray(PIXELS[:2, :2]).resize((32, 24), Image.Resampling.BICUBIC))
    difference = decode(encode(smooth, format, quality=95)).astype(int) - smooth

    assert np.abs(difference).mean() < 4


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    content = encode(PIXELS, "PNG")
    path = tmp_path / "a b é.png"
    path.write_bytes(content)
    with path.open("rb") as stream:
        results = [
            decode(path),
            decode(str(path)),
            decode(content),
            decode(io.BytesIO(content)),
            decode(stream),
        ]

    assert all(np.array_equal(result, PIXELS) for result in results)
    assert all(
        result.dtype == np.uint8 and result.flags.writeable and result.flags.c_contiguous
        for result in results
    )


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(encode(PIXELS, "PNG"))

    assert np.array_equal(decode(path), PIXELS)


@pytest.mark.parametrize("size", [(1, 1), (30_000, 1), (1, 30_000)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    assert decode(encode(Image.new("RGB", size, (1, 2, 3)), "PNG")).shape == (size[1], size[0], 3)


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_rotation_is_applied(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_deflate"}}[
        format
    ]

    assert np.array_equal(
        decode(encode(PIXELS, format, exif=exif, **options)), TURNS[orientation](PIXELS)
    )


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_rotation_of_a_jpeg_in_both_byte_orders(order: str) -> None:
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    exif = b"Exif\0\0" + mark + struct.pack(order + "LHHHLHHL", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    plain = decode(encode(PIXELS, "JPEG"))

    assert np.array_equal(decode(encode(PIXELS, "JPEG", exif=exif)), np.rot90(plain, -1))


@pytest.mark.parametrize(
    "block",
    [b"", b"II", b"nonsense", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff\x01"],
)
def test_a_damaged_exif_block_turns_nothing(block: bytes) -> None:
    assert np.array_equal(decode(encode(PIXELS, "PNG", exif=b"Exif\0\0" + block)), PIXELS)


def test_an_orientation_that_does_not_exist_turns_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 9

    assert np.array_equal(decode(encode(PIXELS, "PNG", exif=exif)), PIXELS)


def test_grey_is_repeated() -> None:
    assert np.array_equal(
        decode(encode(PIXELS[..., 0], "PNG")), np.repeat(PIXELS[..., :1], 3, axis=2)
    )


def test_one_bit_is_black_and_white() -> None:
    image = Image.fromarray(np.eye(3, dtype=bool))

    assert np.array_equal(decode(encode(image, "PNG"))[..., 1], 255 * np.eye(3))


def test_transparent_pixels_lie_on_white() -> None:
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = [0, 128, 255]

    for format, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        assert decode(encode(rgba, format, **options))[0, :, 0].tolist() == [255, 127, 0], format


def test_grey_with_alpha_lies_on_white() -> None:
    image = Image.fromarray(np.array([[[0, 0], [10, 255]]], dtype=np.uint8), "LA")

    assert decode(encode(image, "PNG"))[0, :, 0].tolist() == [255, 10]


def test_palette_with_transparency_lies_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putdata([0, 1])

    for format, transparency in (("PNG", 0), ("PNG", b"\0\xff"), ("GIF", 0)):
        result = decode(encode(image, format, transparency=transparency))
        assert result[0].tolist() == [[255, 255, 255], [0, 200, 0]], (format, transparency)


def test_a_transparent_colour_lies_on_white() -> None:
    rgb = np.array([[[10, 20, 30], [11, 20, 30]]], dtype=np.uint8)

    assert decode(encode(rgb, "PNG", transparency=(10, 20, 30)))[0].tolist() == [
        [255] * 3,
        [11, 20, 30],
    ]


def test_cmyk_is_converted() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))

    for format in ("JPEG", "TIFF"):
        red, green, blue = decode(encode(image, format))[4, 4].astype(int)
        assert red > 230, format
        assert max(green, blue) < 25, format


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(format: str) -> None:
    assert np.array_equal(decode(encode(GREY16, format))[..., 1], GREY16_AS_8)


def test_16_bit_big_endian_grey_is_scaled() -> None:
    data = GREY16.astype(">u2").tobytes()
    tags = [
        (256, 4),
        (257, 2),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 2),
        (279, len(data)),
    ]
    entries = b"".join(struct.pack(">HHLHH", tag, 3, 1, value, 0) for tag, value in tags)
    content = (
        b"MM\0*"
        + struct.pack(">L", 8 + len(data))
        + data
        + struct.pack(">H", len(tags))
        + entries
        + b"\0" * 4
    )

    assert np.array_equal(decode(content)[..., 2], GREY16_AS_8)


def test_16_bit_transparent_value_lies_on_white() -> None:
    assert decode(encode(GREY16, "PNG", transparency=25700))[1, 0].tolist() == [255] * 3


@pytest.mark.parametrize("format", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    content = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)

    assert (decode(content) == [255, 0, 0]).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files_are_refused_with_path_and_reason(
    tmp_path: Path, format: str, share: float
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encode(pixels, format)
    path = tmp_path / "half image.bin"
    path.write_bytes(content[: max(8, int(len(content) * share))])

    with pytest.raises(DataError, match="half image") as error:
        decode(path)
    assert "truncated" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "P"])
def test_a_file_that_ends_early_has_one_reason(format: str, mode: str, tmp_path: Path) -> None:
    if (format, mode) in {("JPEG", "I;16"), ("JPEG", "P")}:
        pytest.skip("JPEG has no such pixels")
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode)
    content = encode(image.convert("I;16") if mode == "I;16" else image, format)
    path = tmp_path / f"a.{format.lower()}"
    path.write_bytes(content[: len(content) * 3 // 4])
    reason = f"damaged or truncated {format}: the file ends before all of its pixels"

    with pytest.raises(DataError) as error:
        decode(path)

    assert str(error.value) == f"cannot read the image: {path}; got {reason}"
    bad = check(path)
    assert bad is not None
    assert bad.reason == reason


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"8BPS\0\1" + b"\0" * 40, "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"P6 1 1 255 abc", "not an image"),
        (png(0, 5), "PNG"),
        (b"GIF89a\0", "GIF"),
        (webp(5, 5, b"VP8X"), "WebP"),
    ],
    ids=[
        "empty",
        "text",
        "eps",
        "psd",
        "svg",
        "ppm",
        "png-without-pixels",
        "gif-header",
        "webp-header",
    ],
)
def test_what_is_no_image_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as error:
        decode(content)
    assert str(error.value).startswith("cannot read the image: image bytes; got ")
    assert "\n" not in str(error.value)


def test_missing_files_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")

    for name, reason in (
        ("no.png", "No such file"),
        ("", "not a regular file"),
        ("pipe.png", "not a regular file"),
    ):
        with pytest.raises(DataError, match=reason):
            decode(tmp_path / name)
    with pytest.raises(DataError, match="null"):
        decode("a\0b.png")


def tiff_header(width: int, height: int) -> bytes:
    """A TIFF by hand that declares a size and has next to no pixels."""
    tags = [
        (256, width),
        (257, height),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 200),
        (277, 1),
        (278, height),
        (279, 9),
    ]
    return (
        b"II*\0"
        + struct.pack("<LH", 8, len(tags))
        + b"".join(struct.pack("<HHLL", t, 4, 1, v) for t, v in tags)
        + b"\0" * 200
    )


BOMBS = {
    "png": png(50_000, 50_000),
    "png-just-above": png(10_000, 8_948),  # where Pillow would only warn
    "gif": b"GIF89a"
    + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0)
    + b",\0\0\0\0\xff\xff\xff\xff\0\x08\0;",
    "gif-frame": b"GIF89a"
    + struct.pack("<HHBBB", 1, 1, 0, 0, 0)
    + b",\0\0\0\0\xff\xff\xff\xff\0\x08\0;",
    "tiff": tiff_header(60_000, 60_000),
    "webp": webp(16_000, 16_000, b"VP8X"),
    "webp-lossless": webp(16_000, 16_000, b"VP8L"),
    "webp-lossy": webp(16_000, 16_000, b"VP8 "),
    "bmp": b"BM"
    + struct.pack("<LHHLLllHHLLllLL", 54, 0, 0, 54, 40, 40_000, 40_000, 1, 24, 0, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("name", BOMBS)
def test_decompression_bombs_are_refused_before_decoding(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()

    with pytest.raises(DataError) as error:
        decode(BOMBS[name])
    assert time.perf_counter() - start < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    if name != "gif-frame":
        assert f"more than the {MAX_PIXELS:,}" in str(error.value)


def test_frames_after_the_first_are_not_looked_at() -> None:
    frames = [Image.new("L", (8, 8), shade) for shade in range(0, 250, 5)]
    first = encode(frames[0], "GIF")
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])

    assert np.array_equal(decode(content[: len(first) + 40] + b"\xff" * 1000), decode(first))


def test_check_accepts_all_suffixes_of_a_format(tmp_path: Path) -> None:
    for suffix, format in IMAGE_SUFFIXES.items():
        if format == "HEIF":  # Pillow cannot write it
            continue
        path = tmp_path / f"x{suffix.upper()}"
        path.write_bytes(encode(PIXELS, format))
        assert check(path) is None, suffix


def test_check_reports_names_that_mislead(tmp_path: Path) -> None:
    path = tmp_path / "photo.JPG"
    path.write_bytes(encode(PIXELS, "PNG"))

    assert check(path) == BadImage(path, "content is PNG, suffix is .JPG", readable=True)

    plain = path.rename(tmp_path / "photo")

    assert check(plain) is None


def test_check_all_keeps_order_and_pillow_settings(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    contents = [encode(PIXELS, "PNG"), b"", b"text", encode(PIXELS, "PNG")[:300]] * 5
    paths = [tmp_path / f"{i:02}.png" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)

    bad = check_all(paths, workers=4)

    assert [image.path for image in bad] == [path for i, path in enumerate(paths) if i % 4]
    assert [image.readable for image in bad] == [False] * 15
    assert all("\n" not in image.reason for image in bad)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_threads_may_read_at_once() -> None:
    content, results = encode(PIXELS, "PNG"), []
    threads = [threading.Thread(target=lambda: results.append(decode(content))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(results) == 8
    assert all(np.array_equal(result, PIXELS) for result in results)


def test_same_content_finds_equal_files_only(tmp_path: Path) -> None:
    contents = [b"aa", b"bb", b"aa", b"c", b"bb", b"aa"]
    paths = [tmp_path / str(i) for i in range(6)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)

    assert same_content(paths) == [[0, 2, 5], [1, 4]]
    with pytest.raises(DataError, match="absent"):
        same_content([tmp_path / "absent"])
