"""Costs: multiply-adds by hand and as published, bytes as stored, and nothing computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from threefold.errors import RecipeError
from threefold.models.flops import Cost, count_macs, measure_cost
from threefold.models.member import build_member, save_weights
from threefold.recipe.schema import HeadSpec, MemberSpec

PUBLISHED = [
    ("ResNet50", 224, 4.09),  # torchvision, page of the weights
    ("VGG19", 224, 19.51),  # torchvision: 19.63, of which 0.12 are in the classifier
    ("SEResNeXt101", 224, 8.00),  # Hu et al., arXiv:1709.01507, table 2, with the classifier
    ("EfficientNetB0", 224, 0.39),  # Tan and Le, arXiv:1905.11946, table 2
    ("EfficientNetB4", 380, 4.2),
    ("MobileNetV1", 224, 0.569),  # Howard et al., arXiv:1704.04861, table 8
]
"""Backbone, img_size and multiply-adds in 10⁹."""


def test_convolutions_and_linear_layers_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 4 * 4, 7)
    )
    grouped = nn.Conv2d(3, 6, 5, groups=3, padding=2)

    assert count_macs(network, 9) == (3 * 3 * 3) * 5 * (4 * 4) + (5 * 4 * 4) * 7
    assert count_macs(grouped, 10) == 5 * 5 * 6 * 10 * 10


def test_a_vision_transformer_by_hand() -> None:
    """Patches, then per block four projections, attention twice over all pairs, an MLP."""
    width, depth, tokens = 192, 12, 14 * 14 + 1
    patches = 14 * 14 * 16 * 16 * 3 * width
    block = tokens * width * (4 * width + 8 * width) + 2 * tokens * tokens * width

    assert count_macs("deit_tiny_patch16_224", 224) == patches + depth * block


@pytest.mark.parametrize(("name", "size", "published"), PUBLISHED)
def test_published_figures(name: str, size: int, published: float) -> None:
    assert count_macs(name, size) / 1e9 == pytest.approx(published, rel=0.06)


def test_cost_of_a_member(tmp_path: Path) -> None:
    head = HeadSpec(kind="gru", units=8, fc=6)
    spec = MemberSpec(
        name="tiny", backbone="test_efficientnet", weights="none", img_size=32, head=head
    )
    member = build_member(spec, 4)
    weights = {name: value.clone() for name, value in member.state_dict().items()}

    cost = measure_cost(member, 32)
    save_weights(member.state_dict(), tmp_path / "w.safetensors")

    assert isinstance(cost, Cost)
    assert cost.parameters == sum(p.numel() for p in member.parameters())
    assert cost.macs == count_macs("test_efficientnet", 32) + 256 * 24 + 8 * 6 + 6 * 4
    assert 0 < (tmp_path / "w.safetensors").stat().st_size - cost.bytes < 200 * len(weights)
    assert all(torch.equal(weights[name], value) for name, value in member.state_dict().items())
    assert member(torch.zeros(1, 3, 32, 32)).device.type == "cpu"


def test_a_larger_image_costs_more() -> None:
    macs = [count_macs("ResNet50", size) for size in (224, 299, 421)]

    assert macs == sorted(macs)
    assert macs[2] / macs[1] == pytest.approx((421 / 299) ** 2, rel=0.05)


def test_an_unknown_backbone_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"unknown backbone.*EfficientNetB9"):
        count_macs("EfficientNetB9", 224)


@pytest.mark.parametrize(
    ("name", "size"),
    [("InceptionV3", 16), ("Xception", 0), ("ResNet50", -3), ("deit_tiny_patch16_224", 5)],
)
def test_an_impossible_size_is_refused_in_one_line(name: str, size: int) -> None:
    message = r"takes? images of this size|build the backbone"

    with pytest.raises(RecipeError, match=message) as error:
        count_macs(name, size)

    assert "\n" not in str(error.value)
