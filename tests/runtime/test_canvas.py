"""Images are resized outside of the graph, to the very pixels that the graph would have."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.server import card, write_model

import threefold
from threefold.data import resize as resizing
from threefold.data.resize import MAX_SCALE
from threefold.models.resize import resize_square
from threefold.runtime.canvas import Canvas, common_canvas, fit_canvas

PART = {"filter": "triangle, antialiased", "resize": "crop", "pixels": 224}
Resize = Literal["squash", "crop"]


def of_graph(pixels: np.ndarray, size: int, mode: Resize) -> np.ndarray:
    resized = resize_square(torch.from_numpy(pixels[None]), size, mode)
    return resized[0].permute(1, 2, 0).to(torch.uint8).numpy()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 40),
    st.sampled_from(["squash", "crop"]),
    st.integers(1, 600),
)
def test_pixels_are_those_of_the_graph(
    height: int, width: int, size: int, mode: Resize, band: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resizing, "BAND_PIXELS", band)
        fitted = fit_canvas(pixels, Canvas(size, mode))

    assert fitted.shape == (size, size, 3)
    assert np.array_equal(fitted, of_graph(pixels, size, mode))


@pytest.mark.parametrize("mode", ["squash", "crop"])
def test_long_and_large_images_too(mode: Resize) -> None:
    rng = np.random.default_rng(1)
    for height, width, size in ((40, 5000, 20), (3000, 33, 31), (1, 700, 1), (700, 900, 224)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)

        small = fit_canvas(pixels, Canvas(size, mode))

        assert np.array_equal(of_graph(small, size, mode), of_graph(pixels, size, mode))


def test_a_photo_takes_little_memory() -> None:
    pixels = np.zeros((3024, 4032, 3), np.uint8)
    tracemalloc.start()

    small = fit_canvas(pixels, Canvas(64, "squash"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert small.shape == (64, 64, 3)
    assert peak < 2 * 3024 * 4032  # as floats it takes twelve bytes per pixel


@pytest.mark.parametrize(
    ("parts", "canvas"),
    [
        ([PART, PART], Canvas(224, "crop")),
        ([PART, {**PART, "pixels": 260}], None),
        ([PART, {**PART, "resize": "squash"}], None),
        ([{**PART, "filter": "nearest"}], None),
        ([{**PART, "pixels": 10**9}], None),
        ([{**PART, "pixels": "224"}], None),
        ([5], None),
        ([], None),
        (5, None),
        (None, None),
    ],
)
def test_the_canvas_that_members_have_in_common(parts: object, canvas: Canvas | None) -> None:
    assert common_canvas({"preprocessing": parts}) == canvas


def test_images_are_resized_before_the_graph(tmp_path: Path) -> None:
    seen = []
    parts = [{**PART, "resize": "squash", "pixels": 8}]
    model = threefold.load(write_model(tmp_path / "m.onnx", model_card=card(preprocessing=parts)))
    run = model.session.run
    model.session.run = lambda outputs, inputs, options: (
        seen.append(inputs["images"].shape),
        run(outputs, inputs, options),
    )[1]

    sizes = [(1000, 1000), (3, 5), (1, 8 * MAX_SCALE + 1)]
    model.predict([np.zeros((*size, 3), np.uint8) for size in sizes])

    assert seen == [(1, 8, 8, 3), (1, 8, 8, 3), (1, 1, 8 * MAX_SCALE + 1, 3)]
