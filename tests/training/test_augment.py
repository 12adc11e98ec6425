"""Training augmentation: the warp against SciPy and keras-preprocessing, draws, offsets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from support.images import random_images

from threefold.models.resize import resize_square
from threefold.models.views import Views
from threefold.recipe.schema import AugmentSpec, ViewSpec
from threefold.training.steps.augment import Augment, Draws, affine_warp, shift_channels

PAPER = AugmentSpec(
    rotation=30, shift=0.3, shear=0.3, zoom=0.3, channel_shift=10, hflip=True, vflip=True
)


def keras_matrix(
    angle: float,
    shift: tuple[float, float],
    shear: float,
    zoom: tuple[float, float],
    height: int,
    width: int,
) -> np.ndarray:
    """Return keras-preprocessing's R T S Z on (row, column, 1), about the grid's centre."""
    rotation = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    move = np.array([[1, 0, shift[0] * height], [0, 1, shift[1] * width], [0, 0, 1]])
    slant = np.array([[1, -np.sin(shear), 0], [0, np.cos(shear), 0], [0, 0, 1]])
    scale = np.diag([zoom[0], zoom[1], 1])
    middle = np.array([[1, 0, (height - 1) / 2], [0, 1, (width - 1) / 2], [0, 0, 1]])
    return middle @ rotation @ move @ slant @ scale @ np.linalg.inv(middle)


def crop_matrix(size: np.ndarray, centre: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the map of a position in the stretched crop to the one in the image."""
    sides = np.array([height, width])
    corner = (centre + 1 - size) / 2 * sides  # pixel edges, where pixel 0 begins at 0
    matrix = np.diag([*size, 1.0])
    matrix[:2, 2] = corner + 0.5 * size - 0.5
    return matrix


def scipy_warp(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    linear, offset = matrix[:2, :2], matrix[:2, 2]
    return np.stack(
        [ndimage.affine_transform(c, linear, offset, order=1, mode="nearest") for c in image]
    )


@pytest.mark.parametrize(("height", "width"), [(24, 24), (20, 31)])
@pytest.mark.parametrize("seed", range(4))
def test_warp_is_scipys_and_keras(height: int, width: int, seed: int) -> None:
    """Equal everywhere, borders included, within 1e-3 of the 0..255 scale; crops too."""
    rng = np.random.default_rng(seed)
    images = rng.uniform(0, 255, size=(5, 3, height, width))
    angle, shear = rng.uniform(-np.pi, np.pi, size=5), rng.uniform(-0.8, 0.8, size=5)
    shift = rng.uniform(-0.4, 0.4, size=(5, 2))
    zoom = rng.uniform(0.6, 1.4, size=(5, 2)) * [1, (-1) ** seed]
    size = rng.uniform(0.5, 1.0, size=(5, 2))
    centre = rng.uniform(-1, 1, size=(5, 2)) * (1 - size)
    crops = [(np.ones((5, 2)), np.zeros((5, 2))), (size, centre)]
    parts = (angle, shift, shear, zoom, np.zeros(5))

    for crop_size, crop_centre in crops:
        draws = Draws(
            *(torch.from_numpy(part).float() for part in (*parts, crop_size, crop_centre)),
            seed=torch.zeros(5, dtype=torch.int64),
        )
        warped = affine_warp(torch.from_numpy(images).float(), draws).numpy()

        for i in range(5):
            warp = keras_matrix(angle[i], tuple(shift[i]), shear[i], tuple(zoom[i]), height, width)
            crop = crop_matrix(crop_size[i], crop_centre[i], height, width)
            assert np.abs(warped[i] - scipy_warp(images[i], crop @ warp)).max() < 1e-3 * 255


def test_flips_are_mirror_images() -> None:
    images = random_images(64, 9, 12).permute(0, 3, 1, 2)

    def equal(augmented: torch.Tensor, expected: torch.Tensor) -> np.ndarray:
        pairs = zip(augmented, expected.float(), strict=True)
        return np.array([torch.allclose(a, e, atol=0.02) for a, e in pairs])

    for options, axis in (({"hflip": True}, 3), ({"vflip": True}, 2)):
        augmented = Augment(AugmentSpec(**options))(images, torch.Generator().manual_seed(0))

        flipped, unchanged = equal(augmented, images.flip(axis)), equal(augmented, images)
        assert (flipped != unchanged).all()
        assert 16 < flipped.sum() < 48


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
    second = augment(images.float(), torch.Generator().manual_seed(5))

    assert torch.equal(first, second)
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(6)))
    assert torch.equal(images, before)
    copies = augment(images[:1].expand(4, -1, -1, -1), torch.Generator().manual_seed(5))
    assert all(not torch.equal(copies[0], other) for other in copies[1:])
    assert float(first.min()) >= 0.0
    assert float(first.max()) <= 255.001


