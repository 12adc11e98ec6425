"""Newer families and the BiRNN and BiGRU heads build, learn and export with random weights.

These tests use the smallest network of each family, with the heads that the paper lists as future
work. `test_backbones.py` (long) has the networks of the recipe `beyond`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.networks import coarse_pictures, learn, pipeline_of, settle

from threefold.exporting import targets
from threefold.models.member import build_member
from threefold.models.pipeline import to_pixels
from threefold.recipe.lookup import packaged
from threefold.recipe.schema import HeadSpec, MemberSpec
from threefold.runtime.tolerances import TOLERANCES

FAMILIES = ("efficientnetv2", "convnext", "vit")


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        ("test_efficientnet", HeadSpec(kind="birnn", units=16, fc=16, sequence="rows")),
        pytest.param(
            "test_efficientnet",
            HeadSpec(kind="bigru", units=16, sequence="spatial"),
            marks=pytest.mark.slow,
        ),
        pytest.param("convnext_atto", HeadSpec(kind="linear", fc=16), marks=pytest.mark.slow),
        pytest.param(
            "vit_tiny_patch16_224", HeadSpec(kind="bigru", units=16, fc=16), marks=pytest.mark.slow
        ),
        pytest.param(
            "vit_tiny_patch16_224", HeadSpec(kind="birnn", units=16), marks=pytest.mark.slow
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.kind}-{value.sequence}",
)
def test_a_backbone_builds_learns_and_exports(
    backbone: str, head: HeadSpec, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    spec = MemberSpec(name="m", backbone=backbone, weights="none", img_size=64, head=head)
    member = build_member(spec, 3)
    pictures = coarse_pictures(64)
    pixels = to_pixels(pictures, torch.device("cpu"))
    learn(member, pixels)
    settle(member, pixels)

    report = targets.export(pipeline_of(member, 64), tmp_path / "m.onnx", list(pictures))

    assert report.max_difference <= TOLERANCES["float32"].difference
    assert report.top1_agreement == 1.0


def test_the_recipe_beyond_has_every_family_and_head() -> None:
    recipe = packaged("beyond")

    for member, family in zip(recipe.members, FAMILIES, strict=True):
        assert family[:3] in member.backbone
    assert [m.head.kind for m in recipe.members] == ["birnn", "linear", "bigru"]
    with torch.device("meta"):
        for member in recipe.members:
            build_member(member.model_copy(update={"weights": "none"}), 3, pretrained=False)
