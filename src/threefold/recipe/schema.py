"""The tables of a recipe: frozen pydantic models that refuse unknown keys.

`recipe.Recipe` combines them and checks what must hold between tables. Imports no torch.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from threefold.names import plain_backbone
from threefold.tasks import Task

HeadKind = Literal["linear", "mlp", "rnn", "gru", "lstm", "birnn", "bigru", "bilstm"]
Metric = Literal[
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "log_loss",
    "roc_auc",
    "mean_average_precision",
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
    "npz",
    "webdataset",
]
WITH_COLUMNS = ("csv", "parquet", "huggingface", "webdataset")
WITH_GROUPS = ("csv", "parquet", "huggingface", "surrey-asl", "webdataset")
_GROUP_KEYS = ("group_column", "group_file", "group_regex")
WITH_LABEL_SETS = ("csv", "parquet", "huggingface", "npz")
WITH_EXTRA = ("svhn", "inaturalist2019", "icassava2019")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=80)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A frozen table of a recipe that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _regex(value: str) -> str:
    """Return the value if it is a valid regular expression."""
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return value


class DataSpec(Section):
    """Where the images come from."""

    source: Source = "folder"
    task: Task = "multiclass"
    """multiclass = each image has one class; multilabel = any number of labels, also none: a column
    of 0 and 1 for each label, or one column that names them all."""
    root: str = ""
    """A folder of class folders (or of train/, val/ and test/) or an archive of one, a CSV,
    parquet or npz file, shards of WebDataset (a pattern, a folder or an address), a name on the
    Hugging Face hub or its address hf://datasets/owner/name, or the folder of a named data set's
    official files or archives."""
    extra: bool = False
    """Also train on the additional labelled images: SVHN's extra set, or the official
    validation images of iNaturalist 2019 (which leaves no test split) and iCassava 2019."""
    bad_images: Literal["fail", "skip"] = "fail"
    """What to do with unreadable files: stop and list them, or skip and record them."""
    group_regex: str = ""
    """Pattern searched for in each image's path. Its first group, or else the whole match, names
    the image's group; a group is never split between folds."""
    group_file: str = ""
    """CSV file `id,group` with the group of every training image, such as the groups that the plan
    finds by features."""
    fold_column: str = ""
    """Column of a table with the fold of each training row, for folds.scheme = column."""
    path_column: Annotated[str, Field(min_length=1)] | None = None
    """Column of a table with the path of each image, or the image itself; by default the one
    with a usual name (path, image, file, filename, image_path, image_id, ...)."""
    label_column: Annotated[str, Field(min_length=1)] | None = None
    """Column of a table with the label of each image; by default the one with a usual name (label,
    class, category, target, species, ...)."""
    group_column: Annotated[str, Field(min_length=1)] | None = None
    """Column of a table with the group of each image, such as a patient; by default a column
    `group`, if there is one. A group is never split between folds."""
    label_separator: Annotated[str, Field(min_length=1, max_length=8)] | None = None
    """What separates the labels in a cell, for task = multilabel; by default it is found: a
    vertical bar, a semicolon, a comma or a space."""
    limit_per_class: Annotated[int, Field(ge=0)] = 0
    """Training images per class, drawn by the recipe's seed (0 = all). For task = multilabel images
    are drawn while one of their labels has fewer."""

    @field_validator("group_regex")
    @classmethod
    def _is_regex(cls, value: str) -> str:
        return _regex(value)

    @model_validator(mode="after")
    def _extra_exists(self) -> DataSpec:
        if self.extra and self.source not in WITH_EXTRA:
            raise ValueError(
                f"source = {self.source} has no extra images; {', '.join(WITH_EXTRA)} have some"
            )
        groups = [key for key in _GROUP_KEYS if getattr(self, key)]
        if len(groups) > 1:
            raise ValueError(f"{' and '.join(groups)} both define groups; keep one of them")
        if self.task == "multilabel" and self.source not in WITH_LABEL_SETS:
            raise ValueError(
                f"source = {self.source} has one class for each image; task = multilabel needs "
                f"{', '.join(WITH_LABEL_SETS)}"
            )
        if self.label_separator and self.task != "multilabel":
            raise ValueError("label_separator needs task = multilabel")
        for key in ("fold_column", "path_column", "label_column", "group_column"):
            if getattr(self, key) and self.source not in WITH_COLUMNS:
                raise ValueError(
                    f"{key} needs a table: source = {', '.join(WITH_COLUMNS)}, not {self.source}"
                )
        return self


