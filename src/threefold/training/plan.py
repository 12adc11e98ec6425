"""Plan a recipe for a folder of images, with a reason for every decision."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from threefold.data.dataset import ImageDataset, Sources, load_data
from threefold.models.backbones import CPU_FROZEN
from threefold.models.member import build_member
from threefold.models.pipeline import pick_device
from threefold.recipe import Recipe
from threefold.recipe_schema import DataSpec, MemberSpec, StageSpec
from threefold.training.optimizers import set_trainable, train_mode

DEFAULT_MEMBERS = (
    ("lite0-linear", "tf_efficientnet_lite0.in1k", {"kind": "linear"}),
    ("lite1-gru", "tf_efficientnet_lite1.in1k", {"kind": "gru", "units": 512}),
    ("lite2-bilstm", "tf_efficientnet_lite2.in1k", {"kind": "bilstm", "units": 512}),
)
"""Name, backbone and head of three networks whose weights need no hub."""

SIZES = (224, 192, 160, 128, 96, 64)
"""Image sizes to choose from."""

EFFORTS = ((5, 8), (5, 6), (3, 6), (3, 5), (2, 4))
"""(folds, epochs of the first stage) to choose from, most thorough first."""

MIN_STEPS = 200
"""Least optimizer steps of the first stage: small data sets get more epochs."""


class Decision(NamedTuple):
    """One value of a planned recipe."""

    key: str
    value: Any
    reason: str


@dataclass
class RecipePlan:
    """A recipe and the reasons for it.

    Attributes:
        recipe: the planned recipe.
        decisions: its values with their reasons.
        sources: the verified images that the plan was made from, if the recipe reads the same ones.
    """

    recipe: Recipe
    decisions: list[Decision] = field(default_factory=list)
    sources: Sources | None = None

    def explain(self) -> str:
        """The reasons as lines, for the header of the recipe's file."""
        lines = ["made by threefold plan; every value can be changed"]
        lines += [f"{d.key} = {d.value}: {d.reason}" for d in self.decisions]
        return "\n".join(lines)


class DataSummary(NamedTuple):
    """What the plan depends on."""

    n: int
    classes: tuple[str, ...]
    smallest_class: int
    """Images of the smallest class."""
    side: int
    """Median of the images' shorter sides, in pixels."""


class Effort(NamedTuple):
    """What determines the training time."""

    img_size: int
    folds: int
    epochs: int
    """Of the first stage."""


class Speed(NamedTuple):
    """Seconds per trained image: a fixed part and a part that grows with the area."""

    fixed: float
    per_pixel: float

    def per_image(self, img_size: int) -> float:
        """Seconds per trained image of a size."""
        return self.fixed + self.per_pixel * img_size * img_size


