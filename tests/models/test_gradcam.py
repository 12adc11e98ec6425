"""Grad-CAM: the heat is where the evidence is, and follows the papers' equations."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from threefold.errors import DataError
from threefold.models.gradcam import NoMap, ensemble_cam, grad_cam
from threefold.models.heads import build_head
from threefold.models.member import JointMember, Member, build_joint, build_member
from threefold.recipe.schema import HeadSpec, MemberSpec
from threefold.training.steps.optimizers import train_mode


class Net(nn.Module):
    """timm's interface around a few layers; pooled features are the mean over positions."""

    def __init__(self, body: nn.Module, num_features: int) -> None:
        super().__init__()
        self.body, self.num_features = body, num_features

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x.mean((2, 3))


def small(
    spec: HeadSpec | None = None, channels: int = 6, seed: int = 0, classes: int = 3
) -> Member:
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), nn.Tanh())
    member = Member(
        Net(body, channels),
        build_head(spec or HeadSpec(kind="linear"), channels, classes),
        (0.5,) * 3,
        (0.25,) * 3,
    )
    return member.eval()


def noise(count: int = 4, size: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def planted(count: int, seed: int, size: int = 32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grey noise with a bright (class 1) or dark (class 0) square in a corner.

    Returns images, classes and corners (row, column).
    """
    rng = np.random.default_rng(seed)
    images = np.clip(rng.normal(128, 12, (count, size, size, 3)), 0, 255).astype(np.uint8)
    labels, corners = rng.integers(0, 2, count), rng.integers(0, 2, (count, 2))
    side = size // 3
    for image, label, (down, right) in zip(images, labels, corners, strict=True):
        top, left = down * (size - side), right * (size - side)
        image[top : top + side, left : left + side] = 230 if label else 25
    return images, labels, corners


@pytest.fixture(scope="module")
def trained() -> Member:
    """A small network that has learned to tell bright squares from dark ones."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    member = Member(
        Net(nn.Sequential(*layers), 16),
        build_head(HeadSpec(kind="linear"), 16, 2),
        (0.5,) * 3,
        (0.25,) * 3,
    )
    images, labels, _ = planted(256, 1)
    pixels, truth = torch.tensor(images).permute(0, 3, 1, 2).float(), torch.tensor(labels)
    optimizer = torch.optim.Adam(member.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(member(pixels), truth).backward()
        optimizer.step()
    return member.eval()


def test_the_heat_lies_on_the_planted_square(trained: Member) -> None:
    images, labels, corners = planted(64, 2)
    with torch.inference_mode():
        logits = trained(torch.tensor(images).permute(0, 3, 1, 2).float())
    correct = logits.argmax(1).numpy() == labels

    heat = grad_cam(trained, images, labels)

    assert correct.mean() > 0.95
    assert heat.shape == (64, 32, 32)
    assert heat.dtype == np.float32
    assert heat.min() >= 0
    assert heat.max() == 1
    quarters = heat.reshape(64, 2, 16, 2, 16).sum((2, 4))
    share = quarters[np.arange(64), corners[:, 0], corners[:, 1]] / quarters.sum((1, 2))
    assert np.median(share[correct]) > 0.7  # chance is 0.25
    hottest = np.stack(np.unravel_index(heat.reshape(64, -1).argmax(1), (32, 32)), 1) // 16
    assert (hottest == corners).all(1)[correct].mean() > 0.95


def test_under_a_linear_head_it_is_cam() -> None:
    """Zhou et al. 2016: the class's weights on the channels of the map, up to a factor."""
    member, images, classes = small(), noise(), np.array([0, 1, 2, 0])
    with torch.no_grad():
        maps = member.backbone.forward_features(
            (torch.tensor(images).permute(0, 3, 1, 2).float() - member.mean) / member.std
        )
        cam = torch.einsum("bc,bchw->bhw", member.head.classifier.weight[classes], maps).relu()
    expected = nn.functional.interpolate(cam[:, None], (16, 16), mode="bilinear")[:, 0]
    expected /= expected.amax((1, 2), keepdim=True)

    heat = grad_cam(member, images, classes)

    np.testing.assert_allclose(heat, expected, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        HeadSpec(kind="mlp", fc=5),
        HeadSpec(kind="gru", units=8),
        HeadSpec(kind="bilstm", units=8, fc=4),
        HeadSpec(kind="lstm", units=8, sequence="rows"),
        HeadSpec(kind="bigru", units=8, sequence="spatial"),
    ],
    ids=lambda s: f"{s.kind}-{s.sequence}",
)
def test_the_weights_of_the_channels_are_finite_differences(spec: HeadSpec) -> None:
    """A channel's weight is the change of the logit as the whole channel rises."""
    member, images, classes = small(spec).double(), noise(3, 8), np.array([2, 0, 1])
    pixels = torch.tensor(images).permute(0, 3, 1, 2).double()
    with torch.no_grad():
        maps = member.backbone.forward_features((pixels - member.mean) / member.std)

        def logit(features: torch.Tensor) -> torch.Tensor:
            inputs = features if member.head.takes_map else features.mean((2, 3))
            return member.head(inputs)[torch.arange(3), torch.tensor(classes)]

        step = 1e-5 * torch.eye(6, dtype=torch.float64)[:, None, :, None, None]
        weights = torch.stack([(logit(maps + s) - logit(maps - s)) / 2e-5 for s in step], 1)
        cam = torch.einsum("bc,bchw->bhw", weights, maps).relu()
    expected = nn.functional.interpolate(cam[:, None], (8, 8), mode="bilinear")[:, 0]
    assert (expected.amax((1, 2)) > 0).any()
    expected = torch.where(expected > 0, expected / expected.amax((1, 2), keepdim=True), 0.0)

    heat = grad_cam(member.float(), images, classes)

    np.testing.assert_allclose(heat, expected, atol=1e-3)


def test_the_member_does_not_change() -> None:
    member = small(HeadSpec(kind="gru", units=4, noise=0.5))
    member.backbone.requires_grad_(False)
    train_mode(member)
    flags = {name: p.requires_grad for name, p in member.named_parameters()}
    modes = [m.training for m in member.modules()]
    assert len(set(flags.values())) == len(set(modes)) == 2

    def assert_unchanged() -> None:
        assert {name: p.requires_grad for name, p in member.named_parameters()} == flags
        assert [m.training for m in member.modules()] == modes
        assert all(p.grad is None for p in member.parameters())
        assert "forward_features" not in vars(member.backbone)

    first = grad_cam(member, noise(), [0, 1, 2, 1])
    assert_unchanged()

    with torch.inference_mode():
        second = grad_cam(member, noise(), [0, 1, 2, 1])
    np.testing.assert_array_equal(first, second)  # without noise, in any mode of the caller

    with pytest.raises(DataError, match="no such class; expected 0 to 2, got 3"):
        grad_cam(member, noise(), [0, 1, 2, 3])
    assert_unchanged()


def test_each_map_depends_on_its_image_and_class_alone() -> None:
    member, images = small(HeadSpec(kind="lstm", units=8, sequence="spatial")), noise()

    whole = grad_cam(member, images, [0, 1, 2, 0])

    for i, c in enumerate([0, 1, 2, 0]):
        np.testing.assert_allclose(whole[i], grad_cam(member, images[i : i + 1], [c])[0], atol=1e-5)
    assert np.abs(whole - grad_cam(member, images, [1, 2, 0, 1])).max() > 0.1


def test_joined_members_and_ensembles_are_means() -> None:
    bases = [small(seed=0), small(HeadSpec(kind="rnn", units=4), seed=1)]
    images, classes = noise(), [0, 1, 2, 0]
    maps = [grad_cam(base, images, classes) for base in bases]

    joined = build_joint(HeadSpec(kind="linear"), bases, 3)

    assert isinstance(joined, JointMember)
    np.testing.assert_allclose(grad_cam(joined, images, classes), np.mean(maps, 0), atol=1e-6)
    np.testing.assert_allclose(ensemble_cam(bases, images, classes), np.mean(maps, 0), atol=1e-6)


def test_members_of_an_ensemble_see_their_own_sizes() -> None:
    bases = [small(seed=0), small(HeadSpec(kind="rnn", units=4), seed=1)]
    images, classes = noise(), [0, 1, 2, 0]

    heat = ensemble_cam(bases, images, classes, sizes=[8, 24], resizes=["squash", "crop"])

    parts = [
        grad_cam(bases[0], images, classes, size=8),
        grad_cam(bases[1], images, classes, size=24, resize="crop"),
    ]
    np.testing.assert_allclose(heat, np.mean(parts, 0), atol=1e-6)
    assert np.abs(parts[0] - grad_cam(bases[0], images, classes)).max() > 0.01


def test_heat_covers_the_part_that_the_member_saw(trained: Member) -> None:
    """A wide image is squashed as a whole, or cropped: then only its middle has heat."""
    images, labels, corners = planted(8, 3)
    margin = np.full((8, 32, 16, 3), 128, np.uint8)
    wide = np.concatenate([margin, images, margin], 2)

    middle = grad_cam(trained, wide, labels, size=32, resize="crop")
    whole = grad_cam(trained, wide, labels, size=32)

    assert middle.shape == (8, 32, 64)
    assert not middle[:, :, :16].any()
    assert not middle[:, :, 48:].any()
    np.testing.assert_allclose(middle[:, :, 16:48], grad_cam(trained, images, labels), atol=1e-6)
    hottest = np.stack(np.unravel_index(whole.reshape(8, -1).argmax(1), (32, 64)), 1)
    assert ((hottest - [0, 16]) // 16 == corners).all(1).mean() >= 0.75


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("tf_efficientnet_lite0", 64),
        ("resnet18", 64),
        ("convnext_atto", 64),
        ("vit_tiny_patch16_224", 64),
        ("swin_tiny_patch4_window7_224", 64),
        ("beit_base_patch16_224", 32),
    ],
)
def test_families_of_timm_give_a_map(backbone: str, size: int) -> None:
    torch.manual_seed(0)
    spec = MemberSpec(
        name="a",
        backbone=backbone,
        weights="none",
        img_size=size,
        head=HeadSpec(kind="gru", units=8),
    )
    member, images = build_member(spec, 4, pretrained=False), noise(2, 48)
    images[:, 20:30, 5:15] = 255

    with warnings.catch_warnings():
        warnings.simplefilter("error", NoMap)
        heat = np.concatenate([grad_cam(member, images, [c, c], size=size) for c in range(4)])

    assert heat.shape == (8, 48, 48)
    assert np.isfinite(heat).all()
    hot = heat.max((1, 2))
    assert set(np.unique(hot)) <= {0, 1}
    assert hot.any()  # some class has a place that speaks for it
    assert all(np.ptp(image) > 0.1 for image in heat[hot == 1])


