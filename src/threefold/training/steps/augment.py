"""Training augmentation: torchvision's policies, one affine map with the crop in it, an offset.

It works on tensors in 0..255 on any device, each image independently. Random erasing, mixup and
cutmix, which work on batches, are in `batch_augmentation`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from threefold.recipe.schema import AugmentSpec
from threefold.training.distributed.sharing import Share

FILL = (124.0, 116.0, 104.0)
"""Mean colour of ImageNet, which fills what a policy's rotations and shifts leave empty."""

RATIOS: Final = (3 / 4, 4 / 3)
"""Least and largest ratio of the width of a random crop to its height (Szegedy et al., 2015)."""

CROP_TRIES: Final = 10
"""Crops that are drawn until one lies in the image, as in torchvision; then it is the image."""

AUGMENT_VERSION: Final = 2
"""Other versions make other pixels of the same seed. Part of the key of cached copies."""


class Draws(NamedTuple):
    """One set of augmentation parameters per image."""

    angle: Tensor
    """Rotation (b,), radians."""
    shift: Tensor
    """Shift of rows and columns (b, 2), shares of the height and the width."""
    shear: Tensor
    """Shear angle (b,), radians."""
    zoom: Tensor
    """Scale of rows and columns (b, 2); negative where the axis is flipped."""
    channel: Tensor
    """Offset of all values (b,), on the 0..255 scale."""
    crop_size: Tensor
    """Height and width of the crop (b, 2), shares of the image's."""
    crop_centre: Tensor
    """Row and column of the centre of the crop (b, 2), from -1 to 1 across the image."""
    seed: Tensor
    """Seed of the random transforms (b,), int64; zeros without them."""


class Augment:
    """Augment training images.

    First come a policy and changes of colour, where the recipe has them (see `RandomTransforms`).
    Then comes the paper's augmentation (section 4.1; values from the authors' code): rotation,
    shift, shear, zoom and flips are one affine map, which also reads from the random resized crop,
    so that pixels are interpolated only once. Positions outside the image repeat its edge. Last,
    one offset per image is added, clipped to the range of that image.
    """

    def __init__(self, spec: AugmentSpec) -> None:
        self.spec = spec
        self.transforms = RandomTransforms(spec)
        self.warps = bool(
            spec.rotation
            or spec.shift
            or spec.shear
            or spec.zoom
            or spec.hflip
            or spec.vflip
            or spec.crop < 1
        )

    def __call__(
        self, images: Tensor, generator: torch.Generator, share: Share | None = None
    ) -> Tensor:
        """Augment a batch, each image independently.

        Args:
            images: uint8 or float (b, 3, h, w), values 0..255.
            generator: the only source of randomness, on any device.
            share: what the images are a part of: numbers are drawn for the whole, so that they have
                the same ones in one process; None = they are the batch.

        Returns:
            float32 (b, 3, h, w), values 0..255.
        """
        draws = self.draw(len(images) if share is None else share.images, generator)
        if share is not None:
            own = torch.from_numpy(share.positions).to(generator.device)
            draws = Draws(*(part[own] for part in draws))
        return self.apply(images, draws)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Augment images with parameters that were drawn before.

        Args:
            images: uint8 or float (b, 3, h, w), values 0..255.
            draws: of each image, on any device.

        Returns:
            float32 (b, 3, h, w), values 0..255.
        """
        pixels = self.transforms(images, draws.seed).float()
        draws = Draws(*(part.to(images.device) for part in draws))
        if self.warps:
            pixels = affine_warp(pixels, draws)
        if self.spec.channel_shift:
            pixels = shift_channels(pixels, draws.channel)
        return pixels

    def draw(self, count: int, generator: torch.Generator) -> Draws:
        """Draw parameters for `count` images.

        Each of the paper's options has its own column of random numbers, so switching one on does
        not change the draws of the others.
        """
        uniform = torch.rand((count, 9), generator=generator, device=generator.device)
        spread = 2.0 * uniform - 1.0
        flips = torch.tensor(
            [0.5 * self.spec.vflip, 0.5 * self.spec.hflip], device=generator.device
        )
        size, centre = self._draw_crops(count, generator)
        return Draws(
            angle=torch.deg2rad(spread[:, 0] * self.spec.rotation),
            shift=spread[:, 1:3] * self.spec.shift,
            shear=torch.deg2rad(spread[:, 3] * self.spec.shear),
            zoom=(1.0 + spread[:, 4:6] * self.spec.zoom)
            * torch.where(uniform[:, 6:8] < flips, -1.0, 1.0),
            channel=spread[:, 8] * self.spec.channel_shift,
            crop_size=size,
            crop_centre=centre,
            seed=self.transforms.draw(count, generator),
        )

    def draw_each(self, generators: Sequence[torch.Generator]) -> Draws:
        """Draw parameters for one image from each generator."""
        parts = [self.draw(1, generator) for generator in generators]
        return Draws(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _draw_crops(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the sizes and centres (b, 2) of random resized crops (Szegedy et al., 2015).

        The area and the logarithm of the ratio are uniform, and so is the place in the image.
        """
        device = generator.device
        if self.spec.crop == 1:
            return torch.ones(count, 2, device=device), torch.zeros(count, 2, device=device)
        uniform = torch.rand((count, CROP_TRIES, 2), generator=generator, device=device)
        area = self.spec.crop + (1.0 - self.spec.crop) * uniform[..., 0]
        low, high = map(math.log, RATIOS)
        ratio = torch.exp(low + (high - low) * uniform[..., 1])
        sizes = torch.stack([torch.sqrt(area / ratio), torch.sqrt(area * ratio)], 2)
        fits = (sizes <= 1.0).all(2)
        first = fits.int().argmax(1)
        size = sizes[torch.arange(count, device=device), first]
        size = torch.where(fits.any(1, keepdim=True), size, 1.0)
        place = torch.rand((count, 2), generator=generator, device=device)
        return size, (1.0 - size) * (2.0 * place - 1.0)


