"""The recipe: one TOML file that says everything about a run, read strictly into frozen models.

An unknown key is an error that names the nearest known one. `--set a.b=c` changes one value; lists of tables are
addressed by index or by name (`members.lite0.img_size=64`). Imports no torch, so that planning is instant.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from threefold.errors import RecipeError
from threefold.overrides import apply_override

_PACKAGED = Path(__file__).parent / "recipes"
HeadKind = Literal["linear", "mlp", "rnn", "gru", "lstm", "birnn", "bigru", "bilstm"]
Method = Literal["mean", "pruned", "vote", "top2", "weighted", "stacked", "greedy"]
Source = Literal[
    "folder", "csv", "demo", "mnist", "fashion-mnist", "cifar10", "cifar100", "svhn", "inaturalist2019", "icassava2019",
    "cassava2020", "surrey-asl", "parquet", "huggingface",
]  # fmt: skip
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

    kind: Literal["center", "flip", "random-crops", "five-crop", "ten-crop", "multi-scale"] = "center"
    n: Annotated[int, Field(ge=1, le=64)] = 1
    """How many random crops (kind = random-crops)."""
    upsample: Annotated[float, Field(ge=1.0, le=2.0)] = 1.0
    """Image side before cropping, as a multiple of img_size (540/501 = 1.078 in the paper)."""


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
    """One network of the ensemble."""

    name: Name
    backbone: str
    """Any timm name, with or without a tag (`tf_efficientnet_lite0.in1k`)."""
    weights: str = "pretrained"
    """pretrained, none, or the path of a local .safetensors or .pth file."""
    img_size: Annotated[int, Field(ge=16, le=2048)] = 224
    head: HeadSpec = HeadSpec()
    resize: Literal["squash", "crop"] = "squash"
    """How any image becomes a square: both sides scaled (the paper), or the largest centred square kept."""


class EnsembleSpec(Section):
    """How the members' softmaxes are combined; each method is scored cross-fitted on out-of-fold rows."""

    methods: tuple[Method, ...] = ("mean", "pruned", "stacked")
    export: Literal["auto", "mean", "pruned", "vote", "top2", "weighted", "stacked", "greedy"] = "auto"
    """Which one goes into the exported file; auto = the simplest within one standard error of the best out-of-fold."""


class Job(NamedTuple):
    """The unit of work and of resumption: one stage of one member in one fold (fold -1 = refit on all rows)."""

    member: str
    fold: int
    stage: str

    @property
    def path(self) -> str:
        """Folder of this job below the run folder."""
        return f"jobs/{self.member}/{fold_name(self.fold)}/{self.stage}"


def fold_name(fold: int) -> str:
    """Name of a fold's folder: fold0, fold1, ... or refit."""
    return "refit" if fold < 0 else f"fold{fold}"


