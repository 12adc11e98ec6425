"""Members of a recipe: what one takes over from another, and which may build on which."""

from __future__ import annotations

from typing import Any, Final, Protocol

from threefold.names import count_of
from threefold.recipe.ensemble import EnsembleSpec
from threefold.recipe.schema import FoldSpec, MemberSpec, StageSpec

TAKEN_OVER: Final = ("backbone", "head", "weights", "resize")
"""Keys of a member that one with `starts_from` has in common with it."""


class Members(Protocol):
    """A recipe, as far as its members are concerned."""

    members: tuple[MemberSpec, ...]
    stages: tuple[StageSpec, ...]
    folds: FoldSpec
    ensemble: EnsembleSpec

    @property
    def combined(self) -> tuple[str, ...]:
        """Names of the members that ensembles combine."""

    def stages_of(self, member: str) -> tuple[StageSpec, ...]:
        """Return the stages of a member."""


def take_over(tree: Any) -> Any:
    """Give members with `starts_from` the backbone, head, weights and resize of that member.

    Args:
        tree: plain values, perhaps wrong ones.
    """
    members = tree.get("members") if isinstance(tree, dict) else None
    if not isinstance(members, (list, tuple)) or not all(isinstance(m, dict) for m in members):
        return tree
    by_name = {member.get("name"): member for member in members}
    completed = []
    for member in members:
        base = by_name.get(member.get("starts_from") or None, {})
        taken = {key: base[key] for key in TAKEN_OVER if key in base}
        completed.append({**taken, **member})
    return {**tree, "members": completed}


def check_members(recipe: Members) -> None:
    """Check that the members named exist and can be joined, trained and combined.

    Raises:
        ValueError: one cannot; the message says which, and what to do.
    """
    known = {m.name: m for m in recipe.members}
    named = [
        ("ensemble.members", recipe.ensemble.members),
        *((f"stage {s.name}", s.members) for s in recipe.stages),
    ]
    for member in recipe.members:
        named.append((f"member {member.name}, joins", member.joins))
        start = (member.starts_from,) if member.starts_from else ()
        named.append((f"member {member.name}, starts_from", start))
    for where, names in named:
        for name in names:
            if name not in known:
                raise ValueError(
                    f"{where} names an unknown member, {name}; known: {', '.join(known)}"
                )
    for member in recipe.members:
        if not recipe.stages_of(member.name):
            raise ValueError(f"member {member.name} has no stage; every stage names other members")
        if member.folds and recipe.folds.final == "refit":
            raise ValueError(
                f"folds.final = refit ignores the folds of member {member.name}; remove them"
            )
        for name in member.joins:
            _check_join(recipe, member, known[name])
        if member.starts_from:
            _check_start(recipe, member, known[member.starts_from])
        _check_kinds(recipe, member)
    if recipe.ensemble.top > len(recipe.combined):
        raise ValueError(
            f"ensemble.top = {recipe.ensemble.top} exceeds the "
            f"{count_of(len(recipe.combined), 'member')}"
        )


def _check_base(recipe: Members, where: str, member: MemberSpec, base: MemberSpec) -> None:
    """Check a member that another one builds on: it is trained before, in the same folds."""
    if base.joins or recipe.members.index(base) >= recipe.members.index(member):
        raise ValueError(f"{where} must have its own backbone and come before {member.name}")
    if base.folds and not (member.folds and set(member.folds) <= set(base.folds)):
        raise ValueError(
            f"{where} has only the folds {list(base.folds)}; give {member.name} the same"
        )


def _check_join(recipe: Members, member: MemberSpec, base: MemberSpec) -> None:
    where = f"member {member.name} joins {base.name}, which"
    _check_base(recipe, where, member, base)
    if (base.img_size, base.resize) != (member.img_size, member.resize):
        raise ValueError(
            f"{where} must have the same img_size and resize: all share one batch of images"
        )


def _check_start(recipe: Members, member: MemberSpec, base: MemberSpec) -> None:
    where = f"member {member.name} starts from {base.name}, which"
    _check_base(recipe, where, member, base)
    differing = [key for key in TAKEN_OVER if getattr(base, key) != getattr(member, key)]
    if "head" in differing and base.head.can_start(member.head):
        differing.remove("head")
    if differing:
        raise ValueError(
            f"{where} has another {' and '.join(differing)}; remove them from {member.name}"
        )


def _check_kinds(recipe: Members, member: MemberSpec) -> None:
    """Check that a head stage trains a fresh head on a frozen backbone."""
    stages = recipe.stages_of(member.name)
    for number, stage in enumerate(stages):
        if stage.kind != "head":
            continue
        where = f"stage {stage.name} of kind head"
        if number or member.starts_from:
            raise ValueError(
                f"{where} must be the first stage of member {member.name}, before any tuning"
            )
        if member.joins:
            raise ValueError(f"{where} needs a backbone, and member {member.name} joins others")
