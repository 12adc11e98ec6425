"""The sections of a recipe: frozen pydantic models, one per table, that refuse unknown keys.

`recipe` puts them together; what holds between sections is checked there. Imports no torch.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

HeadKind = Literal["linear", "mlp", "rnn", "gru", "lstm", "birnn", "bigru", "bilstm"]
Method = Literal[
    "mean",
    "best",
    "vote",
    "pruned",
    "top2",
    "weighted",
    "greedy",
    "pool",
    "logistic",
    "stacked-shrunk",
    "stacked",
]
Source = Literal[
    "folder",
    "csv",
    "demo",
    "mnist",
    "fashion-mnist",
    "cifar10",
    "cifar100",
    "svhn",
    "inaturalist2019",
    "icassava2019",
    "cassava2020",
    "surrey-asl",
    "parquet",
    "huggingface",
]
WITH_GROUPS = ("csv", "parquet", "huggingface", "surrey-asl")
WITH_EXTRA = ("svhn", "inaturalist2019", "icassava2019")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=80)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A frozen table of a recipe that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _regex(value: str) -> str:
    """The value, if it is a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return value


class DataSpec(Section):
    """Where the images come from."""

    source: Source = "folder"
    root: str = ""
    """Folder of class folders (or of train/ [val/] test/), CSV or parquet file, hub name, or where the official files
    or archives of a named data set lie."""
    extra: bool = False
    """Train also on the images that are published beside the training set: SVHN's extra images, the official
    validation images of iNaturalist 2019 (then nothing is held out) and of iCassava 2019."""
    bad_images: Literal["fail", "skip"] = "fail"
    """What to do with files that cannot be read: stop and list them, or leave them out and record that."""
    group_regex: str = ""
    """Pattern searched in each image's path; its first group (or the match) names the group kept in one fold."""
    limit_per_class: Annotated[int, Field(ge=0)] = 0
    """Use only this many training images of each class, drawn by the recipe's seed (0 = all)."""

    @field_validator("group_regex")
    @classmethod
    def _is_regex(cls, value: str) -> str:
        return _regex(value)

    @model_validator(mode="after")
    def _extra_exists(self) -> DataSpec:
        if self.extra and self.source not in WITH_EXTRA:
            raise ValueError(
                f"extra would be ignored by source = {self.source}; {', '.join(WITH_EXTRA)} have extra images"
            )
        return self


class FoldSpec(Section):
    """Cross-validation. In each fold the rows are split into fit, select and score."""

    k: Annotated[int, Field(ge=1, le=50)] = 5
    scheme: Literal["stratified", "grouped", "leave-one-group-out"] = "stratified"
    select: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.15
    """Share of a fold's training rows kept for choosing checkpoints and stages (honest protocol only)."""
    final: Literal["average", "refit"] = "average"
    """What answers on new images: the k fold models averaged, or one model fitted again on all rows."""


class AugmentSpec(Section):
    """Training augmentation; defaults are off, `paper` values are in docs/recipes.md (paper section 4.1, authors' code)."""

    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation, degrees either way."""
    shift: Share = 0.0
    """Largest shift either way, share of the side."""
    shear: Annotated[float, Field(ge=0, le=89)] = 0.0
    """Largest shear angle, degrees."""
    zoom: Share = 0.0
    """Scale drawn from 1 +- zoom, for each axis by itself."""
    channel_shift: Annotated[float, Field(ge=0, le=255)] = 0.0
    """One offset per image, on the 0-255 scale, clipped to the image's own range."""
    hflip: bool = False
    vflip: bool = False
    erasing: Share = 0.0
    """Probability of erasing a random rectangle (timm RandomErasing)."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0


class ViewSpec(Section):
    """Test-time views whose softmaxes are averaged (paper section 4.3)."""

    kind: Literal["center", "flip", "random-crops", "five-crop", "ten-crop", "multi-scale"] = (
        "center"
    )
    n: Annotated[int, Field(ge=1, le=64)] = 1
    """How many random crops (kind = random-crops)."""
    upsample: Annotated[float, Field(ge=1.0, le=2.0)] = 1.0
    """Image side before cropping, as a multiple of img_size (540/501 = 1.078 in the paper)."""
    choose: bool = False
    """Let the out-of-fold rows say how many of these views to keep, or none of them."""


class TrainSpec(Section):
    """How every stage is trained."""

    batch_size: Annotated[int, Field(ge=2)] = 32
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches per optimizer step."""
    optimizer: Literal["adam-keras", "adam", "adamw", "sgd"] = "adamw"
    """adam-keras = the paper's (Keras form, epsilon outside the bias correction)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate multiplier per block, from the head down."""
    label_smoothing: Share = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    clip_grad: Annotated[float, Field(ge=0)] = 0.0
    """Largest global gradient norm (0 = no clipping)."""
    ema: Share = 0.0
    """Decay of the exponential moving average of the weights (0 = off)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    gate: bool = True
    """Keep a stage only if it helps on the select rows by more than its noise (always off under `paper`)."""


class StageSpec(Section):
    """One learning-rate phase; it starts from the best weights so far, with a fresh optimizer (paper section 4.4)."""

    name: Name
    epochs: Annotated[int, Field(ge=1)]
    lr: Annotated[float, Field(gt=0)]
    schedule: Literal["constant", "time", "cosine", "one-cycle"] = "time"
    """time = the paper's eq. 26, lr / (1 + decay * batches) with decay = lr / epochs."""
    trainable: str = "."
    """Regex over parameter names; what it does not find is frozen."""
    frozen: str = ""
    """Regex over parameter names that stay frozen even where `trainable` finds them."""
    members: tuple[str, ...] = ()
    """Whose stage this is. A member that no stage names goes through the stages that name none."""

    @field_validator("trainable", "frozen")
    @classmethod
    def _is_regex(cls, value: str) -> str:
        return _regex(value)


