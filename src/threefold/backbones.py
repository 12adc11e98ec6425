"""The networks of the paper: its names for them, and which of timm's weights are nearest to what the authors loaded.

The authors used Keras 2.2.4: `keras.applications`, `classification_models` (SEResNeXt101) and `efficientnet`. timm has
the same published weights for most of them; where it has not, `weights` says what differs.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Scaling = Literal["-1..1", "imagenet", "bgr"]

INCEPTION_STATS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation of RGB in 0..1: the same numbers as x / 127.5 - 1 on 0..255."""
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class PaperBackbone(NamedTuple):
    """One ConvNet of the paper, without its ImageNet classifier."""

    name: str
    """The paper's spelling (section 4.2, tables 1 to 6)."""
    timm: str
    """Architecture and tag in timm."""
    sizes: tuple[int, ...]
    """Sides of the square input in the paper and in the authors' runs, in pixels."""
    features: int
    """Channels c of the pooled features."""
    authors_scaling: Scaling
    """What the authors' library does to RGB in 0..255: -1..1, or mean and deviation of ImageNet, or BGR minus the mean."""
    stats: tuple[tuple[float, float, float], tuple[float, float, float]]
    """Mean and standard deviation of RGB in 0..1 that timm's weights expect; a member always applies these."""
    source: str
    """The library whose network the authors used."""
    weights: str
    """How timm's weights are related to the authors'."""


_AUTOAUGMENT = "the same checkpoint of the TPU repository, trained with AutoAugment"
_B_FEATURES = (1280, 1280, 1408, 1536, 1792, 2048, 2304, 2560)

PAPER_BACKBONES: tuple[PaperBackbone, ...] = (
    PaperBackbone(
        "InceptionV3",
        "inception_v3.tf_in1k",
        (299, 401, 421),
        2048,
        "-1..1",
        INCEPTION_STATS,
        "keras.applications",
        "TF-Slim's checkpoint of 2016",
    ),
    PaperBackbone(
        "ResNet50",
        "resnet50.tv_in1k",
        (299,),
        2048,
        "bgr",
        IMAGENET_STATS,
        "keras.applications",
        "another training: Keras has the Caffe weights, which timm has not; in timm the stride of "
        "a block is in its 3 x 3 convolution and convolutions have no bias",
    ),
    PaperBackbone(
        "Inception-ResNetV2",
        "inception_resnet_v2.tf_in1k",
        (299, 421, 501),
        1536,
        "-1..1",
        INCEPTION_STATS,
        "keras.applications",
        "the same: TF-Slim's checkpoint of 2016-08-30",
    ),
    PaperBackbone(
        "Xception",
        "legacy_xception.tf_in1k",
        (299, 421, 501),
        2048,
        "-1..1",
        INCEPTION_STATS,
        "keras.applications",
        "the same: ported from Keras",
    ),
    PaperBackbone(
        "MobileNetV1",
        "mobilenetv1_100.ra4_e3600_r224_in1k",
        (224, 299),
        1024,
        "-1..1",
        INCEPTION_STATS,
        "keras.applications",
        "another training, of 2024 and much longer: the only weights in timm; ReLU6 as in Keras",
    ),
    PaperBackbone(
        "VGG19",
        "vgg19.tv_in1k",
        (224,),
        512,
        "bgr",
        IMAGENET_STATS,
        "keras.applications",
        "another training: Keras has Oxford's Caffe weights, which timm has not",
    ),
    PaperBackbone(
        "SEResNeXt101",
        "legacy_seresnext101_32x4d.in1k",
        (299, 421, 501),
        2048,
        "imagenet",
        IMAGENET_STATS,
        "classification_models",
        "the same: both ported from Cadene's pretrained-models.pytorch",
    ),
    *(
        PaperBackbone(
            f"EfficientNetB{i}",
            f"tf_efficientnet_b{i}.aa_in1k",
            (299, 345) if i == 5 else (299,),
            _B_FEATURES[i],
            "imagenet",
            IMAGENET_STATS,
            "efficientnet",
            _AUTOAUGMENT,
        )
        for i in range(8)
    ),
)
"""Every backbone of the paper. The notebook of ResNet50 and VGG19 is lost: their scaling is Keras' own for them, the
size of VGG19 that of its weights. The paper prints 244 for MobileNetV1, which is 224; the notebook used 299."""


def paper_backbone(name: str) -> PaperBackbone | None:
    """The backbone that the paper calls so, whatever the case and punctuation; None if there is none."""
    return next((row for row in PAPER_BACKBONES if _letters(row.name) == _letters(name)), None)


def resolve_backbone(name: str) -> str:
    """The timm name of a backbone named as in timm or as in the paper.

    What is a name in timm stays that (`resnet50` and `efficientnet_b0` are timm's, with timm's default weights);
    otherwise the paper's spelling counts in any case and punctuation (`ResNet50`, `EfficientNet-B0`). Any other name is
    returned as it is, for the caller to refuse.
    """
    import timm

    if timm.is_model(name.split(".")[0]):
        return name
    row = paper_backbone(name)
    return row.timm if row else name


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