def plan_folder(
    folder: str | Path,
    budget_minutes: float = 20.0,
    members: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> RecipePlan:
    """Choose a recipe for a folder of images.

    Args:
        folder: class folders, or train/ [val/] test/ with class folders inside.
        budget_minutes: bound on the wall time of the whole job (0 = none).
        members: timm names; by default three networks that need no hub.
        overrides: `a.b=c`, applied last.

    Raises:
        DataError: the folder cannot be used.
        RecipeError: an override or a member cannot be used.
    """
    data: dict[str, Any] = {"source": "folder", "root": str(Path(folder).resolve())}
    data |= _data_overrides(overrides)
    spec = DataSpec(**data)
    sources = load_data(spec, 0)
    summary = _summarize(sources.train)
    device = pick_device("auto")
    specs = _members(members)
    frozen = CPU_FROZEN if device.type == "cpu" else ""
    why_members = "three pretrained networks of different size and head that need no model hub"
    if members:
        why_members = "named by you"
    decisions = [Decision("members", ", ".join(s["name"] for s in specs), why_members)]
    effort, why = _choose_effort(summary, specs, device, budget_minutes * 60, frozen)
    decisions += why
    for member in specs:
        member["img_size"] = effort.img_size
    augment, why = _augment(summary)
    decisions += why
    batch_size = _batch_size(summary, device)
    decisions.append(
        Decision("train.batch_size", batch_size, f"{summary.n} images on {device.type}")
    )
    if frozen:
        why_frozen = (
            "no accelerator: early blocks and depthwise kernels stay as pretrained, which makes a "
            "step several times cheaper"
        )
        decisions.append(Decision("stages.frozen", frozen, why_frozen))
    name = re.sub(r"[^A-Za-z0-9_-]", "-", Path(folder).resolve().name).lstrip("_-")[:80]
    training_minutes = _training_seconds(budget_minutes * 60) / 60 if budget_minutes else 0.0
    tree: dict[str, Any] = {
        "name": name or "run",
        "budget_minutes": round(training_minutes, 2),
        "data": data,
        "folds": {"k": effort.folds},
        "augment": augment,
        "train": {"batch_size": batch_size},
        "stages": _stages(effort.epochs, frozen),
        "members": specs,
    }
    recipe = Recipe.parse(tree, overrides, where="plan")
    # Overrides may change the data, and the seed which images a limit keeps.
    reads_the_same = recipe.data == spec and not (recipe.seed and spec.limit_per_class)
    return RecipePlan(recipe, decisions, sources if reads_the_same else None)


def _data_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The overridden values of the data section: the plan must see the images of the run."""
    relevant = [o for o in overrides if o.startswith(("data.", "folds."))]
    stub = {
        "stages": [{"name": "s", "epochs": 1, "lr": 1e-3}],
        "members": [{"name": "m", "backbone": "none"}],
    }
    data = Recipe.parse(stub, relevant).data.model_dump()
    keys = {override.partition("=")[0].strip() for override in relevant}
    return {key: value for key, value in data.items() if f"data.{key}" in keys}


def _summarize(train: ImageDataset) -> DataSummary:
    """Count all images, and measure a sample of at most 32."""
    counts = np.bincount(train.labels, minlength=len(train.classes))
    rows = np.linspace(0, len(train) - 1, min(32, len(train))).astype(int)
    sides = [min(train.pixels(int(row)).shape[:2]) for row in rows]
    return DataSummary(
        n=len(train),
        classes=train.classes,
        smallest_class=int(counts.min()),
        side=int(np.median(sides)),
    )


def _members(names: Sequence[str]) -> list[dict[str, Any]]:
    """Members as plain values; named ones get linear, GRU and BiLSTM heads in turn."""
    if not names:
        return [
            {"name": name, "backbone": backbone, "head": dict(head)}
            for name, backbone, head in DEFAULT_MEMBERS
        ]
    heads = [head for _, _, head in DEFAULT_MEMBERS]
    return [
        {
            "name": f"m{i}-{name.split('.')[0]}"[:80],
            "backbone": name,
            "head": dict(heads[i % len(heads)]),
        }
        for i, name in enumerate(names)
    ]


def _training_seconds(budget: float) -> float:
    """The part of a budget for training; planning, scoring, export and report take the rest."""
    return max(0.5 * budget, budget - 100)


def _choose_effort(
    summary: DataSummary,
    specs: list[dict[str, Any]],
    device: torch.device,
    budget: float,
    frozen: str,
) -> tuple[Effort, list[Decision]]:
    """Choose the most thorough effort that the budget (seconds) allows at the measured speed."""
    sizes = [size for size in SIZES if size >= min(summary.side, SIZES[0])]
    largest = min(sizes)
    allowed = [(k, e) for k, e in EFFORTS if k <= summary.smallest_class] or [(2, 4)]
    why_size = f"the images' median side is {summary.side} px"
    if not budget:
        k, epochs = allowed[0]
        return Effort(largest, k, _enough_epochs(epochs, summary.n, k)), [
            Decision("img_size", largest, why_size),
            Decision("folds.k", k, "no time budget"),
            Decision("epochs", epochs, "no time budget"),
        ]
    speeds = {s["name"]: measure_speed(s, len(summary.classes), device, frozen) for s in specs}
    available = _training_seconds(budget)
    efforts = [
        Effort(size, k, _enough_epochs(epochs, summary.n, k))
        for size in SIZES
        if size <= largest
        for k, epochs in allowed
    ]
    least = efforts[-1]
    efforts += [least._replace(epochs=epochs) for epochs in range(least.epochs - 1, 1, -1)]
    seconds = {effort: predict_seconds(effort, summary.n, speeds) for effort in efforts}
    affordable = [effort for effort in efforts if seconds[effort] <= available]
    effort = affordable[0] if affordable else min(efforts, key=lambda e: seconds[e])
    rate = sum(1 / s.per_image(effort.img_size) for s in speeds.values()) / len(speeds)
    why_size += (
        f"; about {seconds[effort] / 60:.1f} of {available / 60:.1f} minutes for training, "
        f"at {rate:.0f} images/s measured here"
    )
    if not affordable:
        why_size += "; more than the budget, so stages will be cut short"
    why_folds = "each image is scored once by models that never saw it"
    if summary.smallest_class < 5:
        why_folds += f"; the smallest class has {summary.smallest_class}"
    why_epochs = (
        "first stage; two shorter stages at a tenth and a hundredth of its learning rate follow"
    )
    return effort, [
        Decision("img_size", effort.img_size, why_size),
        Decision("folds.k", effort.folds, why_folds),
        Decision("epochs", effort.epochs, why_epochs),
    ]


def _enough_epochs(epochs: int, n: int, k: int, batch: int = 32) -> int:
    """Raise the number of epochs, to 30 at most, until a fold has MIN_STEPS steps."""
    return min(30, max(epochs, math.ceil(MIN_STEPS * batch / max(1, 0.85 * n * (k - 1) / k))))


def predict_seconds(effort: Effort, n: int, speeds: Mapping[str, Speed]) -> float:
    """Predict the training time: three stages on the fit rows of each fold, and predictions.

    Args:
        effort: image size, folds and epochs.
        n: training images.
        speeds: of every member.
    """
    _, k, epochs = effort
    passes = (k - 1) * 0.85 * (epochs + 2 * max(1, epochs // 4)) + 0.5 * (epochs + 2)
    return n * passes * sum(speed.per_image(effort.img_size) for speed in speeds.values())


def measure_speed(
    spec: dict[str, Any], num_classes: int, device: torch.device, frozen: str
) -> Speed:
    """Measure a member's speed in a few training steps on noise at two sizes.

    Args:
        spec: the member as plain values.
        num_classes: outputs of its head.
        device: where to train.
        frozen: regex of the parameters that are not trained.
    """
    small, large = 64, 128
    at_small, at_large = (_probe(spec, num_classes, device, frozen, s) for s in (small, large))
    per_pixel = max(0.0, (at_large - at_small) / (large**2 - small**2))
    return Speed(max(0.0, at_small - per_pixel * small**2), per_pixel)


def _probe(
    spec: dict[str, Any], num_classes: int, device: torch.device, frozen: str, size: int
) -> float:
    """Least seconds per image of three training steps after a warm-up."""
    batch_size = 16
    member = build_member(
        MemberSpec(**{**spec, "img_size": size, "weights": "none"}), num_classes, pretrained=False
    )
    member.to(device=device).to(memory_format=torch.channels_last)
    set_trainable(member, StageSpec(name="probe", epochs=1, lr=1e-3, frozen=frozen))
    optimizer = torch.optim.AdamW([p for p in member.parameters() if p.requires_grad], fused=True)
    images = torch.rand(batch_size, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    train_mode(member)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        loss = torch.nn.functional.cross_entropy(member(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:]) / batch_size


def _augment(summary: DataSummary) -> tuple[dict[str, Any], list[Decision]]:
    """Mild augmentation; mirror images unless class names read like characters or sides."""
    character = re.compile(r"(digit|letter|number|sign)?[\W_]*(\d+|[A-Za-z])", re.IGNORECASE)
    sided = re.compile(r"(^|[\W_])(left|right|clockwise)([\W_]|$)", re.IGNORECASE)
    characters = all(character.fullmatch(name) for name in summary.classes)
    flip = not characters and not any(sided.search(name) for name in summary.classes)
    why_flip = "class names look like digits, letters or sides, which mirroring would change"
    if flip:
        why_flip = "mirror images keep their class"
    return {"hflip": flip, "rotation": 10.0, "shift": 0.08, "zoom": 0.1}, [
        Decision("augment.hflip", str(flip).lower(), why_flip),
        Decision(
            "augment.vflip",
            "false",
            "photographs have an up and a down; set it for microscopy or aerial images",
        ),
        Decision(
            "augment.rotation, shift, zoom",
            "10, 0.08, 0.1",
            "milder than the paper's 30, 0.3, 0.3, which need its 70 epochs",
        ),
    ]


def _batch_size(summary: DataSummary, device: torch.device) -> int:
    """About a twentieth of the images as a power of two: 8 to 32, or to 64 on an accelerator."""
    power = int(2 ** int(math.log2(max(8, summary.n / 20))))
    return min(32 if device.type == "cpu" else 64, max(8, power))


def _stages(epochs: int, frozen: str) -> list[dict[str, Any]]:
    """The paper's three stages, each at a tenth of the rate before; the first uses one-cycle."""
    later = max(1, epochs // 4)
    return [
        {"name": "stage1", "epochs": epochs, "lr": 2e-3, "schedule": "one-cycle", "frozen": frozen},
        {"name": "stage2", "epochs": later, "lr": 2e-4, "schedule": "time", "frozen": frozen},
        {"name": "stage3", "epochs": later, "lr": 2e-5, "schedule": "time", "frozen": frozen},
    ]
