"""The paper's networks: names, the authors' parameter totals, a training step, an export."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from support.networks import coarse_pictures, learn, pipeline_of, settle
from torch import nn

from threefold.cli.catalog import catalogue
from threefold.ensembles.stacked import StackedEnsemble
from threefold.errors import RecipeError
from threefold.exporting import targets
from threefold.models.backbones import (
    INCEPTION_STATS,
    PAPER_BACKBONES,
    paper_backbone,
    resolve_backbone,
)
from threefold.models.heads import build_head
from threefold.models.member import Member, build_member
from threefold.models.pipeline import to_pixels
from threefold.models.recurrent import full_parameters
from threefold.recipe.schema import HeadSpec, MemberSpec
from threefold.runtime.tolerances import TOLERANCES

NAMES = [row.name for row in PAPER_BACKBONES]


def on_meta(spec: MemberSpec, num_classes: int = 10) -> Member:
    with torch.device("meta"):
        return build_member(spec, num_classes, pretrained=False)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---- names ----


@pytest.mark.parametrize("row", PAPER_BACKBONES, ids=NAMES)
def test_the_table_agrees_with_timm(row: Any) -> None:
    member = on_meta(MemberSpec(name="m", backbone=row.name, img_size=row.sizes[0]))
    config = timm.models.get_pretrained_cfg(row.timm)

    assert row.timm in timm.list_models(pretrained=True)
    assert (config.mean, config.std) == row.stats
    # Apart from BGR, the authors' scaling is that of timm's weights.
    if row.authors_scaling != "bgr":
        assert (row.authors_scaling == "-1..1") == (row.stats == INCEPTION_STATS)
    assert member.head.classifier.in_features == row.features
    assert member.backbone.pretrained_cfg["tag"] == row.timm.split(".")[1]


@pytest.mark.parametrize(
    ("name", "timm_name"),
    [
        ("InceptionV3", "inception_v3.tf_in1k"),
        ("inceptionresnetv2", "inception_resnet_v2.tf_in1k"),
        ("INCEPTION-RESNET-V2", "inception_resnet_v2.tf_in1k"),
        ("EfficientNet B7", "tf_efficientnet_b7.aa_in1k"),
        ("efficientnet-b0", "tf_efficientnet_b0.aa_in1k"),
        ("ResNet50", "resnet50.tv_in1k"),
        # names of timm come first
        ("resnet50", "resnet50"),
        ("efficientnet_b0", "efficientnet_b0"),
        ("inception_v3.tv_in1k", "inception_v3.tv_in1k"),
        ("EfficientNetB9", "EfficientNetB9"),
    ],
)
def test_names(name: str, timm_name: str) -> None:
    assert resolve_backbone(name) == timm_name


def test_a_pattern_without_match_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no pretrained backbone.*convnxt"):
        catalogue("backbones", "convnxt")


def test_the_list_shows_the_papers_names() -> None:
    lines = catalogue("backbones", "*xception*")

    assert "xception65.tf_in1k" in lines
    assert lines[-1].startswith(
        "Xception: legacy_xception.tf_in1k, the paper's, -1..1 there; weights: the same"
    )
    assert len([line for line in lines if ": " in line]) == 1
    assert len([line for line in catalogue("backbones") if ": " in line]) == len(NAMES)
    assert catalogue("backbones", "EfficientNetB7")[0].startswith(
        "EfficientNetB7: tf_efficientnet_b7.aa_in1k"
    )


def test_vgg_has_no_fully_connected_layers() -> None:
    """Like Keras' VGG19 without top."""
    member = on_meta(MemberSpec(name="m", backbone="VGG19", weights="none"))

    assert count(member.backbone) == 20_024_384


def test_vgg_features_are_the_means_of_its_maps() -> None:
    spec = MemberSpec(name="m", backbone="vgg11", weights="none", img_size=64)
    member = build_member(spec, 3).eval()
    pixels = torch.rand(2, 3, 64, 64) * 255

    maps = member.backbone.forward_features((pixels - member.mean) / member.std)
    torch.testing.assert_close(member(pixels), member.head(maps.mean((2, 3))))


# ---- the authors' totals ----

