"""Resize against Pillow, the warp against SciPy and keras-preprocessing, and the views."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from threefold.errors import RecipeError
from threefold.models.resize import resize_square, triangle_weights
from threefold.models.views import Views
from threefold.recipe_schema import AugmentSpec, ViewSpec
from threefold.training.augment import Augment, Draws, affine_warp, shift_channels

PAPER = AugmentSpec(
    rotation=30, shift=0.3, shear=0.3, zoom=0.3, channel_shift=10, hflip=True, vflip=True
)


def random_images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Noise on slow waves (b, h, w, 3): edges and ties as well as smooth parts."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = 80 * np.sin(rows / 7.0)[..., None] + 40 * np.cos(columns / 5.0)[..., None]
    noise = rng.integers(0, 256, size=(count, height, width, 3))
    return torch.from_numpy(np.clip(noise * 0.6 + waves + 60, 0, 255).astype(np.uint8))


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
    for image, mine in zip(
        centred_square(images) if mode == "crop" else images, resized, strict=True
    ):
        difference = np.abs(mine.numpy() - pillow(image, (size, size)))
        assert difference.max() <= 1
        assert difference.mean() < 0.3


@pytest.mark.parametrize("length", [5, 28, 63, 65, 100, 300, 1000])
@pytest.mark.parametrize("across", [True, False])
def test_resize_of_one_side_is_pillows(length: int, across: bool) -> None:
    """One pass rounds once, so the result is Pillow's except for exact ties."""
    images = random_images(1, 64, length) if across else random_images(1, length, 64)
    difference = np.abs(
        resize_square(images, 64, "squash")[0].numpy() - pillow(images[0], (64, 64))
    )
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
    assert torch.equal(
        resize_square(images, size, mode), torch.full((1, 3, size, size), float(value))
    )


def test_resize_to_the_same_size_changes_nothing() -> None:
    images = random_images(3, 33, 33)
    assert torch.equal(resize_square(images, 33, "crop"), images.permute(0, 3, 1, 2).float())


def test_crop_sees_only_the_centred_square() -> None:
    images = random_images(1, 20, 51)
    changed = images.clone()
    changed[:, :, :15] = 255 - changed[:, :, :15]
    changed[:, :, 35:] = 255 - changed[:, :, 35:]
    for size in (8, 40):
        assert torch.equal(
            resize_square(images, size, "crop"), resize_square(changed, size, "crop")
        )
        assert not torch.equal(
            resize_square(images, size, "squash"), resize_square(changed, size, "squash")
        )


def test_resize_sums_are_exact() -> None:
    """Equal in float32 and float64, hence in any order, on any device and in any runtime."""
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


def keras_matrix(
    angle: float,
    shift: tuple[float, float],
    shear: float,
    zoom: tuple[float, float],
    height: int,
    width: int,
) -> np.ndarray:
    """The product R T S Z of keras-preprocessing on (row, column, 1), about the grid's centre."""
    rotation = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    move = np.array([[1, 0, shift[0] * height], [0, 1, shift[1] * width], [0, 0, 1]])
    slant = np.array([[1, -np.sin(shear), 0], [0, np.cos(shear), 0], [0, 0, 1]])
    scale = np.diag([zoom[0], zoom[1], 1])
    middle = np.array([[1, 0, (height - 1) / 2], [0, 1, (width - 1) / 2], [0, 0, 1]])
    return middle @ rotation @ move @ slant @ scale @ np.linalg.inv(middle)


def scipy_warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    linear, offset = matrix[:2, :2], matrix[:2, 2]
    return np.stack(
        [ndimage.affine_transform(c, linear, offset, order=1, mode="nearest") for c in image]
    )


