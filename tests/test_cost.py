"""Costs: multiply-adds by hand and as published, bytes as stored, and nothing computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from threefold.cost import Cost, cost, count_flops
from threefold.errors import RecipeError
from threefold.models__member import build_member, save_weights
from threefold.recipe import HeadSpec, MemberSpec

TINY = MemberSpec(
    name="tiny",
    backbone="test_efficientnet",
    weights="none",
    img_size=32,
    head=HeadSpec(kind="gru", units=8, fc=6),
)


def test_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 4 * 4, 7)
    )
    assert count_flops(network, 9) == (3 * 3 * 3) * 5 * (4 * 4) + (5 * 4 * 4) * 7
    grouped = nn.Conv2d(3, 6, 5, groups=3, padding=2)
    assert count_flops(grouped, 10) == 5 * 5 * 6 * 10 * 10


def test_a_vision_transformer_by_hand() -> None:
    """16 x 16 patches, then per block: four projections of width, attention twice over all pairs, an MLP of 4 widths."""
    width, depth, tokens = 192, 12, 14 * 14 + 1
    block = tokens * width * (4 * width + 8 * width) + 2 * tokens * tokens * width
    assert (
        count_flops("deit_tiny_patch16_224", 224) == 14 * 14 * 16 * 16 * 3 * width + depth * block
    )


@pytest.mark.parametrize(
    ("name", "size", "published"),
    [
        ("ResNet50", 224, 4.09),  # torchvision's page of the weights
        ("VGG19", 224, 19.51),  # the same, 19.63, without its classifier's 0.12
        (
            "SEResNeXt101",
            224,
            8.00,
        ),  # Hu et al., arXiv:1709.01507, table 2: 8.00 with the classifier
        ("EfficientNetB0", 224, 0.39),  # Tan and Le, arXiv:1905.11946, table 2
        ("EfficientNetB4", 380, 4.2),
        ("MobileNetV1", 224, 0.569),  # Howard et al., arXiv:1704.04861, table 8
    ],
)
def test_published_figures(name: str, size: int, published: float) -> None:
    assert count_flops(name, size) / 1e9 == pytest.approx(published, rel=0.06)


def test_cost_of_a_member(tmp_path: Path) -> None:
    member = build_member(TINY, 4)
    weights = {name: value.clone() for name, value in member.state_dict().items()}
    found = cost(member, 32)
    assert isinstance(found, Cost)
    assert found.parameters == sum(p.numel() for p in member.parameters())
    head = 256 * 24 + 8 * 6 + 6 * 4
    assert found.flops == count_flops("test_efficientnet", 32) + head
    save_weights(member.state_dict(), tmp_path / "w.safetensors")
    assert 0 < (tmp_path / "w.safetensors").stat().st_size - found.bytes < 200 * len(weights)
    assert all(torch.equal(weights[name], value) for name, value in member.state_dict().items())
    assert member(torch.zeros(1, 3, 32, 32)).device.type == "cpu"


def test_a_larger_image_costs_more() -> None:
    sizes = (224, 299, 421)
    found = [count_flops("ResNet50", size) for size in sizes]
    assert found == sorted(found)
    assert found[2] / found[1] == pytest.approx((421 / 299) ** 2, rel=0.05)


def test_what_cannot_be_counted_is_one_line() -> None:
    with pytest.raises(RecipeError, match=r"unknown backbone.*EfficientNetB9"):
        count_flops("EfficientNetB9", 224)
    for name, size in (
        ("InceptionV3", 16),
        ("Xception", 0),
        ("ResNet50", -3),
        ("deit_tiny_patch16_224", 5),
    ):
        with pytest.raises(
            RecipeError, match=r"takes? images of this size|build the backbone"
        ) as error:
            count_flops(name, size)
        assert "\n" not in str(error.value)