def test_draws_fill_their_ranges() -> None:
    """Ranges and units are the authors': degrees, shares of the side, scale about 1, 0..255."""
    draws = Augment(PAPER).draw(20_000, torch.Generator().manual_seed(0))

    assert [tuple(part.shape[1:]) for part in draws[:5]] == [(), (2,), (), (2,), ()]
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


def test_draws_are_independent() -> None:
    draws = Augment(PAPER).draw(20_000, torch.Generator().manual_seed(0))

    scale, flips = draws.zoom.abs(), (draws.zoom < 0).float()
    columns = [draws.angle, *draws.shift.T, draws.shear, *scale.T, *flips.T, draws.channel]
    correlations = torch.corrcoef(torch.stack(columns))
    assert float((correlations - torch.eye(9)).abs().max()) < 0.04


def test_an_option_does_not_change_the_draws_of_others() -> None:
    two = AugmentSpec(rotation=30, channel_shift=10)

    all_on, few = (Augment(spec).draw(6, torch.Generator().manual_seed(0)) for spec in (PAPER, two))

    assert torch.equal(all_on.angle, few.angle)
    assert torch.equal(all_on.channel, few.channel)
    assert torch.equal(few.zoom, torch.ones(6, 2))
    assert not few.shift.any()


def test_channel_shift_keeps_to_the_range_of_the_image() -> None:
    values = torch.tensor([[10.0, 100.0, 200.0], [0.0, 5.0, 8.0]])
    images = values.view(2, 3, 1, 1).expand(2, 3, 2, 2)

    shifted = shift_channels(images, torch.tensor([50.0, -6.0]))

    assert shifted[0, :, 0, 0].tolist() == [60.0, 150.0, 200.0]
    assert shifted[1, :, 0, 0].tolist() == [0.0, 0.0, 2.0]
    augmented = Augment(AugmentSpec(channel_shift=20))(images, torch.Generator().manual_seed(0))
    assert not torch.equal(augmented, images)
    low, high = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
    assert torch.equal(augmented.clamp(low, high), augmented)


TODAY = [
    {"crop": 0.3},
    {"policy": "randaugment"},
    {"policy": "trivialaugment"},
    {"color": 0.4},
    {"crop": 0.3, "policy": "randaugment", "color": 0.4},
]


@pytest.mark.parametrize("options", TODAY)
def test_random_transforms_depend_only_on_the_generator(options: dict[str, object]) -> None:
    images = random_images(6, 16, 20).permute(0, 3, 1, 2)
    before = images.clone()
    augment = Augment(AugmentSpec(**options))
    torch.manual_seed(1)
    state = torch.get_rng_state()

    first = augment(images, torch.Generator().manual_seed(5))
    unchanged = torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = augment(images.float(), torch.Generator().manual_seed(5))

    assert unchanged
    assert torch.equal(images, before)
    assert first.shape == images.shape
    assert torch.equal(first, second)
    assert not torch.equal(first, augment(images, torch.Generator().manual_seed(6)))
    copies = augment(images[:1].expand(6, -1, -1, -1), torch.Generator().manual_seed(5))
    assert any(not torch.equal(copies[0], other) for other in copies[1:])


def test_an_images_pixels_do_not_depend_on_its_batch() -> None:
    """What the images before it in the batch draw does not move an image's own draws."""
    images = random_images(6, 16, 20).permute(0, 3, 1, 2)
    augment = Augment(AugmentSpec(crop=0.3, policy="trivialaugment", color=0.4))
    others = torch.cat([random_images(5, 16, 20).flip(0).permute(0, 3, 1, 2), images[5:]])

    last = augment(images, torch.Generator().manual_seed(0))[5]

    assert torch.equal(augment(others, torch.Generator().manual_seed(0))[5], last)


