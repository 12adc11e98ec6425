"""Parts of a recipe: members that need others, and the digests that a run may have begun with."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from threefold.recipe.recipe import Recipe


def with_dependents(recipe: Recipe, members: Collection[str]) -> set[str]:
    """Return some members of a recipe, and those that cannot be trained without them.

    A member needs the one that it starts from, those that it joins, and for pseudo labels at least
    one that gives them.

    Args:
        recipe: the recipe.
        members: names, of which some may be unknown.
    """
    names = {member.name for member in recipe.members} & set(members)
    for member in recipe.members:  # one that builds on others comes after them
        is_taught = recipe.uses_pseudo_labels(member.name)
        is_untaught = is_taught and names.issuperset(recipe.teachers)
        if is_untaught or not names.isdisjoint((member.starts_from, *member.joins)):
            names.add(member.name)
    return names


def known_digests(recipe: Recipe) -> Iterator[str]:
    """Yield the digests that a recipe, or that of its probes, may have in the record of a run."""
    tuned = [member.name for member in recipe.members if member.name not in recipe.probes]
    parts = [recipe]
    if tuned and recipe.probes and recipe.distill is None:  # a student is never left for later
        parts.append(recipe.without(tuned))
    for part in parts:
        yield part.digest()
        yield part.digest(as_given=True)