class HeadSpec(Section):
    """What stands on the pooled features: [recurrent] -> Gaussian noise -> [FC, relu] -> linear (paper figure 2)."""

    kind: HeadKind = "linear"
    units: Annotated[int, Field(ge=2)] = 2048
    """Outputs of the recurrent layer (both directions together)."""
    fc: Annotated[int, Field(ge=0)] = 0
    """Width of the fully connected layer before the classifier (the paper: 1024 to 4096; 0 = none)."""
    noise: Annotated[float, Field(ge=0)] = 0.1
    """Standard deviation of the Gaussian noise on the features, training only."""
    activation: Literal["torch", "keras"] = "torch"
    """Gate nonlinearity: sigmoid, or Keras 2.2's hard sigmoid."""
    reset_after: bool = True
    """GRU form: True = torch and TF 2; False = Keras 2.2, the paper's."""
    sequence: Literal["pooled", "rows", "spatial"] = "pooled"
    """pooled = one time step, as in the paper; rows and spatial run over the feature map, T > 1."""


class MemberSpec(Section):
    """One network of the ensemble: a backbone and a head, or several members joined into one network (`joins`)."""

    name: Name
    backbone: str = ""
    """Any timm name, with or without a tag (`tf_efficientnet_lite0.in1k`), or the paper's (`InceptionV3`)."""
    joins: tuple[str, ...] = ()
    """Members to join instead of a backbone: their trained networks of the same fold, side by side, with the head on their
    concatenated softmaxes (E2E-3M, paper section 3.3): `mlp` is Algorithm 1's network, `linear` is equation 19's."""
    weights: str = "pretrained"
    """pretrained, none, or the path of a local .safetensors or .pth file."""
    img_size: Annotated[int, Field(ge=16, le=2048)] = 224
    head: HeadSpec = HeadSpec()
    resize: Literal["squash", "crop"] = "squash"
    """How any image becomes a square: both sides scaled (the paper), or the largest centred square kept."""
    batch_size: Annotated[int, Field(ge=0)] = 0
    """Images per optimizer step of this member (0 = train.batch_size)."""
    folds: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """The only folds this member is trained in (empty = all); in the others the mean of those present stands in for it."""

    @model_validator(mode="after")
    def _one_kind(self) -> MemberSpec:
        if bool(self.backbone) == bool(self.joins):
            raise ValueError(
                "a member has a backbone, or members that it joins: give one of the two"
            )
        if self.joins and (self.head.kind not in ("linear", "mlp") or len(set(self.joins)) < 2):
            raise ValueError(
                "a member that joins needs two members or more, and head.kind linear or mlp"
            )
        if self.joins and self.head != HeadSpec(kind=self.head.kind, fc=self.head.fc):
            raise ValueError("of the head of a member that joins only kind and fc can be set")
        if self.joins and self.weights != "pretrained":
            raise ValueError(
                "a member that joins begins from the weights of those it joins; leave out weights"
            )
        return self


class StackedSpec(Section):
    """The head of the `stacked` ensemble: members' softmaxes -> hidden -> LeakyReLU -> dropout -> classes."""

    hidden: Annotated[int, Field(ge=1)] = 4096
    epochs: Annotated[int, Field(ge=0)] = 0
    """0 = 40, or as many as make 600 steps where rows are few; a short fit with many members and many rows (see `stacked`)."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    batch_size: Annotated[int, Field(ge=1)] = 200


class EnsembleSpec(Section):
    """How the members' softmaxes are combined; each method is scored cross-fitted on out-of-fold rows."""

    methods: tuple[Method, ...] = ("mean", "pruned", "stacked")
    export: Literal["auto"] | Method = "auto"
    """Which one goes into the exported file; auto = the simplest within one standard error of the best out-of-fold."""
    members: tuple[str, ...] = ()
    """The members to combine (empty = all that have a backbone of their own)."""
    top: Annotated[int, Field(ge=0)] = 0
    """Combine only this many, the most accurate out of fold (the paper's top three; 0 = all)."""
    calibration: Literal["none", "temperature", "vector", "auto"] = "temperature"
    """Fitted on out-of-fold rows, scored cross-fitted, carried into the file; auto = the simplest within one standard error."""
    miss: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of images whose right class may be missing from the prediction set (conformal alpha)."""
    reject: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of images of the classes that may be called unknown."""
    disagreement: Share = 0.005
    """Share of images whose class may be another than the full ensemble's where a cascade stops early (0 = no cascade)."""
    stacked: StackedSpec = StackedSpec()


class DistillSpec(Section):
    """A student: one member that learns from the out-of-fold probabilities of a finished run's ensemble (Hinton et al. 2015)."""

    run: str
    """Folder of the finished run that teaches."""
    student: Name = "student"
    """The member that learns from the ensemble; all others learn from the labels only."""
    twin: str = ""
    """A member that differs from the student in its name and in learning from labels only; it begins from the same weights and
    sees the same batches. Empty = none."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the ensemble's probabilities in the loss; the rest is cross-entropy with the labels."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0
    """Softens both sides: softmax(log(p) / temperature) teaches softmax(logits / temperature)."""
    inner: Annotated[int, Field(ge=0, le=50)] = 2
    """Folds of the teachers that are trained anew for each fold of the student, without its scored rows (2 costs about as much as
    the run that teaches). 0 = the run's own answers teach every fold: its networks learned from the scored rows, so scores on
    out-of-fold rows are apparent, and only test rows count."""

    @field_validator("inner")
    @classmethod
    def _is_a_split(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one fold answers no row out of fold; set 2 or more, or 0")
        return value