@pytest.mark.parametrize("crop", [0.05, 0.7])
def test_crops_lie_in_the_image_and_have_the_named_areas(crop: float) -> None:
    """Area and logarithm of the ratio are uniform where all ratios fit, as in torchvision."""
    draws = Augment(AugmentSpec(crop=crop)).draw(20_000, torch.Generator().manual_seed(0))

    height, width = draws.crop_size.unbind(1)
    area, ratio = height * width, width / height
    assert float(area.min()) >= crop - 1e-6
    assert float(draws.crop_size.max()) <= 1.0
    assert float((draws.crop_centre.abs() + draws.crop_size).max()) <= 1.0 + 1e-6
    assert 0.75 - 1e-6 <= float(ratio.min()) < 0.77
    assert 1.3 < float(ratio.max()) <= 4 / 3 + 1e-6
    fits_any_ratio = area < 0.74
    log_ratio = ratio[fits_any_ratio].log() / np.log(4 / 3)
    assert abs(float(log_ratio.mean())) < 0.05
    assert abs(float(log_ratio.std()) - 1 / np.sqrt(3)) < 0.02
    places = draws.crop_centre[height < 0.9] / (1 - draws.crop_size[height < 0.9])
    assert float(places[:, 0].abs().max()) > 0.99
    assert abs(float(places[:, 0].mean())) < 0.03


@pytest.mark.parametrize("options", [{"crop": 0.3, "hflip": True, "rotation": 10.0}, *TODAY])
def test_drawn_alone_or_together_an_image_has_the_same_pixels(options: dict[str, object]) -> None:
    """Cached copies are made in batches of any size, and must not depend on them."""
    images = random_images(17, 16, 20).permute(0, 3, 1, 2)
    augment = Augment(AugmentSpec(**options))

    def augmented(rows: range) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return augment.apply(images[rows.start : rows.stop], augment.draw_each(generators))

    together = augmented(range(17))

    for rows in (range(1), range(3, 8), range(1, 17)):
        assert torch.equal(augmented(rows), together[rows.start : rows.stop])


def test_crops_show_a_part_of_the_image_of_the_named_area() -> None:
    """Each position holds its own row and column, so a crop tells which part it shows."""
    side = 64
    line = torch.arange(side, dtype=torch.uint8) * 3
    place = torch.stack(
        [line.expand(side, side), line.expand(side, side).T, line.expand(side, side)]
    )
    images = place.expand(200, -1, -1, -1)

    crops = Augment(AugmentSpec(crop=0.25))(images, torch.Generator().manual_seed(0)) / 3

    width, height = (
        crops[:, channel].amax((1, 2)) - crops[:, channel].amin((1, 2)) for channel in (0, 1)
    )
    areas, ratios = width * height / side**2, width / height
    assert 0.18 < float(areas.min()) < 0.32
    assert 0.85 < float(areas.max()) <= 1.0
    assert 0.68 < float(ratios.min()) < 0.8
    assert 1.25 < float(ratios.max()) < 1.45


def test_new_transforms_leave_the_papers_warp_alone() -> None:
    images = random_images(4, 16, 16).permute(0, 3, 1, 2)

    off = Augment(PAPER)(images, torch.Generator().manual_seed(3))
    warped = affine_warp(images.float(), Augment(PAPER).draw(4, torch.Generator().manual_seed(3)))

    draws = Augment(PAPER).draw(4, torch.Generator().manual_seed(3))
    assert torch.equal(off, shift_channels(warped, draws.channel))


def test_everything_stays_on_the_device_of_the_images() -> None:
    """On the meta device, mixing with a tensor of the CPU is an error."""
    images = torch.empty(2, 20, 30, 3, dtype=torch.uint8, device="meta")

    square = resize_square(images, 20, "crop")
    augmented = Augment(PAPER)(square, torch.Generator().manual_seed(0))
    cut = Views(ViewSpec(kind="multi-scale", upsample=1.25), 16, 0).to("meta")(augmented)

    assert [x.device.type for x in (square, augmented, cut)] == ["meta"] * 3
