"""What must hold between a recipe's members and tables: students, pseudo labels, one split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from threefold.recipe_schema import (
    DistillSpec,
    MemberSpec,
    PseudoLabelSpec,
    StageSpec,
    ViewSpec,
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
