"""Whatever people call an image is answered as its file is, or refused with a reason."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from support.server import encode, write_model

import threefold
from threefold.data.detect_source import detect_source
from threefold.errors import DataError, ExportError, ThreefoldError
from threefold.predictions.formats import read_predictions
from threefold.runtime.inputs import as_pixels
from threefold.runtime.model import Model

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
PNG = encode(PIXELS, "PNG")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return threefold.load(write_model(tmp_path_factory.mktemp("model") / "m.onnx"))


def tensor() -> torch.Tensor:
    return torch.from_numpy(PIXELS)


KINDS: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "text": lambda path: str(path),
    "bytes": lambda path: PNG,
    "bytearray": lambda path: bytearray(PNG),
    "memoryview": lambda path: memoryview(PNG),
    "open file": lambda path: io.BytesIO(PNG),
    "Pillow image": lambda path: Image.fromarray(PIXELS),
    "Pillow image that is not loaded": lambda path: Image.open(path),
    "array": lambda path: PIXELS,
    "array of floats": lambda path: PIXELS / 255,
    "tensor (h, w, 3)": lambda path: tensor(),
    "tensor (3, h, w)": lambda path: tensor().permute(2, 0, 1),
    "tensor of ToTensor": lambda path: tensor().permute(2, 0, 1).float() / 255,
    "tensor with a gradient": lambda path: (tensor() / 255).requires_grad_(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_has_the_answer_of_its_file(
    model: Model, kind: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    expected = model.predict_proba([path])

    alone = model.predict_proba(KINDS[kind](path))
    in_a_list = model.predict_proba([KINDS[kind](path), PIXELS[:3]])

    assert alone.shape == (1, 3)
    assert np.array_equal(alone, expected)
    assert np.array_equal(in_a_list[:1], expected)
    assert model.predict(KINDS[kind](path)) == model.predict([path])


def test_batches_are_several_images(model: Model) -> None:
    batch = np.stack([PIXELS, 255 - PIXELS])
    expected = model.predict_proba([PIXELS, 255 - PIXELS])

    assert np.array_equal(model.predict_proba(batch), expected)
    assert np.array_equal(
        model.predict_proba(torch.from_numpy(batch).permute(0, 3, 1, 2)), expected
    )
    assert np.array_equal(model.predict_proba(image for image in batch), expected)
    assert model.predict_proba([]).shape == (0, 3)


def test_a_pillow_image_is_turned_and_laid_on_white() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(io.BytesIO(encode(PIXELS, "PNG", exif=exif)))
    clear = Image.new("RGBA", (4, 3), (0, 0, 0, 0))

    assert np.array_equal(as_pixels(turned), np.rot90(PIXELS, -1))
    assert (as_pixels(clear) == 255).all()
    assert (as_pixels(Image.new("L", (4, 3), 7)) == 7).all()


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "got NoneType"),
        (5, "got int"),
        ([5], "got int"),
        ({"a": PNG}, "got dict"),
        ([PIXELS.astype(np.int32)], r"int32 \(6, 9, 3\)"),
        ([PIXELS[..., 0]], r"uint8 \(6, 9\)"),
        ([PIXELS[:0]], r"uint8 \(0, 9, 3\)"),
        (PIXELS - 128.0, "float64 values from -128 to"),
        (PIXELS * 1.0, "float64 values from 0 to"),
        (np.full((2, 2, 3), np.nan), "float64 values from nan"),
        (
            pd.DataFrame({"image": ["a.png"], "label": ["a"]}),
            "the column of their paths.*got columns image, label",
        ),
        (tensor().permute(2, 0, 1).float().sub(0.5).bfloat16(), "cannot read the tensor"),
    ],
)
def test_what_is_no_image_is_refused(model: Model, image: Any, reason: str) -> None:
    with pytest.raises(ExportError, match=reason) as error:
        model.predict(image)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_named(model: Model) -> None:
    with pytest.raises(DataError, match=r"nothing\.png"):
        model.predict("nothing.png")
    with pytest.raises(DataError, match="a Pillow image"):
        model.predict(Image.open(io.BytesIO(PNG[:60])))


@pytest.mark.parametrize("make", [np.array, pd.Series, tuple, iter])
def test_paths_come_in_any_sequence(
    model: Model, make: Callable[[Any], Any], tmp_path: Path
) -> None:
    paths = [str(tmp_path / f"{name}.png") for name in "ab"]
    for path in paths:
        Path(path).write_bytes(PNG)

    assert np.array_equal(model.predict_proba(make(paths)), model.predict_proba([PIXELS, PIXELS]))


ADDRESS = "https://example.org/a.onnx"


@pytest.mark.parametrize(
    "read",
    [
        lambda model: model.predict(ADDRESS),
        lambda model: model.predict([Path(ADDRESS)]),
        lambda model: threefold.load("HTTP://example.org/a.onnx"),
        lambda model: threefold.open("s3://bucket/run"),
        lambda model: detect_source(ADDRESS),
        lambda model: read_predictions(ADDRESS),
    ],
)
def test_addresses_are_refused(model: Model, read: Callable[[Model], Any]) -> None:
    with pytest.raises(ThreefoldError, match="an address is not read, only files are: ") as error:
        read(model)
    assert str(error.value).endswith("fix: download it and give the path of the file")


def test_a_drive_of_windows_is_no_address() -> None:
    with pytest.raises(DataError, match="cannot read the image"):
        as_pixels("c:/a.png")
