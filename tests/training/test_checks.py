"""Recipes that cannot be trained are refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_runs import tiny_tree

from threefold.errors import RecipeError
from threefold.recipe.recipe import Recipe
from threefold.training.checks import check_trainable


def parse(*sets: str) -> Recipe:
    return Recipe.parse(tiny_tree(Path("x")), sets)


def test_stage_size_needs_a_backbone_of_any_size() -> None:
    check_trainable(parse("stages.one.img_size=24"))
    check_trainable(parse("members.plain.backbone=vit_tiny_patch16_224", "stages.one.img_size=32"))

    with pytest.raises(
        RecipeError,
        match=r"fixed grid of tokens.*: stage one, member plain, backbone vit_tiny_patch16_224; "
        r"expected img_size = 32, got 24; fix: remove img_size",
    ):
        check_trainable(
            parse(
                "members.plain.backbone=vit_tiny_patch16_224",
                "stages.one.img_size=24",
                'stages.one.members=["plain"]',
            )
        )


def test_float16_needs_cuda() -> None:
    with pytest.raises(RecipeError, match="float16 training needs a CUDA device"):
        check_trainable(parse("train.precision=float16"))


@pytest.mark.parametrize(
    ("backbone", "size", "suitable"),
    [
        ("maxvit_rmlp_pico_rw_256", 200, 256),
        ("test_vit", 33, 160),
        ("mixer_s16_224", 64, 224),
        ("inception_v3", 48, 299),
    ],
)
def test_a_size_that_a_backbone_cannot_take(backbone: str, size: int, suitable: int) -> None:
    def sized(side: int) -> Recipe:
        return parse(f"members.plain.backbone={backbone}", f"members.plain.img_size={side}")

    message = (
        rf"cannot take images of this size: member plain, backbone {backbone}; "
        rf"expected for example {suitable} px.*got {size} px.*"
        rf"set members\.plain\.img_size = {suitable}"
    )
    with pytest.raises(RecipeError, match=message):
        check_trainable(sized(size))
    check_trainable(sized(suitable))


def test_a_stage_has_a_size_of_its_own_to_be_tried() -> None:
    recipe = parse(
        "members.plain.backbone=test_vit", "members.plain.img_size=64", "stages.one.img_size=40"
    )

    with pytest.raises(RecipeError, match=r"got 40 px.*set stages\.one\.img_size = 160"):
        check_trainable(recipe)
