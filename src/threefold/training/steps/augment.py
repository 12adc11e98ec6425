"""Training augmentation: today's by torchvision, then the paper's affine warp and offset.

It works on tensors in 0..255 on any device, each image independently. Random erasing, mixup and
cutmix, which work on batches, are in `batch_augmentation`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from threefold.recipe.schema import AugmentSpec
from threefold.training.distributed.sharing import Share

FILL = (124.0, 116.0, 104.0)
"""Mean colour of ImageNet, which fills what a policy's rotations and shifts leave empty."""

RATIOS = (3 / 4, 4 / 3)
"""Least and largest ratio of the width of a random crop to its height (Szegedy et al., 2015)."""


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


class Augment:
    """Augment training images.

    First come a random resized crop, a policy and changes of colour, where the recipe has them (see
    `RandomTransforms`). Then comes the paper's augmentation (section 4.1; values from the authors'
    code): rotation, shift, shear, zoom and flips are one affine map, so that pixels are
    interpolated only once. Positions outside the image repeat its edge. Last, one offset per image
    is added, clipped to the range of that image.
    """

    def __init__(self, spec: AugmentSpec) -> None:
        self.spec = spec
        self.transforms = RandomTransforms(spec)

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
        spec, pixels = self.spec, self.transforms(images, generator, share).float()
        if spec.rotation or spec.shift or spec.shear or spec.zoom or spec.hflip or spec.vflip:
            pixels = affine_warp(pixels, Draws(*(part.to(images.device) for part in draws)))
        if spec.channel_shift:
            pixels = shift_channels(pixels, draws.channel.to(images.device))
        return pixels

    def draw(self, count: int, generator: torch.Generator) -> Draws:
        """Draw parameters for `count` images.

        Each option has its own column of random numbers, so switching one on does not change the
        draws of the others.
        """
        uniform = torch.rand((count, 9), generator=generator, device=generator.device)
        spread = 2.0 * uniform - 1.0
        flips = torch.tensor(
            [0.5 * self.spec.vflip, 0.5 * self.spec.hflip], device=generator.device
        )
        return Draws(
            angle=torch.deg2rad(spread[:, 0] * self.spec.rotation),
            shift=spread[:, 1:3] * self.spec.shift,
            shear=torch.deg2rad(spread[:, 3] * self.spec.shear),
            zoom=(1.0 + spread[:, 4:6] * self.spec.zoom)
            * torch.where(uniform[:, 6:8] < flips, -1.0, 1.0),
            channel=spread[:, 8] * self.spec.channel_shift,
        )


class RandomTransforms:
    """Random resized crop, RandAugment or TrivialAugment, and changes of colour, by torchvision.

    RandAugment takes two operations of magnitude 9 of 30 (Cubuk et al., 2020, arXiv:1909.13719);
    TrivialAugment one of any magnitude, from its wide ranges (Mueller and Hutter, 2021,
    arXiv:2103.10158).
    """

    def __init__(self, spec: AugmentSpec) -> None:
        self.spec = spec

    def __call__(
        self, images: Tensor, generator: torch.Generator, share: Share | None = None
    ) -> Tensor:
        """Transform each image of a batch with random numbers of its own.

        Args:
            images: uint8 or float (b, 3, h, w), whole numbers in 0..255.
            generator: gives each image its seed. The global generators stay as they are.
            share: what the images are a part of; None = they are the batch.

        Returns:
            uint8 (b, 3, h, w); the images themselves if the recipe has no such transform.
        """
        transforms = self._transforms(images.shape[2:])
        if not transforms:
            return images
        transform, pixels = v2.Compose(transforms), images.to(torch.uint8)
        count = len(images) if share is None else share.images
        seeds = torch.randint(2**62, (count,), generator=generator, device=generator.device)
        if share is not None:
            seeds = seeds[torch.from_numpy(share.positions).to(seeds.device)]
        augmented = torch.empty_like(pixels)
        with torch.random.fork_rng(devices=[]):
            for i, seed in enumerate(seeds.tolist()):
                # torchvision draws from the global generator of the CPU.
                torch.default_generator.manual_seed(seed)
                augmented[i] = transform(pixels[i])
        return augmented

    def _transforms(self, size: torch.Size) -> list[nn.Module]:
        spec, transforms = self.spec, list[nn.Module]()
        if spec.crop < 1:
            transforms.append(v2.RandomResizedCrop(tuple(size), (spec.crop, 1.0), RATIOS))
        options = {"interpolation": InterpolationMode.BILINEAR, "fill": list(FILL)}
        if spec.policy == "randaugment":
            transforms.append(v2.RandAugment(**options))
        elif spec.policy == "trivialaugment":
            transforms.append(v2.TrivialAugmentWide(**options))
        if spec.color:
            transforms.append(v2.ColorJitter(spec.color, spec.color, spec.color))
        return transforms


def affine_warp(images: Tensor, draws: Draws) -> Tensor:
    """Warp images as keras-preprocessing does: output pixel p reads position R (T (S (Z p))).

    Positions are (row, column) from the centre of the pixel grid, (side - 1) / 2; versions of
    keras-preprocessing before 1.1.1 turned about a point one pixel off it.
    R = [[cos a, -sin a], [sin a, cos a]], T adds the shift, S = [[1, -sin s], [0, cos s]], and Z
    scales (above 1 the content shrinks) and flips. Hence
    R S = [[cos a, -sin(a + s)], [sin a, cos(a + s)]].

    Args:
        images: float (b, c, h, w).
        draws: parameters on the same device, of which `channel` is not used.

    Returns:
        float (b, c, h, w), bilinear, edges repeated.
    """
    height, width = images.shape[2:]
    cos, sin = draws.angle.cos(), draws.angle.sin()
    cos_sheared, sin_sheared = (draws.angle + draws.shear).cos(), (draws.angle + draws.shear).sin()
    rows, columns = draws.shift[:, 0] * height, draws.shift[:, 1] * width
    # grid_sample's coordinates run from -1 to 1, so a pixel is 2 / height or 2 / width. affine_grid
    # would do this with a matrix product, which TF32 and autocast round.
    down = _column((torch.arange(height, device=images.device) + 0.5) * 2.0 / height - 1.0, 1)
    along = _column((torch.arange(width, device=images.device) + 0.5) * 2.0 / width - 1.0, 2)
    down, along = down * _column(draws.zoom[:, 0]), along * _column(draws.zoom[:, 1])
    read_row = (
        _column(cos) * down
        - _column(sin_sheared * width / height) * along
        + _column((cos * rows - sin * columns) * 2.0 / height)
    )
    read_column = (
        _column(sin * height / width) * down
        + _column(cos_sheared) * along
        + _column((sin * rows + cos * columns) * 2.0 / width)
    )
    grid = torch.stack((read_column, read_row), dim=3)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _column(values: Tensor, dim: int = 0) -> Tensor:
    """Reshape a vector to lie along axis `dim` of a (b, h, w) array."""
    shape = [1, 1, 1]
    shape[dim] = -1
    return values.view(shape)


def shift_channels(images: Tensor, offsets: Tensor) -> Tensor:
    """Add one offset (b,) to each image (b, c, h, w), clipped to the range of that image."""
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    return torch.clamp(images + offsets.view(-1, 1, 1, 1), low, high)
