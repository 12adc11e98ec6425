"""The square resize: Pillow's values, exact sums, and an export with any shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.images import random_images

from threefold.models.resize import resize_square, triangle_weights


def pillow(image: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    picture = Image.fromarray(image.numpy()).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(picture).transpose(2, 0, 1).astype(np.float64)


def centred_square(images: torch.Tensor) -> torch.Tensor:
    height, width = images.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, top : top + side, left : left + side]


@pytest.mark.parametrize("mode", ["squash", "crop"])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (28, 28, 64),
        (30, 17, 224),
        (17, 30, 16),
        (100, 75, 64),
        (75, 100, 64),
        (301, 203, 64),
        (64, 64, 64),
        (1, 5, 16),
    ],
)
def test_resize_is_pillows(height: int, width: int, size: int, mode: str) -> None:
    """Within one level: some versions of Pillow round after the rows, we after the columns."""
    images = random_images(2, height, width)

    resized = resize_square(images, size, mode)

    assert resized.shape == (2, 3, size, size)
    assert resized.dtype == torch.float32
    assert torch.equal(resized, resized.round())
    sources = centred_square(images) if mode == "crop" else images
    for image, square in zip(sources, resized, strict=True):
        difference = np.abs(square.numpy() - pillow(image, (size, size)))
        assert difference.max() <= 1
        assert difference.mean() < 0.3


@pytest.mark.parametrize("length", [5, 28, 63, 65, 100, 300, 1000])
@pytest.mark.parametrize("across", [True, False])
def test_resize_of_one_side_is_pillows(length: int, across: bool) -> None:
    """One pass rounds once, so the result is Pillow's except for exact ties."""
    images = random_images(1, 64, length) if across else random_images(1, length, 64)

    resized = resize_square(images, 64, "squash")[0].numpy()

    difference = np.abs(resized - pillow(images[0], (64, 64)))
    assert difference.max() <= 1
    assert difference.mean() < 0.01


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    size=st.integers(1, 70),
    value=st.integers(0, 255),
    mode=st.sampled_from(["squash", "crop"]),
)
def test_resize_keeps_a_flat_image_flat(
    height: int, width: int, size: int, value: int, mode: str
) -> None:
    images = torch.full((1, height, width, 3), value, dtype=torch.uint8)

    resized = resize_square(images, size, mode)

    assert torch.equal(resized, torch.full((1, 3, size, size), float(value)))


def test_resize_to_the_same_size_changes_nothing() -> None:
    images = random_images(3, 33, 33)

    assert torch.equal(resize_square(images, 33, "crop"), images.permute(0, 3, 1, 2).float())


def test_crop_sees_only_the_centred_square() -> None:
    images = random_images(1, 20, 51)
    changed = images.clone()
    changed[:, :, :15] = 255 - changed[:, :, :15]
    changed[:, :, 35:] = 255 - changed[:, :, 35:]

    for size in (8, 40):
        crop, changed_crop = (resize_square(x, size, "crop") for x in (images, changed))
        assert torch.equal(crop, changed_crop)
        squash, changed_squash = (resize_square(x, size, "squash") for x in (images, changed))
        assert not torch.equal(squash, changed_squash)


def test_resize_sums_are_exact() -> None:
    """Sums are equal in float32 and float64, hence in any order and in any runtime."""
    pixels = random_images(1, 157, 211).permute(0, 3, 1, 2).float()

    for size in (32, 300):
        weights = triangle_weights(211, torch.tensor(0.0), torch.tensor(211.0), size)
        assert torch.equal((pixels @ weights.T).double(), pixels.double() @ weights.double().T)


class Resize(torch.nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return resize_square(images, 24, self.mode)


@pytest.mark.parametrize("mode", ["squash", "crop"])
def test_resize_exports_with_dynamic_batch_height_and_width(mode: str) -> None:
    dynamic = torch.export.Dim.DYNAMIC

    program = torch.export.export(
        Resize(mode),
        (random_images(2, 40, 50),),
        dynamic_shapes=({0: dynamic, 1: dynamic, 2: dynamic},),
    )

    for count, height, width in ((2, 40, 50), (1, 50, 40), (3, 24, 24), (1, 9, 100), (5, 33, 7)):
        images = random_images(count, height, width)
        assert torch.equal(program.module()(images), resize_square(images, 24, mode))
