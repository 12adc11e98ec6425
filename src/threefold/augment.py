"""What happens to pixels: the square resize every image passes, the training augmentation, and the test-time views.

All of it works on float tensors that hold 0..255 and runs on any device. Erasing, mixup and cutmix are no part of the
paper's method and are not here: they act on batches with their labels, in the training loop.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from threefold.errors import RecipeError
from threefold.recipe import AugmentSpec, ViewSpec

WEIGHT_STEPS = 2**16
"""Resize weights are multiples of 1/65536. A product with an 8-bit pixel, and any sum of such products up to 255, is
then exact in float32, so the result depends neither on the order of summation nor on the runtime that does it."""

SCALES = (1.0, 0.9, 0.8)
"""Shares of the canvas that the multi-scale views look at."""


def resize_square(images: Tensor, size: int, mode: Literal["squash", "crop"]) -> Tensor:
    """Resize images to a square with an antialiased triangle filter (Pillow's BILINEAR).

    Two matrix products whose weights are computed from the height and width, hence exportable with both dynamic. Call
    it outside autocast and without TF32 matrix products, which would round the weights.

    Args:
        images: uint8 (b, h, w, 3).
        size: side of the result in pixels.
        mode: squash scales each side by itself; crop keeps the largest centred square.

    Returns:
        Tensor: float32 (b, 3, size, size) holding whole numbers in 0..255.
    """
    height = images.new_full((), images.shape[1], dtype=torch.float32)
    width = images.new_full((), images.shape[2], dtype=torch.float32)
    if mode == "crop":
        side = torch.minimum(height, width)
        across = triangle_weights(images.shape[2], torch.floor((width - side) / 2), side, size)
        down = triangle_weights(images.shape[1], torch.floor((height - side) / 2), side, size)
    else:
        across = triangle_weights(images.shape[2], torch.zeros_like(width), width, size)
        down = triangle_weights(images.shape[1], torch.zeros_like(height), height, size)
    pixels = images.permute(0, 3, 1, 2).float()
    return _whole(down @ _whole(pixels @ across.T))


def triangle_weights(length: int, start: Tensor, side: Tensor, size: int) -> Tensor:
    """Weights that resize the pixels start .. start + side of a line of `length` pixels to `size` pixels.

    Enlarging is linear interpolation between pixel centres with the edges held; reducing widens the triangle by the
    scale.

    Args:
        length: pixels in the line; may be symbolic under torch.export.
        start: scalar float32, first pixel used.
        side: scalar float32, number of pixels used.
        size: pixels in the result.

    Returns:
        Tensor: float32 (size, length); rows sum to 1 within length / WEIGHT_STEPS.
    """
    scale = side / size
    centres = start + (torch.arange(size, device=start.device, dtype=torch.float32) + 0.5) * scale
    positions = torch.arange(length, device=start.device, dtype=torch.float32) + 0.5
    distances = (positions - centres.unsqueeze(1)).abs() / scale.clamp(min=1.0)
    inside = ((positions > start) & (positions < start + side)).float()
    # Rounded before they are summed too: a sum of whole numbers is the same in every order.
    weights = torch.round((1.0 - distances).clamp(min=0.0) * inside * WEIGHT_STEPS)
    return torch.round(weights / weights.sum(dim=1, keepdim=True) * WEIGHT_STEPS) / WEIGHT_STEPS


def _whole(pixels: Tensor) -> Tensor:
    """Round half up, as Pillow does, and keep to 0..255."""
    return torch.floor(pixels + 0.5).clamp(0.0, 255.0)


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
    """The paper's training augmentation (section 4.1; values from the authors' code) as one bilinear warp per image.

    Rotation, shift, shear, zoom and flips become one affine map, so pixels are interpolated once and one grid serves
    all channels. What falls outside repeats the edge. Then one offset per image, clipped to that image's own range.
    """

    def __init__(self, spec: AugmentSpec) -> None:
        self.spec = spec

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch, each image by itself.

        Args:
            images: uint8 or float (b, 3, h, w), values 0..255.
            generator: the only source of randomness, on any device.

        Returns:
            Tensor: float32 (b, 3, h, w), values 0..255.
        """
        draws = self.draw(images.shape[0], generator)
        spec, pixels = self.spec, images.float()
        if spec.rotation or spec.shift or spec.shear or spec.zoom or spec.hflip or spec.vflip:
            pixels = affine_warp(pixels, Draws(*(part.to(images.device) for part in draws)))
        if spec.channel_shift:
            pixels = shift_channels(pixels, draws.channel.to(images.device))
        return pixels

    def draw(self, count: int, generator: torch.Generator) -> Draws:
        """Parameters for `count` images; each knob has its own column, so turning one on leaves the others' draws."""
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