class RandomTransforms:
    """RandAugment or TrivialAugment, and changes of colour, by torchvision.

    RandAugment takes two operations of magnitude 9 of 30 (Cubuk et al., 2020, arXiv:1909.13719);
    TrivialAugment one of any magnitude, from its wide ranges (Mueller and Hutter, 2021,
    arXiv:2103.10158).
    """

    def __init__(self, spec: AugmentSpec) -> None:
        transforms: list[nn.Module] = []
        options = {"interpolation": InterpolationMode.BILINEAR, "fill": list(FILL)}
        if spec.policy == "randaugment":
            transforms.append(v2.RandAugment(**options))
        elif spec.policy == "trivialaugment":
            transforms.append(v2.TrivialAugmentWide(**options))
        if spec.color:
            transforms.append(v2.ColorJitter(spec.color, spec.color, spec.color))
        self.transform = v2.Compose(transforms) if transforms else None

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw a seed for each image, int64 (b,); zeros if there is nothing to transform."""
        if self.transform is None:
            return torch.zeros(count, dtype=torch.int64, device=generator.device)
        return torch.randint(2**62, (count,), generator=generator, device=generator.device)

    def __call__(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Transform each image of a batch with random numbers of its own.

        Args:
            images: uint8 or float (b, 3, h, w), whole numbers in 0..255.
            seeds: int64 (b,). The global generators stay as they are.

        Returns:
            uint8 (b, 3, h, w); the images themselves if the recipe has no such transform.
        """
        if self.transform is None:
            return images
        pixels = images.to(torch.uint8)
        augmented = torch.empty_like(pixels)
        with torch.random.fork_rng(devices=[]):
            for i, seed in enumerate(seeds.tolist()):
                # torchvision draws from the global generator of the CPU.
                torch.default_generator.manual_seed(seed)
                augmented[i] = self.transform(pixels[i])
        return augmented


def affine_warp(images: Tensor, draws: Draws) -> Tensor:
    """Warp crops as keras-preprocessing does: output pixel p reads position R (T (S (Z p))).

    Positions are (row, column) from the centre of the pixel grid, (side - 1) / 2; versions of
    keras-preprocessing before 1.1.1 turned about a point one pixel off it.
    R = [[cos a, -sin a], [sin a, cos a]], T adds the shift, S = [[1, -sin s], [0, cos s]], and Z
    scales (above 1 the content shrinks) and flips. Hence
    R S = [[cos a, -sin(a + s)], [sin a, cos(a + s)]]. That position is one in the crop, stretched
    to the size of the image; what lies around the crop is read where the warp leaves it.

    Args:
        images: float (b, c, h, w).
        draws: parameters on the same device, of which `channel` and `seed` are not used.

    Returns:
        float (b, c, h, w), bilinear, edges repeated.
    """
    height, width = images.shape[2:]
    cos, sin = draws.angle.cos(), draws.angle.sin()
    cos_sheared, sin_sheared = (draws.angle + draws.shear).cos(), (draws.angle + draws.shear).sin()
    rows, columns = draws.shift[:, 0] * height, draws.shift[:, 1] * width
    crop_height, crop_width = draws.crop_size.unbind(1)
    crop_row, crop_column = draws.crop_centre.unbind(1)
    # grid_sample's coordinates run from -1 to 1, so a pixel is 2 / height or 2 / width. affine_grid
    # would do this with a matrix product, which TF32 and autocast round.
    down = (torch.arange(height, device=images.device) + 0.5) * 2.0 / height - 1.0
    along = (torch.arange(width, device=images.device) + 0.5) * 2.0 / width - 1.0
    down, along = draws.zoom[:, :1] * down, draws.zoom[:, 1:] * along
    down, along = down[:, :, None], along[:, None, :]
    # A sum of what depends on the row and what depends on the column: two numbers for each pixel
    # are all that is as large as the images.
    row_down = _column(crop_height * cos) * down
    row_down += _column(crop_row + crop_height * (cos * rows - sin * columns) * 2.0 / height)
    row_along = _column(crop_height * -sin_sheared * width / height) * along
    column_down = _column(crop_width * sin * height / width) * down
    column_down += _column(crop_column + crop_width * (sin * rows + cos * columns) * 2.0 / width)
    column_along = _column(crop_width * cos_sheared) * along
    grid = torch.stack((column_down + column_along, row_down + row_along), dim=3)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _column(values: Tensor) -> Tensor:
    """Reshape a vector (b,) to (b, 1, 1)."""
    return values[:, None, None]


def shift_channels(images: Tensor, offsets: Tensor) -> Tensor:
    """Add one offset (b,) to each image (b, c, h, w), clipped to the range of that image."""
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    return torch.clamp(images + offsets.view(-1, 1, 1, 1), low, high)
