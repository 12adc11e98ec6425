"""Newer families and the BiRNN and BiGRU heads build, learn and export with fresh weights.

Here the smallest network of each family does, under the heads that the paper lists as future work.
The whole networks of the recipe `beyond` do in `test_backbones.py` (long).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.networks import coarse_pictures, learn, pipeline_of, settle

from threefold.exporting import targets
from threefold.exporting.parity import TOLERANCES
from threefold.models.member import build_member
from threefold.models.pipeline import to_pixels
from threefold.recipe import packaged
from threefold.recipe_schema import HeadSpec, MemberSpec

SMALL = {
    "efficientnetv2": "test_efficientnet",
    "convnext": "convnext_atto",
    "vit": "vit_tiny_patch16_224",
}


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("efficientnetv2", HeadSpec(kind="birnn", units=16, fc=16, sequence="rows")),
        ("efficientnetv2", HeadSpec(kind="bigru", units=16, sequence="spatial")),
        pytest.param("convnext", HeadSpec(kind="linear", fc=16), marks=pytest.mark.slow),
        ("vit", HeadSpec(kind="bigru", units=16, fc=16)),
        pytest.param("vit", HeadSpec(kind="birnn", units=16), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.kind}-{value.sequence}",
)
def test_it_builds_learns_and_exports(family: str, head: HeadSpec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = MemberSpec(name="m", backbone=SMALL[family], weights="none", img_size=64, head=head)
    member = build_member(spec, 3)
    pictures = coarse_pictures(64)
    pixels = to_pixels(pictures, torch.device("cpu"))
    learn(member, pixels)
    settle(member, pixels)
    report = targets.export(pipeline_of(member, 64), tmp_path / "m.onnx", list(pictures))
    assert report.max_difference <= TOLERANCES["float32"].difference
    assert report.top1_agreement == 1.0


def test_the_recipe_names_what_it_promises() -> None:
    recipe = packaged("beyond")
    assert [
        family for m, family in zip(recipe.members, SMALL, strict=True) if family[:3] in m.backbone
    ] == list(SMALL)
    assert [m.head.kind for m in recipe.members] == ["birnn", "linear", "bigru"]
    with torch.device("meta"):
        for member in recipe.members:
            build_member(member.model_copy(update={"weights": "none"}), 3, pretrained=False)
