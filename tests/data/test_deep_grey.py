"""Grey of more than 8 bits: white depends on the type of the image, never on its values."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from threefold.data.images import decode
from threefold.errors import DataError

BITS, PHOTOMETRIC, MAX_SAMPLE = 258, 262, 281


def encode(values: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF", **options)
    return stream.getvalue()


def grey(values: np.ndarray, **options: Any) -> list[int]:
    return [int(v) for v in decode(encode(values, **options))[0, :, 0]]


def ramp(*values: float, dtype: Any = np.float32) -> np.ndarray:
    """A row of 400 values of which these are the first; the rest is 0."""
    row = np.zeros((1, 400), dtype)
    row[0, : len(values)] = values
    return row


@pytest.mark.parametrize("outlier", [1.0, 1.0000001, 1.5, 80.0, -1e-9, -3.0])
def test_one_pixel_does_not_tip_the_scale(outlier: float) -> None:
    clipped = 255 if outlier > 0 else 0

    assert grey(ramp(0, 0.5, 1, outlier))[:4] == [0, 128, 255, clipped]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("largest", [255, 256, 65535])
def test_integers_of_all_types_have_one_white(dtype: Any, largest: int) -> None:
    expected = [0, round(255 / 257), round(largest / 257)]

    assert grey(ramp(0, 255, largest, dtype=dtype))[:3] == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (ramp(*range(256)), "floating-point grey from 0 to 255, expected 0 to 1; scale it"),
        (ramp(*[-0.5] * 9), "floating-point grey from -0.5 to 0, expected 0 to 1"),
        (ramp(*[70_000] * 9, dtype=np.int32), "integer grey from 0 to 70000, expected 0 to 65535"),
        (ramp(np.nan), "NaN or infinite"),
        (ramp(np.inf), "NaN or infinite"),
    ],
)
def test_another_scale_is_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(encode(values))


def with_tag(content: bytes, tag: int, value: int) -> bytes:
    """Change the value of a tag in an uncompressed little-endian TIFF file."""
    entry = content.index(tag.to_bytes(2, "little") + b"\3\0" + b"\1\0\0\0")
    return content[: entry + 8] + value.to_bytes(2, "little") + b"\0\0" + content[entry + 12 :]


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 51, 255]], np.uint8),
        np.array([[0, 51 * 257, 65535]], np.uint16),
        np.array([[0, 0.2, 1]], np.float32),
    ],
)
def test_white_is_zero_at_every_depth(values: np.ndarray) -> None:
    content = with_tag(encode(values), PHOTOMETRIC, 0)

    assert decode(content)[0, :, 1].tolist() == [255, 204, 0]


def test_12_bits_are_scaled_by_what_the_file_declares() -> None:
    content = encode(np.zeros((1, 3), np.uint16))
    content = with_tag(content, BITS, 12)
    start = content.index((273).to_bytes(2, "little"))
    offset = int.from_bytes(content[start + 8 : start + 12], "little")
    packed = bytes([0x80, 0x0F, 0xFF, 0x00, 0x00, 0x00])  # 2048, 4095, 0
    content = content[:offset] + packed + content[offset + 6 :]

    assert decode(content)[0, :, 0].tolist() == [128, 255, 0]


def test_12_bits_in_16_with_their_largest_value() -> None:
    content = encode(np.array([[0, 2048, 4095]], np.uint16), tiffinfo={MAX_SAMPLE: 4095})

    assert decode(content)[0, :, 0].tolist() == [0, 128, 255]
