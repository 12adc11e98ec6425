"""Find a recipe: by the path of its file, or by the name of one that is packaged with threefold."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from threefold.errors import RecipeError
from threefold.recipe.recipe import Recipe
from threefold.suffixes import ARCHIVES, ARRAYS, TABLES

_PACKAGED = Path(__file__).parents[1] / "recipes"


def packaged(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Load a recipe that is part of threefold, by name (`demo`).

    Raises:
        RecipeError: there is no recipe of that name.
    """
    if name not in packaged_names():
        raise RecipeError(
            "no such recipe",
            got=name,
            expected=f"a .toml file or one of {', '.join(packaged_names())}",
        )
    return Recipe.load(_PACKAGED / f"{name}.toml", overrides)


def packaged_names() -> list[str]:
    """Return the names of the packaged recipes."""
    return sorted(str(p.relative_to(_PACKAGED).with_suffix("")) for p in _PACKAGED.rglob("*.toml"))


def resolve(text: str, overrides: Iterable[str] = ()) -> Recipe:
    """Load a recipe by file path or by the name of a packaged one.

    Raises:
        RecipeError: there is none, or it is invalid; or this is a folder or a table of images.
    """
    path = Path(text)
    held = _images_in(path)
    if held:
        fix = shlex.join(["threefold", "fit", text])
        if (path / "recipe.toml").is_file():
            fix = shlex.join(["threefold", "train", str(path / "recipe.toml"), "--out", text])
        raise RecipeError(
            "not a recipe",
            where=text,
            expected=f"a .toml file or one of {', '.join(packaged_names())}",
            got=held,
            fix=f"to train on its images: {fix}",
        )
    return Recipe.load(text, overrides) if text.endswith(".toml") else packaged(text, overrides)


def _images_in(path: Path) -> str:
    """Say in what form a path holds images; empty if it looks like no such thing."""
    if path.is_dir():
        return "a folder"
    forms = {"a table": TABLES, "an archive": ARCHIVES, "a file of arrays": (ARRAYS,)}
    return next((form for form, ends in forms.items() if path.name.lower().endswith(ends)), "")