class Recipe(Section):
    """The whole of a run. Load with `Recipe.load`, write the resolved copy with `dump`."""

    name: Name = "run"
    seed: int = 0
    protocol: Literal["honest", "paper"] = "honest"
    """honest = nothing is chosen on the rows that are scored; paper = selects on them, as the authors did."""
    budget_minutes: Annotated[float, Field(ge=0)] = 0.0
    """Bound on the wall time of training; stages are cut short to keep it (0 = none)."""
    data: DataSpec = DataSpec()
    folds: FoldSpec = FoldSpec()
    augment: AugmentSpec = AugmentSpec()
    views: ViewSpec = ViewSpec()
    train: TrainSpec = TrainSpec()
    ensemble: EnsembleSpec = EnsembleSpec()
    stages: Annotated[tuple[StageSpec, ...], Field(min_length=1)]
    members: Annotated[tuple[MemberSpec, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for what, names in (("stages", [s.name for s in self.stages]), ("members", [m.name for m in self.members])):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"{what} need different names, {', '.join(twice)} stands there twice")
        if self.folds.k == 1 and self.protocol == "honest" and self.folds.scheme != "leave-one-group-out":
            raise ValueError("folds.k = 1 leaves no out-of-fold rows; the honest protocol needs folds.k >= 2")
        if self.folds.scheme != "stratified" and not (self.data.group_regex or self.data.source in WITH_GROUPS):
            raise ValueError(
                f"folds.scheme = {self.folds.scheme} needs groups: set data.group_regex, or use a CSV with a group column"
            )
        if self.folds.scheme == "stratified" and self.data.group_regex:
            raise ValueError(
                "data.group_regex is given, but folds.scheme = stratified would ignore it; set folds.scheme = grouped"
            )
        if self.train.optimizer == "adam-keras" and self.train.weight_decay:
            raise ValueError("adam-keras, the paper's optimizer, has no weight decay; set train.weight_decay = 0")
        if self.views.n > 1 and self.views.kind != "random-crops":
            raise ValueError(
                f"views.n counts random crops and would be ignored by views.kind = {self.views.kind}; set views.n = 1"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a TOML recipe and apply `a.b=c` overrides.

        Raises:
            RecipeError: the file is missing, not TOML, has unknown keys or wrong values.
        """
        try:
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(
                "cannot read the recipe", where=path, got=error.strerror or error, fix="give the path of a .toml file"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError("the recipe is not valid TOML", where=path, got=error) from None
        return cls.parse(tree, overrides, where=str(path))

    @classmethod
    def parse(cls, tree: dict[str, Any], overrides: Iterable[str] = (), where: str = "recipe") -> Recipe:
        """Build a recipe from a tree of plain values; `overrides` are `a.b=c` strings."""
        for override in overrides:
            apply_override(tree, override)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise RecipeError(
                "the recipe is not usable", where=where, got="; ".join(map(_explain, error.errors()))
            ) from None

    def jobs(self, folds: int | None = None) -> list[Job]:
        """Every job in the order of execution; `folds` where the data decide their number (leave-one-group-out)."""
        numbers = list(range(folds or self.folds.k)) + ([-1] if self.folds.final == "refit" else [])
        return [Job(m.name, f, s.name) for m in self.members for f in numbers for s in self.stages]

    def member(self, name: str) -> MemberSpec:
        """The member of that name."""
        return next(m for m in self.members if m.name == name)

    def digest(self) -> str:
        """SHA-256 of all that says what is trained; the name and the budget, which only cuts it short, are left out."""
        tree = self.model_dump(mode="json", exclude={"name", "budget_minutes"})
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def dump(self, header: str = "") -> str:
        """The resolved recipe as TOML text, every default written out; `header` becomes comments above it."""
        comments = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
        return comments + _toml(self.model_dump(mode="json"))


def _explain(error: Any) -> str:
    """One pydantic error as `path: what, did you mean`."""
    path = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] != "extra_forbidden":
        return f"{path}: {error['msg'].removeprefix('Value error, ')}"
    known = list(_fields_at(error["loc"][:-1]))
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
    return f"{path}: unknown key" + (f", did you mean {near[0]}?" if near else f", known are {', '.join(known)}")


def _fields_at(loc: tuple[Any, ...]) -> Iterable[str]:
    """Field names of the section that a pydantic error location points into."""
    section: Any = Recipe
    for part in loc:
        if isinstance(part, str):
            hint = section.model_fields[part].annotation
            section = next((a for a in (hint, *get_args(hint)) if isinstance(a, type) and issubclass(a, Section)), hint)
    return list(section.model_fields)


def _toml(tree: dict[str, Any], prefix: str = "") -> str:
    """Write a tree of plain values as TOML: values first, then tables, then lists of tables."""
    lines, tables = [], []
    for key, value in tree.items():
        if isinstance(value, dict) and not prefix:
            tables.append(f"\n[{key}]\n{_toml(value, key)}")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            tables += [f"\n[[{key}]]\n{_toml(item, key)}" for item in value]
        else:
            lines.append(f"{key} = {_value(value)}\n")
    return "".join(lines + tables)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # a JSON string, number or boolean is also TOML


def packaged(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe that comes with threefold, by name (`demo`).

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in packaged_names():
        raise RecipeError("no such recipe", got=name, expected=f"a .toml file or one of {', '.join(packaged_names())}")
    return Recipe.load(_PACKAGED / f"{name}.toml", overrides)


def packaged_names() -> list[str]:
    """Names of the recipes that come with threefold."""
    return sorted(str(p.relative_to(_PACKAGED).with_suffix("")) for p in _PACKAGED.rglob("*.toml"))


def resolve(text: str, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe by file path or by the name of a packaged one."""
    return Recipe.load(text, overrides) if text.endswith(".toml") else packaged(text, overrides)


def parse_minutes(text: str) -> float:
    """Minutes of a duration: 90s, 20m, 2h, or a number of minutes.

    Raises:
        RecipeError: it is none.
    """
    units = {"s": 1 / 60, "m": 1.0, "h": 60.0}
    number, unit = (text[:-1], units[text[-1]]) if text and text[-1] in units else (text, 1.0)
    try:
        minutes = float(number) * unit
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < 1e6:
        raise RecipeError("not a duration", where="--budget", got=text, expected="90s, 20m, 2h or 0")
    return minutes
