"""Heat maps by occlusion: where the evidence is, on the image's own pixels."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.server import CLASSES, card, write_model

from threefold.errors import DataError
from threefold.runtime.heat import HeatFolder, check_picture, occlusion_heat, overlay
from threefold.runtime.model import Model
from threefold.runtime.predict import write_predictions

RED = CLASSES.index("red")


def spotted(height: int, width: int, rows: slice, columns: slice) -> np.ndarray:
    """A grey image with a red spot."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    pixels[rows, columns] = (250, 20, 20)
    return pixels


def test_the_heat_is_where_the_evidence_is(tmp_path: Path) -> None:
    model = Model(write_model(tmp_path / "m.onnx"))
    pixels = spotted(70, 98, slice(10, 20), slice(56, 70))

    heat = occlusion_heat(model, pixels, RED)

    assert heat.map.shape == (70, 98)
    assert heat.map.max() == 1
    assert heat.map[15, 63] > 0.95
    assert heat.map[5, 63] == pytest.approx(heat.map[25, 63], abs=0.1)  # equally far from it
    assert heat.map[45:, :].max() == heat.map[:, :35].max() == 0
    assert heat.probability == pytest.approx(model.answer(pixels[None])[0, RED])
    assert heat.lowest < heat.probability - 0.005


def test_what_no_square_speaks_for_is_cold(tmp_path: Path) -> None:
    model = Model(write_model(tmp_path / "m.onnx"))

    heat = occlusion_heat(model, np.full((20, 3, 3), 128, np.uint8), RED)

    assert not heat.map.any()
    assert heat.lowest == pytest.approx(heat.probability)


@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 60)])
def test_pixels_outside_of_a_crop_are_cold(tmp_path: Path, height: int, width: int) -> None:
    part = {"filter": "triangle, antialiased", "resize": "crop", "pixels": 32}
    model = Model(write_model(tmp_path / "m.onnx", model_card=card(preprocessing=[part])))
    top, left = (height - 60) // 2, (width - 60) // 2
    pixels = spotted(height, width, slice(top, top + 8), slice(left, left + 8))

    heat = occlusion_heat(model, pixels, RED).map

    outside = np.ones((height, width), bool)
    outside[top : top + 60, left : left + 60] = False
    assert not heat[outside].any()
    assert heat[top : top + 4, left : left + 4].min() > 0.9
    assert heat[top + 30 :, left + 30 :].max() == 0


def test_a_picture_is_clear_where_cold_and_yellow_where_hot() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 2000, 3), dtype=np.uint8)
    heat = np.zeros((30, 2000), np.float32)
    heat[:, 1500:] = 1

    picture = np.asarray(overlay(pixels, heat)).astype(int)

    plain = np.asarray(overlay(pixels, np.zeros_like(heat))).astype(int)
    assert picture.shape == (15, 1024, 3)
    assert np.array_equal(picture[:, :700], plain[:, :700])
    np.testing.assert_allclose(
        picture[:, 800:], 0.25 * plain[:, 800:] + 0.75 * np.array([241, 239, 117]), atol=1.5
    )


def test_the_picture_of_a_small_image_can_be_seen() -> None:
    picture = overlay(np.zeros((28, 14, 3), np.uint8), np.zeros((28, 14), np.float32))

    assert picture.size == (224, 448)


def test_a_folder_keeps_the_pictures_of_equal_names(tmp_path: Path) -> None:
    pictures, pixels = HeatFolder(tmp_path / "heat"), np.zeros((4, 4, 3), np.uint8)

    paths = [pictures.save(name, pixels, pixels[..., 0]) for name in ("a/x.jpg", "b/x.png", "y")]

    assert [path.name for path in paths] == ["x.png", "x-2.png", "y.png"]
    assert all(path.read_bytes()[1:4] == b"PNG" for path in paths)
    with pytest.raises(DataError, match=r"expected a name ending in \.png"):
        check_picture(tmp_path / "x.jpg")


def test_predict_writes_a_picture_for_each_answer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx")
    Image.fromarray(spotted(16, 16, slice(0, 4), slice(0, 4))).save(tmp_path / "spot.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    images = [str(tmp_path / name) for name in ("bad.png", "spot.png")]
    stream = io.StringIO()

    failed = write_predictions(
        stream, lambda _: None, model, images, 1, "json", heat=tmp_path / "heat"
    )

    assert failed == 1
    assert json.loads(stream.getvalue())["heat"] == str(tmp_path / "heat" / "spot.png")
    assert [path.name for path in (tmp_path / "heat").iterdir()] == ["spot.png"]
