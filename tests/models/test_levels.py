"""Heads on several levels of a backbone: the features, their width, and the picture of evidence."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from threefold.errors import RecipeError
from threefold.models.gradcam import grad_cam
from threefold.models.member import build_member, head_inputs, levels_of
from threefold.recipe.schema import HeadSpec, MemberSpec, StageSpec
from threefold.training.features.activations import cached_blocks


def make_spec(backbone: str, **head: object) -> MemberSpec:
    spec = HeadSpec.model_validate({"kind": "linear", "sequence": "levels", **head})
    return MemberSpec(name="m", backbone=backbone, weights="none", img_size=64, head=spec)


@pytest.mark.parametrize(
    "backbone", ["test_efficientnet", "test_resnet", "test_convnext", "test_vit"]
)
def test_levels_are_pooled_intermediates_and_last_features(backbone: str) -> None:
    torch.manual_seed(0)
    member = build_member(make_spec(backbone), 3, pretrained=False).eval()
    images = torch.randn(2, 3, 64, 64)

    inputs = head_inputs(member.backbone, images, ("levels", "pooled"))

    indices, widths = levels_of(member.backbone)
    _, maps = member.backbone.forward_intermediates(images, indices=indices)
    expected = [*(level.mean((2, 3)) for level in maps), inputs["pooled"]]
    pooled = member.backbone.forward_head(member.backbone.forward_features(images), pre_logits=True)
    torch.testing.assert_close(inputs["pooled"], pooled)
    torch.testing.assert_close(inputs["levels"], torch.cat(expected, 1))
    assert [level.shape[1] for level in maps] == widths
    assert member(255 * torch.rand(2, 3, 64, 64)).shape == (2, 3)


def test_of_many_levels_five_are_read_the_last_among_them() -> None:
    deep = SimpleNamespace(
        feature_info=[{"num_chs": 10 + depth} for depth in range(12)], forward_intermediates=None
    )

    indices, widths = levels_of(deep)

    assert indices == [1, 4, 6, 9, 11]
    assert widths == [10 + index for index in indices]


def test_a_recurrent_head_reads_levels_in_one_step() -> None:
    spec = make_spec("test_efficientnet", kind="lstm", units=8)
    member = build_member(spec, 3, pretrained=False)

    logits = member(255 * torch.rand(2, 3, 64, 64))
    logits.sum().backward()

    assert logits.shape == (2, 3)
    assert not member.head.takes_map
    assert member.backbone.conv_stem.weight.grad is not None


def test_heat_maps_show_what_the_head_reads_of_the_last_level() -> None:
    torch.manual_seed(0)
    member = build_member(make_spec("test_efficientnet"), 3, pretrained=False).eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)

    maps = grad_cam(member, images, [0, 2], size=64)

    assert maps.shape == (2, 64, 64)
    assert maps.max() > 0
    assert "forward_intermediates" not in vars(member.backbone)


def test_a_backbone_without_levels_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"levels; got Identity; .*pooled"):
        levels_of(torch.nn.Identity())


def test_first_blocks_are_cached_for_a_head_on_levels_too() -> None:
    member = build_member(make_spec("test_efficientnet"), 3, pretrained=False)
    stage = StageSpec(name="s", epochs=1, lr=1e-3, frozen="conv_stem|bn1|blocks.0", cached=True)

    assert cached_blocks(member, stage) == 1


def test_a_network_that_is_no_row_of_blocks_is_not_cached() -> None:
    member = build_member(make_spec("test_vit"), 3, pretrained=False)
    stage = StageSpec(name="s", epochs=1, lr=1e-3, frozen="patch_embed", cached=True)

    with pytest.raises(RecipeError, match=r"no frozen blocks to cache.*cached = false"):
        cached_blocks(member, stage)
