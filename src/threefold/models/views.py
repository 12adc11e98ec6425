"""Test-time views: crops, mirror images and scales of an image (paper section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from threefold.errors import RecipeError
from threefold.models.resize import triangle_weights
from threefold.recipe.schema import ViewSpec

SCALES = (1.0, 0.9, 0.8)
"""Sides of the multi-scale views, as shares of the canvas."""


class Views(nn.Module):
    """Cut test-time views out of images (paper section 4.3); the caller averages their softmaxes.

    `center` is the centre of the canvas; `flip` adds its mirror image. `random-crops` are n
    different crops, the same for all images and at every call. `five-crop` is the centre and the
    corners; `ten-crop` adds their mirror images. `multi-scale` is the centred 1.0, 0.9 and 0.8 of
    the canvas, resized.

    Args:
        spec: kind and number of the views, and the side of the canvas relative to `img_size`.
        img_size: side of each view in pixels.
        seed: fixes the random crops.
        count: use only the first views; None = all, 0 = the whole image at `img_size`.

    Raises:
        RecipeError: the canvas has no room for different crops.
    """

    def __init__(self, spec: ViewSpec, img_size: int, seed: int, count: int | None = None) -> None:
        super().__init__()
        if count == 0:
            spec = ViewSpec()
        self.kind, self.img_size, self._first = spec.kind, img_size, count or None
        self._canvas = round(img_size * spec.upsample)
        self.corners = self._corners(spec.n, seed)
        """Top and left of each crop; mirror images are not listed."""
        if spec.kind == "multi-scale":
            places, weights = self._taps()
            self.register_buffer("places", places, persistent=False)
            self.register_buffer("weights", weights, persistent=False)

    @property
    def canvas(self) -> int:
        """Side of the images that `forward` takes, in pixels."""
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
        """Map images (b, 3, canvas, canvas) to views (v, b, 3, img_size, img_size)."""
        if self.kind == "multi-scale":
            scaled = []
            scales = zip(self.get_buffer("places"), self.get_buffer("weights"), strict=True)
            for places, weights in list(scales)[: self._first]:
                rows = _weighted_rows(images, places, weights)
                scaled.append(_weighted_rows(rows.mT, places, weights).mT)
            return torch.stack(scaled)
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
        """Compute the pixels that each pixel of a view reads, and their weights.

        Returns:
            Positions and weights, both (scales, taps, img_size).
        """
        sides = [round(self._canvas * scale) for scale in SCALES]
        spans = [
            (torch.tensor(float((self._canvas - side) // 2)), torch.tensor(float(side)))
            for side in sides
        ]
        matrices = torch.stack(
            [triangle_weights(self._canvas, *span, self.img_size) for span in spans]
        )
        taps = int((matrices > 0).sum(dim=2).max())
        weights, places = matrices.topk(taps, dim=2)
        return places.mT.contiguous(), weights.mT.contiguous()


def view_counts(spec: ViewSpec) -> tuple[int, ...]:
    """List the numbers of leading views among which a run can choose, in ascending order.

    Random crops: 1, 3, 5, 7, 9 (as in the paper) and n. Ten crops: 1, 5 and 10. Otherwise any
    number. 0 means the whole image, and is listed if views cut something off.
    """
    totals = {
        "center": 1,
        "flip": 2,
        "random-crops": spec.n,
        "five-crop": 5,
        "ten-crop": 10,
        "multi-scale": len(SCALES),
    }
    total = totals[spec.kind]
    choices = {"five-crop": (1, 5), "ten-crop": (1, 5, 10), "random-crops": (1, 3, 5, 7, 9, total)}
    counts = sorted({c for c in choices.get(spec.kind, range(1, total + 1)) if c <= total})
    return (0, *counts) if spec.upsample > 1.0 else tuple(counts)


def _weighted_rows(images: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Sum over taps of rows `places` (taps, size) times `weights`.

    This is not a matrix product, which autocast would round.
    """
    taps = zip(places, weights, strict=True)
    return torch.stack(
        [images.index_select(2, place) * weight.unsqueeze(1) for place, weight in taps]
    ).sum(dim=0)