class FoldSpec(Section):
    """Cross-validation: each fold splits the rows into fit, select and score."""

    k: Annotated[int, Field(ge=1, le=50)] = 5
    """Number of folds; not used where there is one (holdout) or the data decide it
    (leave-one-group-out, column)."""
    scheme: Literal["stratified", "grouped", "leave-one-group-out", "column", "holdout"] = (
        "stratified"
    )
    """How rows are put into folds; column = the user's own folds, from data.fold_column; holdout =
    one split, for data sets so large that a part of them tells enough."""
    holdout: Annotated[float, Field(gt=0.0, le=0.5)] | None = None
    """Share of the rows that scheme = holdout scores: 0.1, unless it is set."""
    select: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.15
    """Share of a fold's training rows reserved for choosing checkpoints and stages (honest
    protocol)."""
    final: Literal["average", "refit"] = "average"
    """What predicts new images: the mean of the k fold models, or one model refitted on all
    rows."""

    @property
    def ignores_k(self) -> bool:
        """Whether there is one fold, or the data decide their number."""
        return self.scheme in ("leave-one-group-out", "column", "holdout")


class AugmentSpec(Section):
    """Training augmentation, off by default; docs/recipes.md has the paper's values (section
    4.1)."""

    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation in either direction, degrees."""
    shift: Share = 0.0
    """Largest shift in either direction, as a share of the side."""
    shear: Annotated[float, Field(ge=0, le=89)] = 0.0
    """Largest shear angle, degrees."""
    zoom: Share = 0.0
    """Scale drawn from 1 ± zoom, independently for each axis."""
    channel_shift: Annotated[float, Field(ge=0, le=255)] = 0.0
    """Largest offset added to a whole image, on the 0-255 scale, clipped to the image's own
    range."""
    hflip: bool = False
    vflip: bool = False
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Least area of a random resized crop, as a share of the image (1 = no crop)."""
    policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    """A random policy of torchvision: RandAugment (Cubuk et al., 2020) or TrivialAugment (Müller
    and Hutter, 2021)."""
    color: Share = 0.0
    """Strength of random changes of brightness, contrast and saturation."""
    erasing: Share = 0.0
    """Probability of erasing a random rectangle (timm RandomErasing)."""
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0


class ViewSpec(Section):
    """Test-time augmentation: views whose softmaxes are averaged (paper section 4.3)."""

    kind: Literal["center", "flip", "random-crops", "five-crop", "ten-crop", "multi-scale"] = (
        "center"
    )
    n: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of random crops (kind = random-crops)."""
    upsample: Annotated[float, Field(ge=1.0, le=2.0)] = 1.0
    """Image side before cropping, as a multiple of img_size (540/501 = 1.078 in the paper)."""
    choose: bool = False
    """Choose on out-of-fold rows how many of these views to use, possibly none."""


class FeatureSpec(Section):
    """Features of frozen backbones, which stages of kind `head` train on."""

    copies: Annotated[int, Field(ge=0, le=32)] = 0
    """Augmented copies of each training image that heads see beside the image itself."""
    engine: Literal["auto", "torch", "onnxruntime"] = "auto"
    """What computes the features; auto = the fastest here whose answers agree with torch."""


class TrainSpec(Section):
    """Settings common to all stages of training."""

    batch_size: Annotated[int, Field(ge=2)] = 32
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Micro-batches per optimizer step."""
    optimizer: Literal["adam-keras", "adam", "adamw", "sgd"] = "adamw"
    """adam-keras = the paper's optimizer (Keras form: epsilon is not bias-corrected)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning-rate multiplier per block, from the head down."""
    label_smoothing: Share = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    clip_grad: Annotated[float, Field(ge=0)] = 0.0
    """Largest global gradient norm (0 = no clipping)."""
    ema: Share = 0.0
    """Decay of the exponential moving average of the weights (0 = off)."""
    sam: Annotated[float, Field(ge=0)] = 0.0
    """Radius of sharpness-aware minimization (Foret et al., 2021), which doubles the cost of a step
    (0 = off)."""
    metric: Metric = "accuracy"
    """What checkpoints, stages, ensembles and the headline are chosen and reported by. Images with
    any number of labels have mean_average_precision, their default, or log_loss."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto = the fastest of those that this machine computes natively, measured on the network."""
    device: str = "auto"
    devices: Annotated[int, Field(ge=1)] | Literal["all"] = 1
    """How many jobs are trained at the same time, each in a process with a GPU of its own, or with
    its share of the processor's cores; all = one for each GPU, or each core."""
    fsdp: bool = False
    """Divide weights, gradients and the optimizer's state among the processes that train one
    network (FSDP2; Zhao et al., 2023); one process has them all."""
    sync_batchnorm: bool = False
    """Batch norm by the statistics of all images of a batch where several GPUs share it (Peng et
    al., 2018); one process has them anyway."""
    gate: bool = True
    """Keep a stage only if it improves the select rows by more than noise (off under `paper`)."""


