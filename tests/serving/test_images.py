"""Hostile images sent to a server: each is answered or refused, in bounded memory, and the next one is answered."""

from __future__ import annotations

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.server import picture, post, process, write_model

from threefold.data.images import MAX_SCANS

RED = picture((200, 30, 30))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.onnx")


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG of that size whose pixels are `data`, compressed."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    body = b"note\0\0" + zlib.compress(bytes(100 * 2**20))
    start, rest = RED[:33], RED[33:]
    return (
        start
        + struct.pack(">I", len(body))
        + b"zTXt"
        + body
        + struct.pack(">I", zlib.crc32(b"zTXt" + body))
        + rest
    )


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scan_bomb() -> bytes:
    """A progressive JPEG whose last scan stands there again and again."""
    whole = saved(Image.new("RGB", (1000, 1000), (9, 99, 199)), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * 5_000 + b"\xff\xd9"


def webp(width: int, height: int) -> bytes:
    body = (
        b"WEBPVP8X"
        + struct.pack("<I", 10)
        + b"\x02\0\0\0"
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif_frames() -> bytes:
    frames = [Image.new("P", (2000, 2000), i) for i in range(20)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def tiff(width: int, height: int) -> bytes:
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
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 200
    return saved(Image.new("RGB", (16, 8), (200, 30, 30)), "JPEG", exif=exif)


def hostile() -> dict[str, tuple[bytes, int]]:
    """Files that want memory or time, and the status with which each is answered."""
    return {
        "png bomb": (png(50_000, 50_000), 413),
        "png that fits in a header": (png(2**31 - 1, 1), 413),
        "png of 19 megapixels of nothing": (png(4500, 4300, bytes(4300 * (3 * 4500 + 1))), 200),
        "png text bomb": (text_bomb(), 415),
        "gif bomb": (
            b"GIF89a"
            + struct.pack("<HH", 65535, 65535)
            + b"\xf0\0\0"
            + bytes(6)
            + b","
            + bytes(20),
            413,
        ),
        "gif of many frames": (gif_frames(), 200),
        "webp bomb": (webp(2**24, 2**24), 413),
        "tiff bomb": (tiff(2**31, 2**31), 413),
        "bmp bomb": (
            b"BM"
            + struct.pack("<IIIIiiHHIIIIII", 100, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
            413,
        ),
        "jpeg of many scans": (scan_bomb(), 415),
        "30,000 x 1": (saved(Image.new("RGB", (30_000, 1)), "PNG"), 413),
        "16,384 x 1": (saved(Image.new("RGB", (16_384, 1)), "PNG"), 200),
        "broken exif": (broken_exif(), 200),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415),
    }


def megabytes(pid: int, key: str) -> int:
    """VmRSS now or VmHWM ever of a process, in MB."""
    return (
        next(
            int(line.split()[1])
            for line in Path(f"/proc/{pid}/status").read_text().splitlines()
            if line.startswith(key)
        )
        // 1024
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_hostile_images_cost_little_memory_and_time(path: Path) -> None:
    with process(path) as (server, address):
        assert post(address, RED).status_code == 200
        with ThreadPoolExecutor(4) as pool:
            asked = [
                (n, s, pool.submit(post, address, c))
                for n, (c, s) in hostile().items()
                for _ in range(2)
            ]
            for name, status, response in asked:
                assert response.result().status_code == status, (name, response.result().text)
        assert megabytes(server.pid, "VmHWM") < 1000
        assert post(address, RED).json()["answers"][0]["label"] == "red"


def test_scans_are_counted() -> None:
    assert scan_bomb().count(b"\xff\xda") > MAX_SCANS
    assert (
        saved(Image.effect_noise((600, 400), 90).convert("RGB"), "JPEG", progressive=True).count(
            b"\xff\xda"
        )
        < MAX_SCANS / 5
    )
