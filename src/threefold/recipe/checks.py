"""What must hold between the tables of a recipe: tasks, folds, students, pseudo labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from threefold.recipe.ensemble import EnsembleSpec
from threefold.recipe.schema import (
    WITH_GROUPS,
    AugmentSpec,
    DataSpec,
    DistillSpec,
    FoldSpec,
    MemberSpec,
    PseudoLabelSpec,
    StageSpec,
    TrainSpec,
    ViewSpec,
)

MULTILABEL: Final[dict[str, dict[str, Any]]] = {
    "train": {"metric": "mean_average_precision"},
    "ensemble": {"methods": ("mean", "best"), "calibration": "logistic"},
}
"""Defaults of recipes for images with any number of labels, where they differ from others."""


def with_task_defaults(tree: Any) -> Any:
    """Add what a recipe for images with any number of labels leaves out.

    Args:
        tree: plain values, perhaps wrong ones.
    """
    data = tree.get("data") if isinstance(tree, Mapping) else None
    task = data.get("task") if isinstance(data, Mapping) else getattr(data, "task", None)
    if task != "multilabel":
        return tree
    completed = dict(tree)
    for section, defaults in MULTILABEL.items():
        given = tree.get(section, {})
        if isinstance(given, Mapping):
            completed[section] = {**defaults, **given}
    return completed


def check_task(
    data: DataSpec,
    train: TrainSpec,
    ensemble: EnsembleSpec,
    views: ViewSpec,
    members: Sequence[MemberSpec],
    others: Mapping[str, object],
) -> None:
    """Refuse settings that mean nothing for the task of a recipe.

    Args:
        data: its tables, as the next ones.
        train: settings of training.
        ensemble: settings of ensembles.
        views: test-time views.
        members: its members.
        others: tables that may be None: distill, pseudo_labels.

    Raises:
        ValueError: there is one; the message says what to do.
    """
    if data.task == "multiclass":
        if train.metric == "mean_average_precision":
            raise ValueError("train.metric = mean_average_precision needs data.task = multilabel")
        if ensemble.calibration == "logistic":
            raise ValueError("ensemble.calibration = logistic needs data.task = multilabel")
        return
    default, why = EnsembleSpec(), "data.task = multilabel: images have any number of labels"
    if train.metric not in ("mean_average_precision", "log_loss"):
        raise ValueError(
            f"{why}, and train.metric = {train.metric} needs one class; set "
            "mean_average_precision or log_loss"
        )
    if set(ensemble.methods) != {"mean", "best"}:
        raise ValueError(
            f"{why}, whose ensembles are the mean and the best member; remove ensemble.methods, or "
            'set ["mean", "best"]'
        )
    if ensemble.export not in ("auto", "mean", "best"):
        raise ValueError(
            f"{why}, and ensemble.export = {ensemble.export} needs one class; set auto, mean or "
            "best"
        )
    if ensemble.calibration != "logistic":
        raise ValueError(f"{why}, which are calibrated one by one; remove ensemble.calibration")
    unused = [
        key
        for key in ("top", "alpha", "reject", "disagreement", "stacked")
        if getattr(ensemble, key) != getattr(default, key)
    ]
    unused = [f"ensemble.{key}" for key in unused]
    unused += ["train.class_weights"] if train.class_weights != "none" else []
    unused += ["train.sampler"] if train.sampler != "shuffle" else []
    unused += ["views.choose"] if views.choose else []
    unused += [name for name, table in others.items() if table is not None]
    unused += [f"members.{member.name}.joins" for member in members if member.joins]
    if unused:
        raise ValueError(f"{why}, and {', '.join(unused)} need one class; remove what is named")


def check_cached(
    stages: Sequence[StageSpec], augment: AugmentSpec, protocol: str, folds: FoldSpec
) -> None:
    """Check that cached stages have nothing that must see the pixels of a whole batch.

    Raises:
        ValueError: one has.
    """
    for stage in stages:
        if not stage.cached:
            continue
        mixing = [k for k in ("mixup", "cutmix", "erasing") if getattr(augment, k)]
        if mixing:
            raise ValueError(
                f"stage {stage.name} is cached and cannot mix or erase pixels: set "
                f"{' and '.join(f'augment.{key} = 0' for key in mixing)}, or cached = false"
            )
        if protocol == "paper" and folds.k == 1:
            raise ValueError(
                f"stage {stage.name} is cached and needs select rows; set folds.k >= 2"
            )
        if stage.img_size:
            raise ValueError(
                f"stage {stage.name} is cached and has the size of its member; remove img_size"
            )


def check_folds(
    folds: FoldSpec, data: DataSpec, views: ViewSpec, distill: DistillSpec | None, protocol: str
) -> None:
    """Refuse a scheme of folds without what it needs, or beside keys that it would ignore.

    Raises:
        ValueError: there is one; the message says what to do.
    """
    if folds.k == 1 and protocol == "honest" and not folds.ignores_k:
        raise ValueError(
            "folds.k = 1 leaves no out-of-fold rows; the honest protocol needs folds.k >= 2"
        )
    if folds.holdout is not None and folds.scheme != "holdout":
        raise ValueError(
            f"folds.scheme = {folds.scheme} ignores folds.holdout; set folds.scheme = holdout"
        )
    if folds.scheme == "holdout":
        check_holdout(protocol, views, distill)
    if (folds.scheme == "column") != bool(data.fold_column):
        raise ValueError(
            f"folds.scheme = {folds.scheme} ignores data.fold_column; set folds.scheme = column"
            if data.fold_column
            else "folds.scheme = column needs data.fold_column, the name of a table's column"
        )
    if folds.scheme in ("grouped", "leave-one-group-out") and not (
        data.group_regex or data.group_file or data.source in WITH_GROUPS
    ):
        raise ValueError(
            f"folds.scheme = {folds.scheme} needs groups; "
            "set data.group_regex or data.group_file, or use a CSV file with a group column"
        )
    for key in ("group_regex", "group_file"):
        if folds.scheme == "stratified" and getattr(data, key):
            raise ValueError(
                f"folds.scheme = stratified ignores data.{key}; set folds.scheme = grouped"
            )


def check_holdout(protocol: str, views: ViewSpec, distill: DistillSpec | None) -> None:
    """Refuse one split where every row must be scored, or several folds are needed.

    Raises:
        ValueError: they are.
    """
    if protocol == "paper":
        raise ValueError("folds.scheme = holdout needs protocol = honest")
    if views.choose:
        raise ValueError("views.choose needs several folds; folds.scheme = holdout has one")
    if distill is not None:
        raise ValueError("a student needs the folds of its teacher, not folds.scheme = holdout")


def check_distill(
    spec: DistillSpec,
    members: Sequence[MemberSpec],
    stages_of: Callable[[str], tuple[StageSpec, ...]],
    protocol: str,
) -> None:
    """Check that student and twin are members that differ in name only, in an honest run.

    Args:
        spec: the `distill` table.
        members: of the recipe.
        stages_of: maps a member's name to its stages.
        protocol: of the recipe.

    Raises:
        ValueError: they are not.
    """
    if protocol == "paper":
        raise ValueError("distill needs protocol = honest: it compares on rows that chose nothing")
    by_name = {member.name: member for member in members}
    for key, name in (("student", spec.student), ("twin", spec.twin)):
        if name not in by_name and (key == "student" or name):
            raise ValueError(
                f"distill.{key} names an unknown member, {name}; known: {', '.join(by_name)}"
            )
    student = by_name[spec.student]
    if student.joins or student.folds:
        raise ValueError(
            "distill.student needs its own backbone and all folds; remove joins and folds"
        )
    heads = [stage.name for stage in stages_of(spec.student) if stage.kind == "head"]
    if heads:
        raise ValueError(
            f"stage {heads[0]} of kind head learns from labels only, and {spec.student} is a "
            "student; give that stage to a member of its own and let starts_from name it"
        )
    if spec.twin and (
        spec.twin == spec.student
        or by_name[spec.twin].model_copy(update={"name": spec.student}) != student
        or stages_of(spec.twin) != stages_of(spec.student)
    ):
        raise ValueError(
            f"distill.twin may differ from {spec.student} in its name only; "
            "otherwise the comparison means nothing"
        )


def check_pseudo_labels(
    spec: PseudoLabelSpec,
    members: Sequence[MemberSpec],
    teachers: Sequence[str],
    protocol: str,
    distill: DistillSpec | None,
) -> None:
    """Check that in every fold some members answer the unlabelled images before others learn.

    Args:
        spec: the `pseudo_labels` table.
        members: of the recipe.
        teachers: names of the members that answer the images.
        protocol: of the recipe.
        distill: its `distill` table.

    Raises:
        ValueError: they do not.
    """
    if protocol == "paper":
        raise ValueError(
            "pseudo_labels needs protocol = honest: under paper, the rows that a fold scores have "
            "chosen the networks that answer unlabelled images"
        )
    if distill is not None:
        raise ValueError(
            "pseudo_labels and distill both teach members; remove one of the two tables"
        )
    by_name = {member.name: member for member in members}
    answered = {fold for name in teachers for fold in by_name[name].folds}
    in_all_folds = any(not by_name[name].folds for name in teachers)
    for name in spec.members:
        if name not in by_name:
            raise ValueError(
                f"pseudo_labels.members names an unknown member, {name}; "
                f"known: {', '.join(by_name)}"
            )
        folds = by_name[name].folds
        if by_name[name].joins:
            raise ValueError(f"pseudo_labels.members needs backbones, and {name} joins others")
        if not in_all_folds and not (folds and set(folds) <= answered):
            raise ValueError(
                f"no member answers the unlabelled images for {name} in all its folds; put one "
                "with a backbone of its own, and the same folds, before all of "
                "pseudo_labels.members"
            )
