"""Test-time views of an image: crops, mirror images and scales whose softmaxes are averaged (paper section 4.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from threefold.errors import RecipeError
from threefold.models__resize import triangle_weights
from threefold.recipe_schema import ViewSpec

SCALES = (1.0, 0.9, 0.8)
"""Shares of the canvas that the multi-scale views look at."""


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