# Differences between a Keras total (+) and ours (-):
# + running mean and variance of batch norms, "non-trainable" in Keras;
# - the scale of batch norms, absent in Keras' Inception-v3 (94) and Inception-ResNet-v2 (204);
# + a bias of each of ResNet50's 53 convolutions, which its batch norms make superfluous;
# + the recurrent weights without effect (recurrent.full_parameters);
# + a normalisation layer in tf.keras 2.4's EfficientNets: 3 means, 3 variances and its count.
NO_SCALE = {"InceptionV3": -17_216, "Inception-ResNetV2": -30_272}
CONV_BIAS = {"ResNet50": 26_560}
TF_KERAS_NORMALISATION = 3 + 3 + 1

# Counted by Keras 3.15's keras.applications with include_top=False.
KERAS_WITHOUT_TOP = {
    "InceptionV3": 21_802_784,
    "ResNet50": 23_587_712,
    "Inception-ResNetV2": 54_336_736,
    "Xception": 20_861_480,
    "MobileNetV1": 3_228_864,
    "VGG19": 20_024_384,
    "EfficientNetB0": 4_049_571 - TF_KERAS_NORMALISATION,
}


@cache
def keras_backbone(name: str) -> int:
    """Count the parameters of timm's network without top as Keras does."""
    spec = MemberSpec(name="m", backbone=name, weights="none", img_size=299)
    backbone = on_meta(spec).backbone
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    statistics = sum(norm.running_mean.numel() + norm.running_var.numel() for norm in norms)
    if name in NO_SCALE:
        assert NO_SCALE[name] == -sum(norm.weight.numel() for norm in norms)
    if name in CONV_BIAS:
        convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
        assert CONV_BIAS[name] == sum(
            conv.out_channels for conv in convolutions if conv.bias is None
        )
    return count(backbone) + statistics + NO_SCALE.get(name, 0) + CONV_BIAS.get(name, 0)


@pytest.mark.parametrize("name", KERAS_WITHOUT_TOP)
def test_the_networks_of_keras_to_the_last_parameter(name: str) -> None:
    assert keras_backbone(name) == KERAS_WITHOUT_TOP[name]


class Total(NamedTuple):
    """One total printed in the authors' notebooks."""

    data: str
    backbone: str
    printed: int
    classes: int
    fc: int
    kind: str = "linear"
    units: int = 2048
    extra: int = 0
    """Parameters of the authors' model outside the backbone and the head."""