def affine_warp(images: Tensor, draws: Draws) -> Tensor:
    """Warp images as keras-preprocessing does: output pixel p is read at R (T (S (Z p))), measured from the centre.

    R = [[cos a, -sin a], [sin a, cos a]] on (row, column), T adds the shift, S = [[1, -sin s], [0, cos s]], Z scales
    (more than 1 shrinks the picture) and flips; R S = [[cos a, -sin(a + s)], [sin a, cos(a + s)]]. The centre is that
    of the pixel grid, (side - 1) / 2; keras-preprocessing before 1.1.1 turned about a point one pixel off it.

    Args:
        images: float (b, c, h, w).
        draws: parameters on the same device; `channel` is not used.

    Returns:
        Tensor: float (b, c, h, w), bilinear, edges repeated.
    """
    height, width = images.shape[2:]
    cos, sin = draws.angle.cos(), draws.angle.sin()
    cos_sheared, sin_sheared = (draws.angle + draws.shear).cos(), (draws.angle + draws.shear).sin()
    rows, columns = draws.shift[:, 0] * height, draws.shift[:, 1] * width
    # grid_sample counts from -1 to 1 across the image: a pixel is 2 / height or 2 / width. The grid is made by sums and
    # not by affine_grid, whose matrix product would be rounded under TF32 or autocast.
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
    """Put the values of a vector along axis `dim` of a (b, h, w) array."""
    shape = [1, 1, 1]
    shape[dim] = -1
    return values.view(shape)


def shift_channels(images: Tensor, offsets: Tensor) -> Tensor:
    """Add one offset (b,) to each image (b, c, h, w), clipped to the range of values which that image has."""
    low, high = images.amin(dim=(1, 2, 3), keepdim=True), images.amax(dim=(1, 2, 3), keepdim=True)
    return torch.clamp(images + offsets.view(-1, 1, 1, 1), low, high)


