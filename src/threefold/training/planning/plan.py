"""Plan a recipe for a folder of images, with a reason and a measured number for every decision."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from threefold.data.dataset import Sources
from threefold.data.detect_source import detect_source, find_fold_column, find_multilabel
from threefold.data.in_memory import run_of_stored_data
from threefold.data.load import load_data
from threefold.data.splits import HOLDOUT
from threefold.files import real_path
from threefold.models.pipeline import pick_device
from threefold.predictions.run_folder import default_run_folder
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import WITH_COLUMNS, DataSpec
from threefold.training.disk_space import image_cache_bytes
from threefold.training.features.cache import FeatureCache
from threefold.training.planning.basis import (
    LEAST_FOLDS,
    PROBE_FOLDS,
    Clock,
    DataSummary,
    Decision,
    Quality,
    finishing_seconds,
)
from threefold.training.planning.candidates import gather_candidates, is_auto, screen
from threefold.training.planning.groups import look_for_groups, plan_with_groups
from threefold.training.planning.image_size import (
    ProbePlan,
    choose_size,
    drop_late_members,
    with_head_seconds,
)
from threefold.training.planning.members import explain_members, probe_members, sized_members
from threefold.training.planning.memory import predict_memory
from threefold.training.planning.overrides import changes_of, check_overrides, mark_overrides
from threefold.training.planning.tuning import (
    Tuning,
    choose_tuning,
    select_share,
    tuning_stages,
)
from threefold.training.progress.watcher import Watcher

BALANCED_FROM = 3
"""Ratio of the largest to the smallest class from which runs are judged by balanced accuracy."""

METHODS = ("mean", "best", "weighted", "greedy", "pool")
"""Ensembles of planned recipes."""


@dataclass
class RecipePlan:
    """A recipe and the reasons for it.

    Attributes:
        recipe: the planned recipe.
        decisions: its values with their reasons.
        sources: the verified images that the plan was made from, which the recipe reads, too.
        memory: what the run takes at its peak, in words.
    """

    recipe: Recipe
    decisions: list[Decision] = field(default_factory=list)
    sources: Sources | None = None
    memory: str = ""

    def explain(self) -> str:
        """The reasons as lines, for the header of the recipe's file."""
        lines = ["made by threefold plan; every value can be changed"]
        lines += [f"{d.key} = {d.value}: {d.reason}" for d in self.decisions]
        if self.sources is not None:
            needed = sum(image_cache_bytes(self.recipe, self.sources).values())
            if needed:
                lines.append(f"disk: decoded images take {needed / 1e9:.2f} GB while it trains")
        if self.memory:
            lines.append(self.memory)
        return "\n".join(lines)


def plan_folder(
    folder: str | Path,
    budget_minutes: float = 20.0,
    members: Sequence[str] = (),
    overrides: Sequence[str] = (),
    quality: Quality = "good",
    watcher: Watcher | None = None,
    group_file: Path | None = None,
    began: float | None = None,
) -> RecipePlan:
    """Choose a recipe for a folder or a table of images.

    Args:
        folder: whatever `detect_source` knows: a folder, an archive, a table, a name on the hub.
        budget_minutes: bound on the wall time of the whole job (0 = none).
        members: timm names, by default three that need no hub; `auto` and more names: `candidates`.
        overrides: `a.b=c`, applied last.
        quality: fast = probes only; good; best = larger images, more epochs and folds, views.
        watcher: receives notes on what is measured.
        group_file: for groups of one scene, if random folds promise too much; None = unsought.
        began: the time.monotonic() value from which the budget counts; None = now.

    Raises:
        DataError: the folder cannot be used.
        RecipeError: an override or a member cannot be used, or the budget is too small.
        RunError: `group_file` cannot be written, or holds other groups.
    """
    clock = Clock.start(budget_minutes * 60, began)
    data, why_task = _data(folder, overrides)
    probes = probe_members(members)
    check_overrides(data, probes, overrides, are_chosen=is_auto(members))
    draft = _draft(data, probes, overrides)  # the plan must see the images of the run
    sources = load_data(draft.data, draft.seed)
    summary = _summarize(sources)
    device = pick_device(draft.train.device)
    cache, screening = FeatureCache(sources, draft, watcher), None
    measured = choose_size(draft, summary, sources, cache, clock, quality)
    if is_auto(members) and len(measured.costs) == len(probes):
        wanted, notes = gather_candidates(members[1:], device, quality)
        screening = screen(wanted, draft, sources, measured, clock, notes, watcher)
        measured = screening.measured
    probes = sized_members(probes, measured, screening)
    draft = _draft(data, probes, overrides)
    found, measured = look_for_groups(draft, measured, sources, cache, clock, group_file)
    if clock.budget:  # nothing else asks how long heads take
        measured = with_head_seconds(measured, draft, sources, cache)
        measured = measured if screening else drop_late_members(measured, clock)
        probes, draft = _first_members(len(measured.costs), probes, draft)
    tuning, why_tuning = choose_tuning(draft, summary, measured, device, clock, quality)
    folds, fit_share, why_folds = _folds(tuning, summary, measured, clock, quality, draft)
    train, why_train = _train(summary, device)
    stages, tuned = tuning_stages(
        tuning,
        probes,
        draft,
        measured.img_size,
        device,
        fit_rows=summary.n * fit_share,
        batch_size=train["batch_size"],
    )
    augment, why_augment = _augment(summary) if tuned else ({}, [])
    decisions = [*why_task, explain_members(probes, members, screening)]
    decisions += [*measured.decisions, why_folds, *why_tuning, *why_augment, *why_train]
    tree: dict[str, Any] = {
        "name": _name(folder),
        "budget_minutes": round(0.9 * clock.left / 60, 2) if budget_minutes else 0.0,
        "data": data,
        "folds": folds,
        "augment": augment,
        "train": train,
        "ensemble": {} if summary.is_multilabel else {"methods": METHODS},
        "stages": stages,
        "members": [*probes, *tuned],
    }
    if quality == "best" and augment.get("hflip"):
        tree["views"] = {"kind": "flip"}
        decisions.append(Decision("views.kind", "flip", "quality best: the mirror image, too"))
    recipe, sources, why_groups = plan_with_groups(tree, overrides, found, sources, group_file)
    decisions = mark_overrides([*decisions, *why_groups], overrides)
    return RecipePlan(recipe, decisions, sources, predict_memory(recipe, sources, cache))