class StageSpec(Section):
    """One learning-rate phase, from the best weights so far, with a fresh optimizer (section
    4.4)."""

    name: Name
    kind: Literal["tune", "head"] = "tune"
    """tune = train the network; head = train only the head, on cached features of the frozen
    backbone. A linear head is fitted exactly (logistic regression) and needs no epochs."""
    epochs: Annotated[int, Field(ge=0)] = 0
    lr: Annotated[float, Field(ge=0)] = 0.0
    img_size: Annotated[int, Field(ge=0, le=2048)] = 0
    """Side of the training images in this stage (0 = the member's img_size)."""
    batch_norm: Literal["train", "fixed"] = "train"
    """fixed = batch norm layers keep their statistics, which small data would only blur."""
    cached: bool = False
    """Compute what the frozen first blocks answer once for all folds; train the rest on that. Each
    epoch has its own augmented copy of every image."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after this many epochs without a better one (0 = never)."""
    schedule: Literal["constant", "time", "cosine", "one-cycle"] = "time"
    """time = the paper's equation 26: lr / (1 + decay * batches), with decay = lr / epochs."""
    trainable: str = "."
    """Regular expression searched for in parameter names; parameters without a match are frozen."""
    frozen: str = ""
    """Regular expression; parameters that match stay frozen even if `trainable` matches, too."""
    members: tuple[str, ...] = ()
    """The members this stage trains. Members that no stage names use the stages with an empty
    list."""

    @property
    def reads_images(self) -> bool:
        """Whether it trains on decoded images, and not on cached features or activations."""
        return self.kind == "tune" and not self.cached

    @field_validator("trainable", "frozen")
    @classmethod
    def _is_regex(cls, value: str) -> str:
        return _regex(value)

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> StageSpec:
        if self.kind == "tune" and not (self.epochs and self.lr):
            raise ValueError(f"stage {self.name} of kind tune needs epochs and lr above 0")
        if self.kind == "head":
            useless = [
                key
                for key in ("img_size", "batch_norm", "cached", "patience", "trainable", "frozen")
                if getattr(self, key) != type(self).model_fields[key].default
            ]
            if useless:
                raise ValueError(
                    f"stage {self.name} of kind head ignores {', '.join(useless)}; remove them, "
                    "or set kind = tune"
                )
            if bool(self.epochs) != bool(self.lr):
                raise ValueError(
                    f"stage {self.name} of kind head needs both epochs and lr, or none"
                )
        return self


class HeadSpec(Section):
    """The head: [recurrent] -> Gaussian noise -> [FC, ReLU] -> linear (paper figure 2)."""

    kind: HeadKind = "linear"
    units: Annotated[int, Field(ge=2)] = 2048
    """Outputs of the recurrent layer, both directions together."""
    fc: Annotated[int, Field(ge=0)] = 0
    """Width of the hidden fully connected layer (paper: 1024 to 4096; 0 = none)."""
    noise: Annotated[float, Field(ge=0)] = 0.1
    """Standard deviation of the Gaussian noise added to the features in training."""
    activation: Literal["torch", "keras"] = "torch"
    """Gate activation: torch = sigmoid, keras = Keras 2.2's hard sigmoid."""
    reset_after: bool = True
    """GRU form: True = torch and TF 2; False = Keras 2.2, the paper's."""
    sequence: Literal["pooled", "levels", "rows", "spatial"] = "pooled"
    """pooled = one time step, as in the paper; levels = one time step, too, of the pooled features
    of several depths of the backbone (Head2Toe: Evci et al., 2022); rows and spatial run over the
    feature map (T > 1)."""

    @property
    def takes_map(self) -> bool:
        """Whether it runs over the feature map."""
        return self.sequence in ("rows", "spatial")

    @property
    def is_linear(self) -> bool:
        """Whether it is one layer on the features, which a stage of kind head fits exactly."""
        return self.kind == "linear" and not self.fc

    def can_start(self, other: HeadSpec) -> bool:
        """Whether a member with the head `other` can start from one with this head.

        A linear head is fitted anew where it reads other levels of the backbone.
        """
        if not (self.is_linear and other.is_linear):
            return self == other
        return self.model_copy(update={"sequence": other.sequence}) == other