class Views(nn.Module):
    """Test-time views of an image (paper section 4.3); the softmaxes of all views are averaged by the caller.

    `center`: the centre of the canvas. `flip`: that and its mirror image. `random-crops`: n different crops, the same
    for all images and at every call. `five-crop`: centre and corners. `ten-crop`: those and their mirror images.
    `multi-scale`: the centred 1.0, 0.9 and 0.8 of the canvas, resized. `count` keeps only the first views; 0 is the whole
    image at img_size, without any.

    Raises:
        RecipeError: the canvas has no room for the crops, which would all be the same.
    """

    def __init__(self, spec: ViewSpec, img_size: int, seed: int, count: int | None = None) -> None:
        super().__init__()
        if count == 0:
            spec = ViewSpec()
        self.kind, self.img_size, self._first = spec.kind, img_size, count or None
        self._canvas = round(img_size * spec.upsample)
        self.corners = self._corners(spec.n, seed)
        """Top and left of each crop, before mirroring."""
        if spec.kind == "multi-scale":
            places, weights = self._taps()
            self.register_buffer("places", places, persistent=False)
            self.register_buffer("weights", weights, persistent=False)

    @property
    def canvas(self) -> int:
        """Side to which images are resized before they enter `forward`, in pixels."""
        return self._canvas

    @property
    def count(self) -> int:
        """Number of views."""
        if self._first:
            return self._first
        if self.kind == "multi-scale":
            return len(SCALES)
        return len(self.corners) * (2 if self.kind in ("flip", "ten-crop") else 1)

    def forward(self, images: Tensor) -> Tensor:
        """Cut the views out of images (b, 3, canvas, canvas); returns (v, b, 3, img_size, img_size)."""
        if self.kind == "multi-scale":
            scales = list(zip(self.get_buffer("places"), self.get_buffer("weights"), strict=True))[
                : self._first
            ]
            return torch.stack(
                [_weighted_rows(_weighted_rows(images, *taps).mT, *taps).mT for taps in scales]
            )
        size = self.img_size
        views = [images[:, :, top : top + size, left : left + size] for top, left in self.corners]
        if self.kind in ("flip", "ten-crop"):
            views += [view.flip(3) for view in views]
        return torch.stack(views[: self._first])

    def _corners(self, count: int, seed: int) -> tuple[tuple[int, int], ...]:
        room = self._canvas - self.img_size
        centre = (room // 2, room // 2)
        if self.kind == "random-crops":
            places = (room + 1) ** 2
            if count > places:
                raise self._no_room(
                    f"{count} different crops", f"{places} in a canvas of {self._canvas} pixels"
                )
            order = torch.randperm(places, generator=torch.Generator().manual_seed(seed))[
                :count
            ].tolist()
            return tuple(divmod(place, room + 1) for place in order)
        if self.kind in ("five-crop", "ten-crop"):
            if room < 2:
                raise self._no_room("room to move the crop", f"a canvas of {self._canvas} pixels")
            return (centre, (0, 0), (0, room), (room, 0), (room, room))
        return (centre,)

    def _no_room(self, expected: str, got: str) -> RecipeError:
        fix = "set views.upsample above 1, for example 1.08"
        return RecipeError(
            f"views.kind = {self.kind}, img_size {self.img_size}",
            expected=expected,
            got=got,
            fix=fix,
        )

    def _taps(self) -> tuple[Tensor, Tensor]:
        """Pixels that each scale reads for each pixel of the view, and their weights; both (scales, taps, img_size)."""
        sides = [round(self._canvas * scale) for scale in SCALES]
        spans = [
            (torch.tensor(float((self._canvas - side) // 2)), torch.tensor(float(side)))
            for side in sides
        ]
        matrices = torch.stack(
            [triangle_weights(self._canvas, *span, self.img_size) for span in spans]
        )
        most = int((matrices > 0).sum(dim=2).max())
        weights, places = matrices.topk(most, dim=2)
        return places.mT.contiguous(), weights.mT.contiguous()


def view_counts(spec: ViewSpec) -> tuple[int, ...]:
    """The numbers of leading views to choose from, fewest first; 0 is the whole image, where crops would cut it.

    Of random crops 1, 3, 5, 7, 9 and n (the paper's), of ten crops one, five and ten, else any number.
    """
    n = {
        "center": 1,
        "flip": 2,
        "random-crops": spec.n,
        "five-crop": 5,
        "ten-crop": 10,
        "multi-scale": len(SCALES),
    }
    total = n[spec.kind]
    wanted = {"five-crop": (1, 5), "ten-crop": (1, 5, 10), "random-crops": (1, 3, 5, 7, 9, total)}
    counts = sorted({c for c in wanted.get(spec.kind, range(1, total + 1)) if c <= total})
    return (0, *counts) if spec.upsample > 1.0 else tuple(counts)


def _weighted_rows(images: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Sum over taps of rows `places` (taps, size) times `weights`; no matrix product, which autocast would round."""
    taps = zip(places, weights, strict=True)
    return torch.stack(
        [images.index_select(2, place) * weight.unsqueeze(1) for place, weight in taps]
    ).sum(dim=0)