def _data(folder: str | Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[Decision]]:
    """Return the `data` table for a path: of the source that it seems to be, or that is named.

    A column of a table that seems to hold the user's own folds is named in it, unless the overrides
    name a column or another way to make folds. So is the task of a table whose images have any
    number of labels, with the reason.
    """
    changes = changes_of(overrides)
    if "data.source" in changes:
        return {"source": "folder", "root": str(real_path(Path(folder)))}, []
    spec = detect_source(folder)
    data = {"source": spec.source, "root": spec.root}
    if "data.fold_column" not in changes and changes.get("folds.scheme", "column") == "column":
        column = find_fold_column(spec)
        data |= {"fold_column": column} if column else {}
    task, decisions = _task(spec, changes)
    return data | task, decisions


def _task(spec: DataSpec, changes: Mapping[str, str]) -> tuple[dict[str, str], list[Decision]]:
    """Return what the `data` table says of any number of labels, and why; nothing for one class."""
    if "data.task" in changes:
        return {}, []
    if "data.label_separator" in changes:
        return {"task": "multilabel"}, [Decision("data.task", "multilabel", "a separator is named")]
    columns = {
        name: changes[f"data.{name}"]
        for name in ("path_column", "label_column", "group_column", "fold_column")
        if changes.get(f"data.{name}") and spec.source in WITH_COLUMNS
    }
    found = find_multilabel(spec.model_copy(update=columns))
    if found is None:
        return {}, []
    table = {"task": "multilabel"}
    if found.separator:
        table["label_separator"] = found.separator
    reason = f'{found.reason}; if each image has one class, --set data.task="multiclass" says so'
    return table, [Decision("data.task", "multilabel", reason)]


def _name(folder: str | Path) -> str:
    """Name a run after its folder or table."""
    target = run_of_stored_data(Path(folder)) or default_run_folder(Path(folder))
    name = re.sub(r"[^A-Za-z0-9_-]", "-", target.name)
    return name.lstrip("_-")[:80] or "run"


def _draft(data: dict[str, Any], probes: list[dict[str, Any]], overrides: Sequence[str]) -> Recipe:
    """Return a recipe of the probes alone, with those overrides that it can take, for measuring."""
    tree = {
        "data": data,
        "stages": [{"name": "head", "kind": "head"}],
        "members": [dict(probe) for probe in probes],
    }
    if changes_of(overrides).get("data.fold_column", data.get("fold_column")):
        tree["folds"] = {"scheme": "column"}
    names = {str(key) for i, probe in enumerate(probes) for key in (i, probe["name"])}
    relevant = []
    for override in overrides:
        key = override.partition("=")[0].strip()
        section, _, rest = key.partition(".")
        known_member = section == "members" and rest.partition(".")[0] in names
        if known_member or section in ("seed", "train", "features", "folds", "data"):
            relevant.append(override)
    return Recipe.parse(tree, relevant, where="plan")


def _summarize(sources: Sources) -> DataSummary:
    """Count all images, and measure a sample of at most 32."""
    train = sources.train
    if train.targets is not None:
        counts = train.targets.sum(0, dtype=np.int64)
        counts = np.minimum(counts, len(train) - counts)
    else:
        counts = np.bincount(train.labels, minlength=len(train.classes))
    rows = np.linspace(0, len(train) - 1, min(32, len(train))).astype(int)
    sides = [min(train.size_of(int(row))) for row in rows]
    return DataSummary(
        n=len(train),
        images=sources.num_images,
        classes=train.classes,
        smallest_class=int(counts.min()),
        largest_class=int(counts.max()),
        side=int(np.median(sides)),
        own_folds=len(set(train.folds or ())),
        is_multilabel=train.is_multilabel,
    )


