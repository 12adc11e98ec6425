"""What the user sets in place of the plan's values: refused early, and named in the reasons."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from threefold.recipe.recipe import Recipe
from threefold.training.planning.basis import Decision
from threefold.training.planning.tuning import tuned_name


def changes_of(overrides: Sequence[str]) -> dict[str, str]:
    """Return the values that overrides set, as texts, by their keys."""
    pairs = [text.partition("=")[::2] for text in overrides]
    return {key.strip(): value.strip().strip("\"'") for key, value in pairs}


def check_overrides(
    data: dict[str, Any],
    probes: list[dict[str, Any]],
    overrides: Sequence[str],
    *,
    are_chosen: bool,
) -> None:
    """Refuse overrides that no plan can take, before anything is read or measured.

    Args:
        data: the table of the recipe.
        probes: the members named.
        overrides: `a.b=c`.
        are_chosen: whether the members are still to be chosen, so that their names are unknown.

    Raises:
        RecipeError: a key, stage or member is unknown, or a value has the wrong type.
    """
    tuned = [{"name": tuned_name(probe["name"]), "starts_from": probe["name"]} for probe in probes]
    names = [member["name"] for member in tuned]
    stages = [
        {"name": name, "epochs": 1, "lr": 1e-3, "members": names} for name in ("tune1", "tune2")
    ]
    head = {"name": "head", "kind": "head", "members": [probe["name"] for probe in probes]}
    tree = copy.deepcopy({"data": data, "stages": [head, *stages], "members": [*probes, *tuned]})
    known = [text for text in overrides if not (are_chosen and text.startswith("members."))]
    Recipe.check_keys(tree, known, where="plan")


def mark_overrides(decisions: Sequence[Decision], overrides: Sequence[str]) -> list[Decision]:
    """Return the decisions with the values that the user set in place of the plan's.

    Args:
        decisions: of the plan; a key may name several of one section (`augment.rotation, crop`).
        overrides: `a.b=c`.
    """
    changes = changes_of(overrides)
    marked = []
    for decision in decisions:
        section, _, rest = decision.key.rpartition(".")
        names, values = rest.split(", "), str(decision.value).split(", ")
        keys = [f"{section}.{name}" for name in names]
        own = [name for name, key in zip(names, keys, strict=True) if key in changes]
        sizes = [key for key in changes if re.fullmatch(r"members\.[^.]+\.img_size", key)]
        if own and len(values) == len(names):
            values = [changes.get(key, value) for key, value in zip(keys, values, strict=True)]
            reason = "named by you"
            if len(own) < len(names):
                reason = f"{decision.reason}; {', '.join(own)} named by you"
            decision = Decision(decision.key, ", ".join(values), reason)
        elif decision.key == "img_size" and sizes and decision.reason != "named by you":
            named = ", ".join(f"{key} = {changes[key]}" for key in sizes)
            reason = f"{decision.reason}; {named}: named by you"
            decision = Decision(decision.key, decision.value, reason)
        marked.append(decision)
    return marked
