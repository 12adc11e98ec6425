"""Look at a folder of images and choose a recipe, with a reason for every choice."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from threefold.datasets import ImageDataset, Sources, load_data
from threefold.models__member import build_member
from threefold.models__pipeline import pick_device
from threefold.recipe import Recipe
from threefold.recipe_schema import DataSpec, MemberSpec, StageSpec
from threefold.training__optimizers import set_trainable, train_mode

DEFAULT_MEMBERS = (
    ("lite0-linear", "tf_efficientnet_lite0.in1k", {"kind": "linear"}),
    ("lite1-gru", "tf_efficientnet_lite1.in1k", {"kind": "gru", "units": 512}),
    ("lite2-bilstm", "tf_efficientnet_lite2.in1k", {"kind": "bilstm", "units": 512}),
)
"""Three backbones whose weights need no hub, each with another head."""

SIZES = (224, 192, 160, 128, 96, 64)
EFFORTS = ((5, 8), (5, 6), (3, 6), (3, 5), (2, 4))
"""(folds, epochs of the first stage), most thorough first."""
CPU_FROZEN = r"conv_dw|backbone\.(conv_stem|bn1|blocks\.[0-2])\."
"""Left as pretrained on a CPU: the early blocks, and depthwise kernels, whose gradient is several times slower than all else."""
MIN_STEPS = 200
"""Small data sets get more epochs, so that a stage has at least this many steps."""


class Choice(NamedTuple):
    """One decision of a plan."""

    key: str
    value: Any
    reason: str


@dataclass
class Plan:
    """A recipe and why it is as it is."""

    recipe: Recipe
    choices: list[Choice] = field(default_factory=list)
    sources: Sources | None = None
    """The verified images that the plan looked at, if they are those of the recipe."""

    def explain(self) -> str:
        """The reasons as lines, for the head of the recipe's file."""
        return "\n".join(
            ["made by threefold plan; every value can be changed"]
            + [f"{c.key} = {c.value}: {c.reason}" for c in self.choices]
        )


class Fingerprint(NamedTuple):
    """What the plan looks at."""

    n: int
    classes: tuple[str, ...]
    smallest_class: int
    side: int


def plan_folder(
    folder: str | Path,
    budget_minutes: float = 20.0,
    members: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> Plan:
    """Choose a recipe for a folder of images.

    Args:
        folder: class folders, or train/ [val/] test/ with class folders inside.
        budget_minutes: bound on the wall time of the whole job (0 = none).
        members: timm names; empty = three that need no hub.
        overrides: `a.b=c`, applied last.

    Raises:
        DataError: the folder cannot be used.
        RecipeError: an override or a member cannot be used.
    """
    data: dict[str, Any] = {"source": "folder", "root": str(Path(folder).resolve())}
    data |= _data_overrides(overrides)
    spec = DataSpec(**data)
    sources = load_data(spec, 0)
    seen = _fingerprint(sources.train)
    device = pick_device("auto")
    specs = _members(members)
    frozen = CPU_FROZEN if device.type == "cpu" else ""
    choices = [
        Choice(
            "members",
            ", ".join(s["name"] for s in specs),
            "named by you"
            if members
            else "three pretrained networks of different size and head that need no model hub",
        )
    ]
    size, folds, epochs, more = _effort(seen, specs, device, budget_minutes * 60, frozen)
    choices += more
    for member in specs:
        member["img_size"] = size
    augment, why = _augment(seen)
    choices += why
    batch = _batch(seen, device)
    tree: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9_-]", "-", Path(folder).resolve().name).lstrip("_-")[:80]
        or "run",
        "budget_minutes": 0.0
        if not budget_minutes
        else round(_training_seconds(budget_minutes * 60) / 60, 2),
        "data": data,
        "folds": {"k": folds},
        "augment": augment,
        "train": {"batch_size": batch},
        "stages": _stages(epochs, frozen),
        "members": specs,
    }
    choices.append(Choice("train.batch_size", batch, f"{seen.n} images on {device.type}"))
    if frozen:
        choices.append(
            Choice(
                "stages.frozen",
                frozen,
                "no accelerator: early blocks and depthwise kernels stay as pretrained, which makes a step several times cheaper",
            )
        )
    recipe = Recipe.parse(tree, overrides, where="plan")
    same = recipe.data == spec and not (recipe.seed and spec.limit_per_class)
    return Plan(recipe, choices, sources if same else None)