@pytest.mark.parametrize(("height", "width"), [(24, 24), (20, 31)])
@pytest.mark.parametrize("seed", range(4))
def test_warp_is_scipys_and_keras(height: int, width: int, seed: int) -> None:
    """Everywhere, borders included, within 1e-3 of the 0..255 scale."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, 255, size=(5, 3, height, width))
    angle, shear = rng.uniform(-np.pi, np.pi, size=5), rng.uniform(-0.8, 0.8, size=5)
    shift, zoom = (
        rng.uniform(-0.4, 0.4, size=(5, 2)),
        rng.uniform(0.6, 1.4, size=(5, 2)) * [1, (-1) ** seed],
    )
    draws = Draws(
        *(torch.from_numpy(part).float() for part in (angle, shift, shear, zoom, np.zeros(5)))
    )
    warped = affine_warp(torch.from_numpy(images).float(), draws).numpy()
    for i in range(5):
        matrix = keras_matrix(angle[i], tuple(shift[i]), shear[i], tuple(zoom[i]), height, width)
        assert np.abs(warped[i] - scipy_warp(images[i], matrix)).max() < 1e-3 * 255


def test_flips_are_mirror_images() -> None:
    images = random_images(64, 9, 12).permute(0, 3, 1, 2)
    for options, dims in (({"hflip": True}, (3,)), ({"vflip": True}, (2,))):
        augmented = Augment(AugmentSpec(**options))(images, torch.Generator().manual_seed(0))
        mirrored = images.flip(dims).float()
        flipped = [
            torch.allclose(a, m, atol=0.02) for a, m in zip(augmented, mirrored, strict=True)
        ]
        unchanged = [
            torch.allclose(a, x, atol=0.02) for a, x in zip(augmented, images.float(), strict=True)
        ]
        assert [a != b for a, b in zip(flipped, unchanged, strict=True)] == [True] * 64
        assert 16 < sum(flipped) < 48


def test_no_augmentation_returns_the_values_unchanged() -> None:
    images = random_images(2, 7, 8).permute(0, 3, 1, 2)
    augmented = Augment(AugmentSpec())(images, torch.Generator())
    assert augmented.dtype == torch.float32
    assert torch.equal(augmented, images.float())


def test_augmentation_depends_only_on_the_generator() -> None:
    images = random_images(4, 16, 16).permute(0, 3, 1, 2)
    before = images.clone()
    augment = Augment(PAPER)
    torch.manual_seed(1)
    first = augment(images, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    assert torch.equal(first, augment(images.float(), torch.Generator().manual_seed(5)))
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(6)))
    assert torch.equal(images, before)
    copies = augment(images[:1].expand(4, -1, -1, -1), torch.Generator().manual_seed(5))
    assert all(not torch.equal(copies[0], other) for other in copies[1:])
    assert float(first.min()) >= 0.0
    assert float(first.max()) <= 255.001


def test_draws_fill_their_ranges() -> None:
    """Ranges and units are the authors': degrees, shares of the side, scale about 1, 0..255."""
    draws = Augment(PAPER).draw(20_000, torch.Generator().manual_seed(0))
    shapes = [tuple(part.shape[1:]) for part in draws]
    assert shapes == [(), (2,), (), (2,), ()]
    for part, limit in (
        (draws.angle, np.radians(30)),
        (draws.shear, np.radians(0.3)),
        (draws.channel, 10.0),
    ):
        assert 0.99 * limit < float(part.max()) <= limit
        assert -limit <= float(part.min()) < -0.99 * limit
    assert 0.29 < float(draws.shift.amax(0).min()) <= float(draws.shift.amax()) <= 0.3
    assert -0.3 <= float(draws.shift.amin()) <= float(draws.shift.amin(0).max()) < -0.29
    scale = draws.zoom.abs()
    assert 0.7 <= float(scale.min()) < 0.71
    assert 1.29 < float(scale.max()) <= 1.3
    assert torch.allclose((draws.zoom < 0).float().mean(0), torch.tensor([0.5, 0.5]), atol=0.02)
    columns = torch.stack(
        [
            draws.angle,
            *draws.shift.T,
            draws.shear,
            *scale.T,
            *(draws.zoom < 0).T.float(),
            draws.channel,
        ]
    )
    assert float((torch.corrcoef(columns) - torch.eye(9)).abs().max()) < 0.04, (
        "knobs share their randomness"
    )


def test_an_option_does_not_change_the_draws_of_others() -> None:
    all_on = Augment(PAPER).draw(6, torch.Generator().manual_seed(0))
    few = Augment(AugmentSpec(rotation=30, channel_shift=10)).draw(
        6, torch.Generator().manual_seed(0)
    )
    assert torch.equal(all_on.angle, few.angle)
    assert torch.equal(all_on.channel, few.channel)
    assert torch.equal(few.zoom, torch.ones(6, 2))
    assert not few.shift.any()


def test_channel_shift_keeps_to_the_range_of_the_image() -> None:
    images = (
        torch.tensor([[10.0, 100.0, 200.0], [0.0, 5.0, 8.0]]).view(2, 3, 1, 1).expand(2, 3, 2, 2)
    )
    shifted = shift_channels(images, torch.tensor([50.0, -6.0]))
    assert shifted[0, :, 0, 0].tolist() == [60.0, 150.0, 200.0]
    assert shifted[1, :, 0, 0].tolist() == [0.0, 0.0, 2.0]
    augmented = Augment(AugmentSpec(channel_shift=20))(images, torch.Generator().manual_seed(0))
    assert not torch.equal(augmented, images)
    assert torch.equal(
        augmented.clamp(images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)), augmented
    )


