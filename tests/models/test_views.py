"""Test-time views: their positions, their number, and what they leave unchanged."""

from __future__ import annotations

import pytest
import torch
from support.images import random_images

from threefold.errors import RecipeError
from threefold.models.views import Views
from threefold.recipe.schema import ViewSpec


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
    images = random_images(2, 20, 20).permute(0, 3, 1, 2).float()

    cut = module(images)

    assert module.canvas == 20
    assert module.count == count
    assert cut.shape == (count, 2, 3, 16, 16)
    assert torch.equal(cut, module(images))
    assert len({view.numpy().tobytes() for view in cut}) == count  # no two views are equal


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

    cut = views("multi-scale")(images)

    for view, side in zip(cut, (20, 18, 16), strict=True):
        edge = (20 - side) // 2
        crop = images[:, :, edge : edge + side, edge : edge + side]
        expected = torch.nn.functional.interpolate(
            crop, size=16, mode="bilinear", antialias=True, align_corners=False
        )
        torch.testing.assert_close(view, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", ["center", "ten-crop", "multi-scale"])
def test_views_export_and_add_nothing_to_the_state(kind: str) -> None:
    module, images = views(kind), torch.rand(2, 3, 20, 20)

    program = torch.export.export(
        module, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )

    assert not module.state_dict()
    assert torch.equal(program.module()(images[:1]), module(images[:1]))


@pytest.mark.parametrize("kind", ["flip", "multi-scale"])
def test_autocast_does_not_change_views(kind: str) -> None:
    module, images = views(kind), random_images(2, 20, 20).permute(0, 3, 1, 2).float()

    with torch.autocast("cpu", torch.bfloat16):
        cut = module(images)

    assert torch.equal(cut, module(images))