def _data_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The data section as the overrides leave it, so that the plan looks at the data that the run will see."""
    stub = {
        "stages": [{"name": "s", "epochs": 1, "lr": 1e-3}],
        "members": [{"name": "m", "backbone": "none"}],
    }
    mine = [o for o in overrides if o.startswith(("data.", "folds."))]
    named = {override.partition("=")[0].strip() for override in mine}
    return {
        key: value
        for key, value in Recipe.parse(stub, mine).data.model_dump().items()
        if f"data.{key}" in named
    }


def _fingerprint(train: ImageDataset) -> Fingerprint:
    """Counts of everything, and the median side of a sample of the images."""
    counts = np.bincount(train.labels, minlength=len(train.classes))
    rows = np.linspace(0, len(train) - 1, min(32, len(train))).astype(int)
    sides = [min(train.pixels(int(row)).shape[:2]) for row in rows]
    return Fingerprint(len(train), train.classes, int(counts.min()), int(np.median(sides)))


def _members(names: Sequence[str]) -> list[dict[str, Any]]:
    """Members as plain values; named ones get linear, GRU and BiLSTM heads in turn."""
    if not names:
        return [
            {"name": name, "backbone": backbone, "head": dict(head)}
            for name, backbone, head in DEFAULT_MEMBERS
        ]
    heads = [dict(head) for _, _, head in DEFAULT_MEMBERS]
    return [
        {"name": f"m{i}-{name.split('.')[0]}"[:80], "backbone": name, "head": heads[i % len(heads)]}
        for i, name in enumerate(names)
    ]


def _training_seconds(budget: float) -> float:
    """What of a budget is left for training after planning, scoring, export and report."""
    return max(0.5 * budget, budget - 100)


def _effort(
    seen: Fingerprint, specs: list[dict[str, Any]], device: torch.device, budget: float, frozen: str
) -> tuple[int, int, int, list[Choice]]:
    """Image size, folds and epochs: the most thorough that the budget allows at the speed measured here."""
    natural = next((s for s in reversed(SIZES) if s >= min(seen.side, SIZES[0])), SIZES[0])
    allowed = [(k, e) for k, e in EFFORTS if k <= seen.smallest_class] or [(2, 4)]
    if not budget:
        k, e = allowed[0]
        return (
            natural,
            k,
            _at_least(e, seen.n, k),
            [
                Choice("img_size", natural, f"the images' median side is {seen.side} px"),
                Choice("folds.k", k, "no time budget"),
                Choice("epochs", e, "no time budget"),
            ],
        )
    speeds = {s["name"]: _speed(s, len(seen.classes), device, frozen) for s in specs}
    available = _training_seconds(budget)
    options = [(s, k, _at_least(e, seen.n, k)) for s in SIZES if s <= natural for k, e in allowed]
    options += [
        (*options[-1][:2], e) for e in range(options[-1][2] - 1, 1, -1)
    ]  # where nothing fits, fewer epochs
    costs = {o: _seconds(o, seen.n, speeds) for o in options}
    size, k, epochs = next(
        (o for o in options if costs[o] <= available), min(options, key=lambda o: costs[o])
    )
    expected = costs[size, k, epochs]
    rate = sum(1 / _per_image(speed, size) for speed in speeds.values()) / len(speeds)
    reason = f"about {expected / 60:.1f} of {available / 60:.1f} minutes for training, at {rate:.0f} images/s measured here"
    if expected > available:
        reason += "; more than the budget, so stages will be cut short"
    return (
        size,
        k,
        epochs,
        [
            Choice("img_size", size, f"the images' median side is {seen.side} px; {reason}"),
            Choice(
                "folds.k",
                k,
                "each image is scored once by models that never saw it"
                + (
                    f"; the smallest class has {seen.smallest_class}"
                    if seen.smallest_class < 5
                    else ""
                ),
            ),
            Choice(
                "epochs",
                epochs,
                "first stage; two shorter stages at a tenth and a hundredth of its learning rate follow",
            ),
        ],
    )


def _at_least(epochs: int, n: int, k: int, batch: int = 32) -> int:
    """Epochs, or more where the data are so few that they would make too few steps."""
    return min(30, max(epochs, math.ceil(MIN_STEPS * batch / max(1, 0.85 * n * (k - 1) / k))))


def _seconds(option: tuple[int, int, int], n: int, speeds: dict[str, tuple[float, float]]) -> float:
    """Predicted training time of (size, folds, epochs): three stages on a fold's fit rows, plus looking at all rows."""
    size, k, epochs = option
    passes = (k - 1) * 0.85 * (epochs + 2 * max(1, epochs // 4)) + 0.5 * (epochs + 2)
    return n * passes * sum(_per_image(speed, size) for speed in speeds.values())


def _per_image(speed: tuple[float, float], size: int) -> float:
    """Seconds per trained image at a size: a fixed part and a part that grows with the area."""
    return speed[0] + speed[1] * size * size


def _speed(
    spec: dict[str, Any], num_classes: int, device: torch.device, frozen: str
) -> tuple[float, float]:
    """Seconds per image as (fixed, per pixel), from a few training steps on noise at two sizes."""
    small, large = ((size, _probe(spec, num_classes, device, frozen, size)) for size in (64, 128))
    slope = max(0.0, (large[1] - small[1]) / (large[0] ** 2 - small[0] ** 2))
    return max(0.0, small[1] - slope * small[0] ** 2), slope


def _probe(
    spec: dict[str, Any],
    num_classes: int,
    device: torch.device,
    frozen: str,
    size: int,
    batch: int = 16,
) -> float:
    """Best seconds per image of three training steps after a warm-up."""
    member = build_member(
        MemberSpec(**{**spec, "img_size": size, "weights": "none"}), num_classes, pretrained=False
    )
    member.to(device=device).to(memory_format=torch.channels_last)
    set_trainable(member, StageSpec(name="probe", epochs=1, lr=1e-3, frozen=frozen))
    optimizer = torch.optim.AdamW([p for p in member.parameters() if p.requires_grad], fused=True)
    images = torch.rand(batch, 3, size, size, device=device).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    train_mode(member)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        torch.nn.functional.cross_entropy(member(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:]) / batch


def _augment(seen: Fingerprint) -> tuple[dict[str, Any], list[Choice]]:
    """Mild augmentation; mirror images only where class names do not read like characters or sides."""
    sided = re.compile(r"(^|[\W_])(left|right|clockwise)([\W_]|$)", re.IGNORECASE)
    characters = all(
        re.fullmatch(r"(digit|letter|number|sign)?[\W_]*(\d+|[A-Za-z])", name, re.IGNORECASE)
        for name in seen.classes
    )
    flip = not characters and not any(sided.search(name) for name in seen.classes)
    reason = (
        "mirror images keep their class"
        if flip
        else "class names look like digits, letters or sides, which mirroring would change"
    )
    return {"hflip": flip, "rotation": 10.0, "shift": 0.08, "zoom": 0.1}, [
        Choice("augment.hflip", str(flip).lower(), reason),
        Choice(
            "augment.vflip",
            "false",
            "photographs have an up and a down; set it for microscopy or aerial images",
        ),
        Choice(
            "augment.rotation, shift, zoom",
            "10, 0.08, 0.1",
            "milder than the paper's 30, 0.3, 0.3, which need its 70 epochs",
        ),
    ]


def _batch(seen: Fingerprint, device: torch.device) -> int:
    """Smaller for few images; larger on an accelerator."""
    return int(
        min(64 if device.type != "cpu" else 32, max(8, 2 ** int(math.log2(max(8, seen.n / 20)))))
    )


def _stages(epochs: int, frozen: str) -> list[dict[str, Any]]:
    """The paper's three stages, each at a tenth of the rate before; the first warms up and anneals."""
    later = max(1, epochs // 4)
    return [
        {"name": "stage1", "epochs": epochs, "lr": 2e-3, "schedule": "one-cycle", "frozen": frozen},
        {"name": "stage2", "epochs": later, "lr": 2e-4, "schedule": "time", "frozen": frozen},
        {"name": "stage3", "epochs": later, "lr": 2e-5, "schedule": "time", "frozen": frozen},
    ]
