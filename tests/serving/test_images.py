"""Hostile images sent to a server: all are answered in bounded memory, and so is the next one."""

from __future__ import annotations

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from support.server import card, encode, picture, post, server_process, write_model

from threefold.data.image_headers import MAX_SCANS
from threefold.serving.limits import ServerLimits

RED = picture((200, 30, 30))
PNG_HEADER_BYTES = 33
START_OF_SCAN = b"\xff\xda"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose card says that all members resize images to one size."""
    part = {"filter": "triangle, antialiased", "resize": "squash", "pixels": 56}
    content = card(preprocessing=[part, part])
    return write_model(tmp_path_factory.mktemp("model") / "m.onnx", model_card=content)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG of that size whose pixels are `data`, compressed."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + png_chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A sound PNG with a compressed text of 100 MiB."""
    text = png_chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(100 * 2**20)))
    return RED[:PNG_HEADER_BYTES] + text + RED[PNG_HEADER_BYTES:]


def scan_bomb() -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    sound = encode(Image.new("RGB", (1000, 1000), (9, 99, 199)), "JPEG", progressive=True)
    scan = sound[sound.rindex(START_OF_SCAN) : -2]
    return sound[:-2] + scan * 5_000 + b"\xff\xd9"


def webp(width: int, height: int) -> bytes:
    """The header of a WebP of that size."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif(width: int, height: int) -> bytes:
    """The header of a GIF of that size."""
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\xf0\0\0" + bytes(6) + b"," + bytes(20)


def gif_frames() -> bytes:
    """A GIF with 20 large frames."""
    frames = [Image.new("P", (2000, 2000), i) for i in range(20)]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


def bmp(width: int, height: int) -> bytes:
    """The header of a BMP of that size."""
    file_header = struct.pack("<III", 100, 0, 54)
    info_header = struct.pack("<IiiHHIIIIII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + file_header + info_header


def tiff(width: int, height: int) -> bytes:
    """The header of a TIFF of that size."""
    entries = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, height),
        (279, 4, 1),
    ]
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + body + bytes(4)


def broken_exif() -> bytes:
    """A sound JPEG with a damaged EXIF block."""
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 200
    return encode(Image.new("RGB", (16, 8), (200, 30, 30)), "JPEG", exif=exif)


def photo(**options: object) -> bytes:
    """A photo of 48 megapixels, as phones make them: it lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (8064, 6048), (200, 30, 30))
    return encode(image, "JPEG", exif=exif, **options)


def hostile_images() -> dict[str, tuple[bytes, int]]:
    """Files that cost memory or time, and the status that answers each."""
    return {
        "png bomb": (png(50_000, 50_000), 413),
        "png that fits in a header": (png(2**31 - 1, 1), 413),
        "png of 19 megapixels of nothing": (png(4500, 4300, bytes(4300 * (3 * 4500 + 1))), 200),
        "png text bomb": (text_bomb(), 200),
        "gif bomb": (gif(65535, 65535), 413),
        "gif of many frames": (gif_frames(), 200),
        "webp bomb": (webp(2**24, 2**24), 413),
        "tiff bomb": (tiff(2**31, 2**31), 413),
        "bmp bomb": (bmp(2**30, 2**30), 413),
        "jpeg of many scans": (scan_bomb(), 415),
        "30,000 x 1": (encode(Image.new("RGB", (30_000, 1)), "PNG"), 413),
        "16,384 x 1": (encode(Image.new("RGB", (16_384, 1)), "PNG"), 200),
        "broken exif": (broken_exif(), 200),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415),
    }


def peak_megabytes(pid: int) -> int:
    """Peak resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) // 1024
    raise AssertionError("no VmHWM")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_hostile_images_cost_little_memory_and_time(path: Path) -> None:
    with server_process(path) as (server, address), ThreadPoolExecutor(4) as pool:
        assert post(address, RED).status_code == 200

        requests = [
            (name, status, pool.submit(post, address, content))
            for name, (content, status) in hostile_images().items()
            for _ in range(2)
        ]

        for name, status, request in requests:
            assert request.result().status_code == status, (name, request.result().text)
        assert peak_megabytes(server.pid) < 1000, peak_megabytes(server.pid)
        assert post(address, RED).json()["answers"][0]["label"] == "red"


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_photos_of_48_megapixels_are_answered_in_bounded_memory(path: Path) -> None:
    clear = Image.new("RGBA", (8000, 6000), (200, 30, 30, 99))
    contents = [
        photo(),
        photo(progressive=True, subsampling=0),
        encode(clear, "PNG", compress_level=1),
    ]
    limits = ServerLimits(answer_seconds=300)
    with server_process(path, limits) as (server, address), ThreadPoolExecutor(4) as pool:
        requests = [pool.submit(post, address, content) for content in 2 * contents]

        for request in requests:
            assert request.result().json()["answers"][0]["label"] == "red"
        assert peak_megabytes(server.pid) < 1000, peak_megabytes(server.pid)


def test_scans_are_counted() -> None:
    noise = Image.effect_noise((600, 400), 90).convert("RGB")

    progressive = encode(noise, "JPEG", progressive=True)

    assert progressive.count(START_OF_SCAN) < MAX_SCANS / 5
    assert scan_bomb().count(START_OF_SCAN) > MAX_SCANS
