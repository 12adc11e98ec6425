"""A divided backbone answers as the whole one does."""

from __future__ import annotations

import pytest
import torch

from threefold.models.member import build_member
from threefold.models.split import EarlyBlocks, LateBlocks, count_frozen_blocks
from threefold.recipe.schema import HeadSpec, MemberSpec


@pytest.mark.parametrize(
    ("backbone", "frozen", "count"),
    [
        ("test_efficientnet", ("conv_stem", "bn1", "blocks.0.", "blocks.1."), 2),
        ("test_resnet", ("conv1", "bn1", "layer1.", "layer2."), 2),
        ("test_convnext", ("stem", "stages.0."), 1),
        ("test_efficientnet", ("blocks.0.",), 0),
        ("test_vit", ("patch_embed", "blocks.0."), 0),
    ],
)
def test_parts_answer_as_the_whole(backbone: str, frozen: tuple[str, ...], count: int) -> None:
    torch.manual_seed(0)
    spec = MemberSpec(name="m", backbone=backbone, weights="none", img_size=64)
    member = build_member(spec, 3, pretrained=False).eval()
    names = [name for name, _ in member.backbone.named_parameters()]
    trainable = [name for name in names if not name.startswith(frozen)]

    found = count_frozen_blocks(member.backbone, trainable)

    assert found == count
    if count:
        pixels = 255 * torch.rand(2, 3, 64, 64)
        activations = EarlyBlocks(member.backbone, count)(pixels)
        torch.testing.assert_close(LateBlocks(member, count)(activations), member(pixels))


@pytest.mark.parametrize(
    ("backbone", "frozen", "count"),
    [
        ("test_efficientnet", ("conv_stem", "bn1", "blocks.0.", "blocks.1."), 2),
        ("test_resnet", ("conv1", "bn1", "layer1.", "layer2."), 2),
        ("test_convnext", ("stem", "stages.0."), 1),
    ],
)
def test_parts_on_levels_answer_as_the_whole(
    backbone: str, frozen: tuple[str, ...], count: int
) -> None:
    torch.manual_seed(0)
    head = HeadSpec(noise=0.0, sequence="levels")
    spec = MemberSpec(name="m", backbone=backbone, weights="none", img_size=64, head=head)
    member = build_member(spec, 3, pretrained=False).eval()
    names = [name for name, _ in member.backbone.named_parameters()]
    trainable = [name for name in names if not name.startswith(frozen)]
    pixels = 255 * torch.rand(2, 3, 64, 64)

    found = count_frozen_blocks(member.backbone, trainable, "levels")
    activations = EarlyBlocks(member.backbone, count, "levels")(pixels)
    late = LateBlocks(member, count)
    answers = late(activations)

    assert found == count
    assert activations.ndim == 2
    torch.testing.assert_close(answers, member(pixels))
    answers.sum().backward()
    gradients = {n for n, p in member.named_parameters() if p.grad is not None}
    assert {n for n in gradients if n.startswith("backbone.")} == {
        f"backbone.{name}" for name in trainable
    }


def test_late_blocks_train_the_member() -> None:
    torch.manual_seed(0)
    spec = MemberSpec(name="m", backbone="test_resnet", weights="none", img_size=64)
    member = build_member(spec, 3, pretrained=False)
    late = LateBlocks(member, 2)
    activations = EarlyBlocks(member.backbone, 2)(255 * torch.rand(4, 3, 64, 64))

    late(activations).sum().backward()

    with_gradient = {n for n, p in member.named_parameters() if p.grad is not None}
    assert any(name.startswith("backbone.layer3") for name in with_gradient)
    assert not any(name.startswith(("backbone.conv1", "backbone.layer1")) for name in with_gradient)
    assert member.training