SE_BLOCKS = sum(blocks * 2 * c * c // 16 for c, blocks in ((320, 11), (1088, 21), (2080, 12)))
"""Squeeze-and-excitation, reduction 16, no biases, after 44 blocks of Inception-ResNet-v2."""
B_SERIES_CIFAR100 = (5_463_808, 7_989_476, 9_313_878, 12_459_916, 19_612_348)
B_SERIES_SVHN = (
    5_371_558,
    7_897_226,
    9_221_628,
    12_367_666,
    19_520_098,
    30_621_946,
    43_330_706,
    66_730_394,
)

TOTALS = [
    Total("cifar-10", "SEResNeXt101", 51_261_114, 10, 2048),
    Total("cifar-10", "SEResNeXt101", 76_433_082, 10, 2048, "gru"),
    Total("cifar-10", "Xception", 25_078_322, 10, 2048),
    Total("cifar-10", "Xception", 50_250_290, 10, 2048, "gru"),
    Total("cifar-10", "Inception-ResNetV2", 57_505_002, 10, 2048),
    Total("cifar-10", "Inception-ResNetV2", 80_579_818, 10, 2048, "gru"),
    Total("cifar-10", "EfficientNetB5", 30_621_946, 10, 1024),
    *(
        Total("cifar-100", f"EfficientNetB{i}", n, 100, 1024)
        for i, n in enumerate(B_SERIES_CIFAR100)
    ),
    Total("cifar-100", "SEResNeXt101", 49_244_948, 100, 1024),
    Total("cifar-100", "Xception", 25_262_732, 100, 2048),
    Total("cifar-100", "Inception-ResNetV2", 56_013_124, 100, 1024),
    Total("cifar-100", "InceptionV3", 24_003_460, 100, 1024),
    *(Total("svhn", f"EfficientNetB{i}", n, 10, 1024) for i, n in enumerate(B_SERIES_SVHN)),
    Total("svhn", "EfficientNetB0", 5_371_565, 10, 1024, extra=TF_KERAS_NORMALISATION),
    Total("svhn", "SEResNeXt101", 49_152_698, 10, 1024),
    Total("svhn", "Xception", 22_969_906, 10, 1024),
    Total("svhn", "Inception-ResNetV2", 55_920_874, 10, 1024),
    Total("fashion", "SEResNeXt101", 59_651_770, 10, 2048, "rnn"),
    Total("fashion", "SEResNeXt101", 76_433_082, 10, 2048, "gru"),
    Total("fashion", "SEResNeXt101", 76_435_130, 10, 2048, "bilstm"),
    Total("fashion", "Xception", 50_252_338, 10, 2048, "bilstm"),
    Total("surrey", "MobileNetV1", 4_303_064, 24, 1024),
    Total("surrey", "InceptionV3", 23_925_560, 24, 1024),
    Total("cassava", "SEResNeXt101", 51_250_869, 5, 2048),
    Total("cassava", "Xception", 25_068_077, 5, 2048),
    Total("inaturalist", "MobileNetV1", 11_565_234, 1010, 4096),
    Total("inaturalist", "SEResNeXt101", 53_310_114, 1010, 2048),
    # A BiLSTM with 2048 units in each direction; the second has squeeze-and-excitation as well.
    Total("inaturalist", "InceptionV3", 109_847_314, 1010, 4096, "bilstm", 4096),
    Total(
        "inaturalist",
        "Inception-ResNetV2",
        143_730_386,
        1010,
        4096,
        "bilstm",
        4096,
        extra=SE_BLOCKS,
    ),
]


def keras_total(total: Total) -> int:
    """Count what Keras prints: backbone, full recurrent layer, fully connected layers."""
    row = paper_backbone(total.backbone)
    assert row is not None
    spec = HeadSpec(
        kind=total.kind, units=total.units, fc=total.fc, reset_after=False, activation="keras"
    )
    with torch.device("meta"):
        head = build_head(spec, row.features, total.classes)
    recurrent = full_parameters(spec.kind, row.features, total.units, reset_after=False)
    return (
        keras_backbone(total.backbone)
        + recurrent
        + count(head.fc)
        + count(head.classifier)
        + total.extra
    )


@pytest.mark.parametrize(
    "total", TOTALS, ids=lambda t: f"{t.data}-{t.backbone}-{t.kind}-{t.printed}"
)
def test_the_authors_totals(total: Total) -> None:
    assert keras_total(total) == total.printed


def test_the_authors_ensemble_of_three() -> None:
    """E2E-3M: three members of 10 classes and the stacked network on their 30 probabilities."""
    rng = np.random.default_rng(0)
    stacked = StackedEnsemble().fit(rng.dirichlet(np.ones(10), (3, 40)), np.arange(40) % 10)
    three = [t for t in TOTALS if t.data == "cifar-10" and t.kind == "linear" and t.fc == 2048]

    trainable = count(stacked.to_module())

    assert trainable == 167_946
    assert sum(map(keras_total, three)) + trainable == 134_012_384


# ---- training and export ----

SMALLEST = 75
"""Smallest side for the Inception networks; odd, like 299, so that padding is asymmetric."""
NEWER = {
    "tf_efficientnetv2_s": 75,
    "convnext_tiny": 75,
    "deit_tiny_patch16_224": 64,
    "swin_tiny_patch4_window7_224": 224,
    "eva02_tiny_patch14_224": 56,
}


def build_train_export(name: str, size: int, path: Path) -> dict[str, Any]:
    """Train a step from random weights, export the network, and return the figures."""
    began = time.monotonic()
    torch.manual_seed(0)
    member = build_member(MemberSpec(name="m", backbone=name, weights="none", img_size=size), 3)
    built = time.monotonic()
    pictures = coarse_pictures(size)
    pixels = to_pixels(pictures, torch.device("cpu"))
    learn(member, pixels)
    trained = time.monotonic()
    settle(member, pixels)
    pipeline = pipeline_of(member, size)
    report = targets.export(pipeline, path, list(pictures))
    seconds = {
        "build": built - began,
        "step": trained - built,
        "export": time.monotonic() - trained,
    }
    spread = float(np.ptp(pipeline.predict_proba(list(pictures)), axis=0).max())
    return {"name": name, "size": size, "spread": spread, **seconds, **report.as_json()}


@pytest.mark.long
@pytest.mark.parametrize("name", [*NAMES, *NEWER])
def test_it_builds_learns_and_exports(name: str, tmp_path: Path) -> None:
    report = build_train_export(name, NEWER.get(name, SMALLEST), tmp_path / "m.onnx")

    assert report["max_difference"] <= TOLERANCES["float32"].difference
    assert report["top1_agreement"] == 1.0
    # The answers depend on the image.
    assert report["spread"] > 10 * TOLERANCES["float32"].difference
    print(json.dumps(report))