def _first_members(
    count: int, probes: list[dict[str, Any]], draft: Recipe
) -> tuple[list[dict[str, Any]], Recipe]:
    """Return the first members, as plain values and as the recipe of the probes."""
    return probes[:count], draft.without([member.name for member in draft.members[count:]])


def _folds(
    tuning: Tuning | None,
    summary: DataSummary,
    measured: ProbePlan,
    clock: Clock,
    quality: Quality,
    draft: Recipe,
) -> tuple[dict[str, Any], float, Decision]:
    """Choose the folds: the user's, those of the tuning, or for probes five if there is time.

    Args:
        tuning: what is tuned; None = nothing.
        summary: of the data.
        measured: the plan of the probes.
        clock: of the job.
        quality: as for the plan.
        draft: the recipe of the probes, which names the column of the user's own folds.

    Returns:
        The `folds` table, the share of the images that each network is fitted on, and the reason.
    """
    select = select_share(summary.n)
    if summary.own_folds:
        table = {"scheme": "column", "final": "refit", "select": round(select, 3)}
        column = draft.data.fold_column
        reason = f"the column {column} of the table has {summary.own_folds} folds of your own"
        share = (1 - select) * (summary.own_folds - 1) / summary.own_folds
        return table, share, Decision("folds.scheme", "column", reason)
    if tuning is not None and tuning.folds == 1:
        reason = (
            f"{round(HOLDOUT * summary.n):,} of {summary.n:,} images are enough to choose and "
            "score on, and each network learns from the others"
        )
        table = {"scheme": "holdout", "select": round(select, 3)}
        return table, (1 - select) * (1 - HOLDOUT), Decision("folds.holdout", HOLDOUT, reason)
    reason = "each image is scored once by heads that never saw it"
    folds = PROBE_FOLDS if tuning is None or quality == "best" else tuning.folds
    finishing = finishing_seconds(len(measured.costs), measured.export_seconds)
    left = max(0.0, clock.left - finishing)
    if tuning is None and measured.probe_seconds(folds) > left:
        folds = LEAST_FOLDS
        needed = measured.probe_seconds(PROBE_FOLDS)
        reason += f"; {PROBE_FOLDS} folds take about {needed:.0f} s, and {left:.0f} s are left"
    folds = max(2, min(folds, summary.smallest_class))
    table = {"k": folds, "final": "refit", "select": round(select, 3)}
    return table, (1 - select) * (folds - 1) / folds, Decision("folds.k", folds, reason)


def _augment(summary: DataSummary) -> tuple[dict[str, Any], list[Decision]]:
    """Mild augmentation; mirror images unless class names read like characters or sides."""
    character = re.compile(r"(digit|letter|number|sign)?[\W_]*(\d+|[A-Za-z])", re.IGNORECASE)
    sided = re.compile(r"(^|[\W_])(left|right|clockwise)([\W_]|$)", re.IGNORECASE)
    characters = all(character.fullmatch(name) for name in summary.classes)
    flip = not characters and not any(sided.search(name) for name in summary.classes)
    why_flip = "class names look like digits, letters or sides, which mirroring would change"
    if flip:
        why_flip = "mirror images keep their class"
    return {"hflip": flip, "rotation": 10.0, "crop": 0.7}, [
        Decision("augment.hflip", str(flip).lower(), why_flip),
        Decision(
            "augment.vflip",
            "false",
            "photographs have an up and a down; set it for microscopy or aerial images",
        ),
        Decision(
            "augment.rotation, crop",
            "10, 0.7",
            "milder than the paper's augmentation, which is meant for 70 epochs",
        ),
    ]


def _train(summary: DataSummary, device: torch.device) -> tuple[dict[str, Any], list[Decision]]:
    """Batch size, label smoothing, and a metric that fits uneven classes."""
    # About a twentieth of the images as a power of two.
    power = int(2 ** int(math.log2(max(8, summary.n / 20))))
    batch_size = min(32 if device.type == "cpu" else 64, max(8, power))
    train: dict[str, Any] = {"batch_size": batch_size}
    decisions = [
        Decision("train.batch_size", batch_size, f"{summary.n} images on {device.type}"),
    ]
    if summary.is_multilabel:
        metric = "mean_average_precision"
        reason = "it needs no thresholds, which are chosen for each label at the end"
        return train | {"metric": metric}, [*decisions, Decision("train.metric", metric, reason)]
    train["label_smoothing"] = 0.1
    if summary.largest_class >= BALANCED_FROM * summary.smallest_class:
        train["metric"] = "balanced_accuracy"
        reason = (
            f"classes have {summary.smallest_class} to {summary.largest_class} images; by plain "
            "accuracy the large ones would decide"
        )
        decisions.append(Decision("train.metric", "balanced_accuracy", reason))
    return train, decisions
