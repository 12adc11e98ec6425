"""The paper's backbones and the timm weights nearest to those that the authors loaded.

The authors used Keras 2.2.4: `keras.applications`, `classification_models` (SEResNeXt101) and
`efficientnet`. timm has the same published weights for most of them; `weights` names the
differences.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from threefold.names import plain_backbone

Scaling = Literal["-1..1", "imagenet", "bgr"]

INCEPTION_STATS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Mean and standard deviation of RGB in 0..1; equal to x / 127.5 - 1 on 0..255."""

IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

CPU_FROZEN = r"conv_dw|backbone\.(conv_stem|bn1|blocks\.[0-2])\."
"""Parameters of an EfficientNet-Lite that are not trained on a CPU.

These are the early blocks and the depthwise kernels, whose gradients take most of a step's time.
"""

EARLY_BLOCKS = (
    r"backbone\.(conv_stem|stem|patch_embed|conv1|bn1|layer[12]\.|stages[._][01]\.|blocks\.[0-4]\.)"
)
"""Parameters of the first blocks of timm's families, which a first stage of tuning leaves alone."""


class PaperBackbone(NamedTuple):
    """A ConvNet of the paper, without its ImageNet classifier."""

    name: str
    """Name in the paper (section 4.2, tables 1 to 6)."""
    timm: str
    """Architecture and tag in timm."""
    sizes: tuple[int, ...]
    """Sides of the square input in the paper and the authors' runs, in pixels."""
    features: int
    """Number of channels c of the pooled features."""
    weights: str
    """How timm's weights relate to the authors'."""
    authors_scaling: Scaling = "-1..1"
    """Scaling of RGB 0..255 in the authors' library: to -1..1, by ImageNet's mean and standard
    deviation, or to BGR minus the mean."""
    stats: tuple[tuple[float, float, float], tuple[float, float, float]] = INCEPTION_STATS
    """Mean and standard deviation of RGB in 0..1 for timm's weights, as a member applies them."""
    source: str = "keras.applications"
    """The library whose network the authors used."""


_AUTOAUGMENT = "the same checkpoint of the TPU repository, trained with AutoAugment"
_B_FEATURES = (1280, 1280, 1408, 1536, 1792, 2048, 2304, 2560)

PAPER_BACKBONES: tuple[PaperBackbone, ...] = (
    PaperBackbone(
        name="InceptionV3",
        timm="inception_v3.tf_in1k",
        sizes=(299, 401, 421),
        features=2048,
        weights="TF-Slim's checkpoint of 2016",
    ),
    PaperBackbone(
        name="ResNet50",
        timm="resnet50.tv_in1k",
        sizes=(299,),
        features=2048,
        authors_scaling="bgr",
        stats=IMAGENET_STATS,
        weights="another training: Keras has the Caffe weights, which timm lacks; in timm the "
        "stride of a block is in its 3 x 3 convolution and convolutions have no bias",
    ),
    PaperBackbone(
        name="Inception-ResNetV2",
        timm="inception_resnet_v2.tf_in1k",
        sizes=(299, 421, 501),
        features=1536,
        weights="the same: TF-Slim's checkpoint of 2016-08-30",
    ),
    PaperBackbone(
        name="Xception",
        timm="legacy_xception.tf_in1k",
        sizes=(299, 421, 501),
        features=2048,
        weights="the same: ported from Keras",
    ),
    PaperBackbone(
        name="MobileNetV1",
        timm="mobilenetv1_100.ra4_e3600_r224_in1k",
        sizes=(224, 299),
        features=1024,
        weights="another training, much longer, from 2024: the only weights in timm; "
        "ReLU6 as in Keras",
    ),
    PaperBackbone(
        name="VGG19",
        timm="vgg19.tv_in1k",
        sizes=(224,),
        features=512,
        authors_scaling="bgr",
        stats=IMAGENET_STATS,
        weights="another training: Keras has Oxford's Caffe weights, which timm lacks",
    ),
    PaperBackbone(
        name="SEResNeXt101",
        timm="legacy_seresnext101_32x4d.in1k",
        sizes=(299, 421, 501),
        features=2048,
        authors_scaling="imagenet",
        stats=IMAGENET_STATS,
        source="classification_models",
        weights="the same: both ported from Cadene's pretrained-models.pytorch",
    ),
    *(
        PaperBackbone(
            name=f"EfficientNetB{i}",
            timm=f"tf_efficientnet_b{i}.aa_in1k",
            sizes=(299, 345) if i == 5 else (299,),
            features=_B_FEATURES[i],
            authors_scaling="imagenet",
            stats=IMAGENET_STATS,
            source="efficientnet",
            weights=_AUTOAUGMENT,
        )
        for i in range(8)
    ),
)
"""Every backbone of the paper.

The notebook of ResNet50 and VGG19 is lost: their scaling here is Keras' default, and the size of
VGG19 is that of its weights. The paper prints 244 for MobileNetV1, meaning 224; the notebook used
299.
"""


def paper_backbone(name: str) -> PaperBackbone | None:
    """Look up a backbone by its name in the paper, ignoring case and punctuation."""
    letters = _letters(name)
    return next((row for row in PAPER_BACKBONES if _letters(row.name) == letters), None)


def resolve_backbone(name: str) -> str:
    """Translate a backbone's name to timm's.

    Names of timm come first: `resnet50` and `efficientnet_b0` mean timm's default weights.
    Otherwise the paper's name counts, in any case and punctuation (`ResNet50`, `EfficientNet-B0`).
    Any other name is returned unchanged, for the caller to refuse.
    """
    import timm

    name = plain_backbone(name)
    if timm.is_model(name.split(".")[0]):
        return name
    row = paper_backbone(name)
    return row.timm if row else name


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