class Tokens(Net):
    """Features that are tokens of no grid."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).flatten(2).mT[:, :7]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x.mean(1)


def test_a_backbone_without_a_map_gives_zeros_and_warns() -> None:
    member = small()
    member.backbone = Tokens(member.backbone.body, 6)

    with pytest.warns(
        NoMap, match=r"Tokens has no feature map \(its features are \(7, 6\)\): no heat"
    ):
        heat = grad_cam(member, noise(2), [0, 1])

    assert heat.shape == (2, 16, 16)
    assert not heat.any()


def test_bad_input_is_refused() -> None:
    member = small()

    with pytest.raises(
        DataError, match=r"not a batch of images; expected uint8 \(b, h, w, 3\), got float64"
    ):
        grad_cam(member, noise() / 255, [0] * 4)
    with pytest.raises(
        DataError, match=r"one class number per image; expected \(4,\), got int64 \(3,\)"
    ):
        grad_cam(member, noise(), [0, 1, 2])
    with pytest.raises(DataError, match="no such class; expected 0 to 2, got -1"):
        grad_cam(member, noise(1), [-1])
    with pytest.raises(DataError, match="expected a Member or a JointMember, got Conv2d"):
        grad_cam(nn.Conv2d(3, 3, 1), noise(1), [0])
    with pytest.raises(DataError, match="no members for Grad-CAM"):
        ensemble_cam([], noise(1), [0])