class MemberSpec(Section):
    """One network of the ensemble: a backbone with a head, or several joined members."""

    name: Name
    backbone: str = ""
    """A timm name, with or without a tag (`tf_efficientnet_lite0.in1k`), or the paper's
    (`InceptionV3`)."""
    joins: tuple[str, ...] = ()
    """Members to join instead of a backbone (E2E-3M, paper section 3.3): the head takes the
    concatenated softmaxes of their trained networks of the same fold. Head `mlp` is Algorithm 1's
    network, `linear` is equation 19's."""
    starts_from: str = ""
    """A member whose trained network of the same fold this one starts from: probe first, then tune
    (Kumar et al., 2022). It takes over backbone, head, weights and resize."""
    weights: str = "pretrained"
    """pretrained, none, or the path of a local .safetensors or .pth file, in any usual form of a
    checkpoint."""
    img_size: Annotated[int, Field(ge=16, le=2048)] = 224
    head: HeadSpec = HeadSpec()
    resize: Literal["squash", "crop"] = "squash"
    """How an image becomes square: squash scales both sides (the paper), crop keeps the centre
    square."""
    batch_size: Annotated[int, Field(ge=0)] = 0
    """Batch size of this member (0 = train.batch_size)."""
    folds: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Folds in which this member is trained (empty = all). In the others, the mean of the members
    present replaces it."""

    @field_validator("backbone")
    @classmethod
    def _plain(cls, value: str) -> str:
        return plain_backbone(value)

    @model_validator(mode="after")
    def _one_kind(self) -> MemberSpec:
        if bool(self.backbone) == bool(self.joins):
            raise ValueError("a member needs either backbone or joins, and not both")
        if self.joins and (self.head.kind not in ("linear", "mlp") or len(set(self.joins)) < 2):
            raise ValueError(
                "joins needs at least two different members, and head.kind linear or mlp"
            )
        if self.joins and self.head != HeadSpec(kind=self.head.kind, fc=self.head.fc):
            raise ValueError("the head of a member with joins accepts only kind and fc")
        if self.joins and self.weights != "pretrained":
            raise ValueError(
                "a member with joins starts from the weights of its members; remove weights"
            )
        return self


class PseudoLabelSpec(Section):
    """Pseudo-labelling (Lee, 2013): some members also learn from unlabelled images.

    In each fold the members before the first of these answer the images, with that fold's networks,
    which have not seen the rows that it scores.
    """

    images: Annotated[str, Field(min_length=1)]
    """Folder of unlabelled images, at any depth; none may be a training or test image."""
    members: Annotated[tuple[str, ...], Field(min_length=1)]
    """The members that learn from them; all others learn from the labels only."""
    threshold: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.9
    """Least probability of the most likely class; images below it are left out."""
    targets: Literal["soft", "hard"] = "soft"
    """soft = the probabilities themselves (Noisy Student: Xie et al., 2020); hard = the most likely
    class (Lee, 2013)."""
    weight: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    """Weight of an unlabelled image in the loss, where a labelled one has 1."""


class DistillSpec(Section):
    """Distillation: one member learns from the ensemble of a finished run (Hinton et al., 2015)."""

    run: str
    """Folder of the finished run that is the teacher."""
    student: Name = "student"
    """The member that learns from the teacher; all others learn from the labels only."""
    twin: str = ""
    """A copy of the student that learns from labels only, with the same initial weights and
    batches; the comparison shows what the teacher adds. Empty = none."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the teacher in the loss; the rest is cross-entropy with the labels."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0
    """Temperature of both sides: softmax(log(p) / T) is the target of softmax(logits / T)."""
    inner: Annotated[int, Field(ge=0, le=50)] = 2
    """For each fold of the student, teachers are retrained without its scored rows, with this many
    inner folds (2 costs about as much as the teacher's run). 0 = the run's own predictions teach
    every fold; its networks saw the scored rows, so out-of-fold scores are apparent and only test
    rows count."""

    @field_validator("inner")
    @classmethod
    def _is_a_split(cls, value: int) -> int:
        if value == 1:
            raise ValueError("a single inner fold has no out-of-fold rows; set 2 or more, or 0")
        return value