def views(
    kind: str, upsample: float = 1.25, n: int = 1, img_size: int = 16, seed: int = 0
) -> Views:
    return Views(ViewSpec(kind=kind, upsample=upsample, n=n), img_size, seed)


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("center", 1),
        ("flip", 2),
        ("random-crops", 7),
        ("five-crop", 5),
        ("ten-crop", 10),
        ("multi-scale", 3),
    ],
)
def test_counts_and_shapes_of_views(kind: str, count: int) -> None:
    module = views(kind, n=7 if kind == "random-crops" else 1)
    assert module.canvas == 20
    assert module.count == count
    images = random_images(2, 20, 20).permute(0, 3, 1, 2).float()
    cut = module(images)
    assert cut.shape == (count, 2, 3, 16, 16)
    assert torch.equal(cut, module(images))
    assert len({view.numpy().tobytes() for view in cut}) == count, "two views are the same"


def test_positions_of_views() -> None:
    images = torch.arange(400.0).view(1, 1, 20, 20).expand(2, 3, -1, -1)
    corners = {"centre": (2, 2), "nw": (0, 0), "ne": (0, 4), "sw": (4, 0), "se": (4, 4)}
    crops = [images[:, :, t : t + 16, left : left + 16] for t, left in corners.values()]
    assert torch.equal(views("center")(images), torch.stack(crops[:1]))
    assert torch.equal(views("flip")(images), torch.stack([crops[0], crops[0].flip(3)]))
    assert torch.equal(views("five-crop")(images), torch.stack(crops))
    assert torch.equal(
        views("ten-crop")(images), torch.stack([*crops, *(crop.flip(3) for crop in crops)])
    )


def test_center_without_upsampling_is_the_identity() -> None:
    images = torch.rand(2, 3, 16, 16)
    module = views("center", upsample=1.0)
    assert module.canvas == 16
    assert torch.equal(module(images)[0], images)


def test_canvas_of_the_paper() -> None:
    assert Views(ViewSpec(kind="random-crops", n=3, upsample=1.078), 501, 0).canvas == 540


def test_random_crops_are_different_and_fixed_by_the_seed() -> None:
    first = views("random-crops", n=25)
    assert sorted(first.corners) == [(top, left) for top in range(5) for left in range(5)]
    assert views("random-crops", n=25).corners == first.corners
    assert views("random-crops", n=25, seed=1).corners != first.corners
    assert views("random-crops", n=1, upsample=1.0).corners == ((0, 0),)


@pytest.mark.parametrize(("kind", "n"), [("random-crops", 2), ("five-crop", 1), ("ten-crop", 1)])
def test_identical_views_are_refused(kind: str, n: int) -> None:
    with pytest.raises(RecipeError, match="upsample"):
        views(kind, upsample=1.0, n=n)


def test_multi_scale_resizes_centred_crops() -> None:
    images = random_images(2, 20, 20).permute(0, 3, 1, 2).float()
    for view, side in zip(views("multi-scale")(images), (20, 18, 16), strict=True):
        edge = (20 - side) // 2
        crop = images[:, :, edge : edge + side, edge : edge + side]
        expected = torch.nn.functional.interpolate(
            crop, size=16, mode="bilinear", antialias=True, align_corners=False
        )
        torch.testing.assert_close(view, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ["center", "ten-crop", "multi-scale"])
def test_views_export_and_add_nothing_to_the_state(kind: str) -> None:
    module = views(kind)
    assert not module.state_dict()
    images = torch.rand(2, 3, 20, 20)
    program = torch.export.export(
        module, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    assert torch.equal(program.module()(images[:1]), module(images[:1]))


@pytest.mark.parametrize("kind", ["flip", "multi-scale"])
def test_autocast_does_not_change_views(kind: str) -> None:
    module, images = views(kind), random_images(2, 20, 20).permute(0, 3, 1, 2).float()
    with torch.autocast("cpu", torch.bfloat16):
        cut = module(images)
    assert torch.equal(cut, module(images))


def test_everything_stays_on_the_device_of_the_images() -> None:
    """On the meta device, where using a tensor of the CPU is an error; the generator is there."""
    images = torch.empty(2, 20, 30, 3, dtype=torch.uint8, device="meta")
    square = resize_square(images, 20, "crop")
    augmented = Augment(PAPER)(square, torch.Generator().manual_seed(0))
    cut = views("multi-scale").to("meta")(augmented)
    assert [x.device.type for x in (square, augmented, cut)] == ["meta"] * 3
