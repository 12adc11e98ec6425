"""Recipes that cannot be trained are refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_runs import tiny_tree

from threefold.errors import RecipeError
from threefold.recipe import Recipe
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
