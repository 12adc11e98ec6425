"""The scales of a recipe of the paper: in full, small enough for a CPU and an hour, or a smoke run.

`full` is the packaged recipe. `small` keeps its heads, widths, folds and joins, and replaces the
paper's networks by EfficientNet-Lite networks of 56 or 96 pixels, whose ImageNet weights are
packaged. `smoke` keeps everything but the sizes: networks of a few thousand weights, one epoch,
made-up images. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, cast, get_args

from pydantic import Field

from threefold.errors import RecipeError
from threefold.models.backbones import CPU_FROZEN
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import Section

Scale = Literal["full", "small", "smoke"]
Protocol = Literal["honest", "paper"]

SMOKE_SIZE: Final = 32
"""Image side of the smallest member of a smoke run."""

_TINY_BACKBONES = {
    "efficientnet": "test_efficientnet",
    "mobilenet": "test_efficientnet",
    "convnext": "test_convnext",
    "vit": "test_vit",
    "deit": "test_vit",
}
"""timm's test networks by a part of the backbone's name; for any other name `test_resnet`."""


def check_words(scale: str, protocol: str) -> tuple[Scale, Protocol]:
    """Return both words if they are a scale and a protocol.

    Raises:
        RecipeError: one is not.
    """
    for what, word, known in (
        ("scale", scale, get_args(Scale)),
        ("protocol", protocol, get_args(Protocol)),
    ):
        if word not in known:
            raise RecipeError(f"no such {what}", got=word, expected=" or ".join(known))
    return cast("Scale", scale), cast("Protocol", protocol)


class SmallStage(Section):
    """Epochs, learning rate and schedule of a stage in a small run."""

    epochs: int
    lr: float
    schedule: str


_SMALL_STAGES = (
    SmallStage(epochs=4, lr=2e-3, schedule="one-cycle"),
    SmallStage(epochs=1, lr=2e-4, schedule="time"),
    SmallStage(epochs=1, lr=2e-5, schedule="time"),
)
"""The stages of the packaged demo."""


class Small(Section):
    """What replaces the paper's networks in a small run.

    Attributes:
        backbones: the members that are kept, by the backbone that each gets.
        joint: members that join others, and so have no backbone, which are kept too.
        limit_per_class: training images of each class; 0 = all.
        stages: stages by name, where they differ from the demo's.
    """

    backbones: dict[str, tuple[str, ...]]
    joint: tuple[str, ...] = ()
    img_size: int = 56
    limit_per_class: int = 0
    stages: dict[str, SmallStage] = Field(default_factory=dict)

    @property
    def backbone_of(self) -> dict[str, str]:
        """The backbone of each member that has one."""
        return {
            member: backbone for backbone, members in self.backbones.items() for member in members
        }

    @property
    def members(self) -> tuple[str, ...]:
        """The members that are kept."""
        return (*self.backbone_of, *self.joint)


def keep_members(recipe: Recipe, names: Iterable[str]) -> dict[str, Any]:
    """Return a recipe as plain values, reduced to some members, those they join, and their stages.

    Args:
        recipe: any recipe.
        names: some of its members.
    """
    kept = set(names)
    kept |= {base for m in recipe.members if m.name in kept for base in m.joins}
    tree = recipe.model_dump(mode="json")
    tree["members"] = [m for m in tree["members"] if m["name"] in kept]
    used = {stage.name for member in kept for stage in recipe.stages_of(member)}
    tree["stages"] = [stage for stage in tree["stages"] if stage["name"] in used]
    for table in (*tree["stages"], tree["ensemble"]):
        table["members"] = [name for name in table["members"] if name in kept]
    return tree


def apply_protocol(tree: dict[str, Any], protocol: Protocol, scale: Scale) -> None:
    """Set the protocol of a recipe's tree in place.

    The honest protocol needs folds where the authors had none. It gets two, which answer the
    out-of-fold rows. The test split is answered by one network fitted on all rows, as in the
    paper, or in a small run by the mean of the two fold models.
    """
    tree["protocol"] = protocol
    folds = tree["folds"]
    if protocol == "paper":
        if folds["final"] == "refit":
            folds |= {"k": 1, "final": "average"}
        return
    if folds["k"] == 1 and folds["scheme"] != "leave-one-group-out":
        folds |= {"k": 2, "final": "refit"}
    if scale == "small" and folds["final"] == "refit":
        folds["final"] = "average"


def apply_small(tree: dict[str, Any], small: Small) -> None:
    """Turn a recipe's tree into a small run in place; `small` names all its members."""
    backbones = small.backbone_of
    for member in tree["members"]:
        member |= {"img_size": small.img_size, "batch_size": 0}
        if not member["joins"]:
            member["backbone"] = backbones[member["name"]]
            member["head"] |= {"activation": "torch", "reset_after": True}
    tree["augment"] = {"hflip": tree["augment"]["hflip"]}
    tree["train"] |= {
        "batch_size": 32,
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "precision": "auto",
    }
    tree["data"]["limit_per_class"] = small.limit_per_class
    joint = [member["name"] for member in tree["members"] if member["joins"]]
    for stage in tree["stages"]:
        _shorten_stage(stage, small, joint)
    tree["folds"]["select"] = 0.1


def _shorten_stage(stage: dict[str, Any], small: Small, joint: Sequence[str]) -> None:
    if stage["members"] and set(stage["members"]) <= set(joint):
        stage |= {"epochs": 10, "lr": 1e-3}
        return
    last = stage["name"][-1]
    number = int(last) if last.isdigit() else 1
    short = small.stages.get(stage["name"], _SMALL_STAGES[min(number, len(_SMALL_STAGES)) - 1])
    stage |= {**short.model_dump(), "frozen": CPU_FROZEN}


def apply_smoke(tree: dict[str, Any]) -> None:
    """Turn a recipe's tree into a smoke run in place: tiny fresh networks, one epoch per stage."""
    smallest = min(member["img_size"] for member in tree["members"])
    for member in tree["members"]:
        # In proportion, so that sizes that differ still differ.
        size = round(SMOKE_SIZE * member["img_size"] / smallest)
        member |= {"img_size": size, "batch_size": 0}
        if not member["joins"]:
            member |= {"backbone": _tiny_backbone(member["backbone"]), "weights": "none"}
            member["head"] |= {"units": 8, "fc": min(member["head"]["fc"], 8)}
        elif member["head"]["kind"] == "mlp":
            member["head"]["fc"] = 8
    tree["train"] |= {"batch_size": 16, "precision": "float32"}
    for stage in tree["stages"]:
        stage |= {"epochs": 1, "lr": max(stage["lr"], 1e-3)}


def _tiny_backbone(backbone: str) -> str:
    for part, tiny in _TINY_BACKBONES.items():
        if part in backbone.lower():
            return tiny
    return "test_resnet"
