"""The recipe of a student and its twin, made from that of the run that teaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from threefold.errors import RecipeError
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import MemberSpec, StageSpec
from threefold.training.run import Run

STUDENT: Final = "student"
"""Name of the member that learns from soft targets."""

TWIN: Final = "student-labels"
"""Name of its twin, which learns from labels."""

PROBE: Final = "student-head"
"""Name of the member whose fitted head both start from, if there is one."""


def student_recipe(teacher: Run, run: str, student: str, overrides: Sequence[str] = ()) -> Recipe:
    """Make the recipe of a student and its twin from that of the run that teaches.

    Both have the run's data, folds, augmentation and training, and one refitted network each. Where
    the run's member starts from a head on its frozen backbone, both start from such a head, too.
    `distill.inner` is 0 where the run has test images, which then carry the honest scores, else 2.

    Args:
        teacher: the run that teaches.
        run: its path, as it is written into the recipe.
        student: a member of the run, or a timm name.
        overrides: `a.b=c` changes.

    Raises:
        RecipeError: the student is a member that joins others, no stage of the run tunes a network,
            or an override cannot be used.
    """
    recipe = teacher.recipe
    tree: dict[str, Any] = recipe.model_dump(
        mode="json", exclude={"pseudo_labels"}, exclude_none=True
    )
    member = next((m for m in recipe.members if m.name == student), None)
    if member is not None and member.joins:
        raise RecipeError(
            "a member that joins others is no student",
            got=student,
            fix="name a member with a backbone of its own, or a timm network",
        )
    first = next(m for m in recipe.members if not m.joins)
    spec = member or MemberSpec(
        name=STUDENT, backbone=student, img_size=first.img_size, resize=first.resize
    )
    head, tuning = _student_stages(recipe, (member or first).name)
    start = {"name": PROBE, "folds": [], "starts_from": ""}
    changes = {"name": STUDENT, "folds": [], "starts_from": PROBE if head else ""}
    learner = spec.model_dump(mode="json")
    ensemble = {"methods": ["mean"], "export": "mean", "members": [STUDENT], "top": 0}
    tree |= {
        "name": f"{recipe.name[:60]}-student",
        "budget_minutes": 0.0,
        "folds": tree["folds"] | {"final": "refit"},
        "views": {},
        "ensemble": tree["ensemble"] | ensemble,
        "stages": [
            *(stage.model_dump(mode="json") | {"members": [PROBE]} for stage in head),
            *(stage.model_dump(mode="json") | {"members": []} for stage in tuning),
        ],
        "members": [*([learner | start] if head else []), learner | changes],
        "distill": {
            "run": run,
            "student": STUDENT,
            "inner": 2 if teacher.folder.test is None else 0,
        },
    }
    # Overrides of the student hold for its twin as well.
    alone = Recipe.parse(tree, overrides, where="the student's recipe")
    tree = alone.model_dump(mode="json", exclude_none=True)
    tree["members"] += [m | {"name": TWIN} for m in tree["members"] if m["name"] == STUDENT]
    tree["distill"]["twin"] = TWIN
    return Recipe.parse(tree, where="the student's recipe")


def _student_stages(
    recipe: Recipe, name: str
) -> tuple[tuple[StageSpec, ...], tuple[StageSpec, ...]]:
    """Return the stages of a member's head, if it has one, and those that tune the network.

    A student learns from soft targets in the latter. Those of a probe are the stages of the first
    member that starts from it.

    Raises:
        RecipeError: no stage tunes a network.
    """
    start = recipe.member(name).starts_from or name
    later = [m.name for m in recipe.members if m.starts_from == start]
    head = tuple(stage for stage in recipe.stages_of(start) if stage.kind == "head")
    for member in (name, *later):
        tuning = tuple(stage for stage in recipe.stages_of(member) if stage.kind == "tune")
        if tuning:
            return head, tuning
    raise RecipeError(
        "the run tunes no network, so there are no stages for a student to learn in",
        where=f"member {name}",
        expected="a stage of kind tune",
        fix="distill a run with one",
    )
