"""The recipe of an interrupted `fit`, and whether a new call of `fit` asks for the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from threefold.data.in_memory import find_stored_data
from threefold.data.sources.table_inside import find_table
from threefold.errors import RunError
from threefold.files import real_path
from threefold.names import plain_backbone
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Recipe
from threefold.training.planning.candidates import is_auto
from threefold.training.planning.members import left_out_reason

LEFT_OUT: Final = "the members to be tuned were left out: no time left"
"""Line in the header of a recipe that has lost them."""


def read_resumed_recipe(
    out: Path, folder: Path, members: tuple[str, ...], overrides: tuple[str, ...]
) -> Recipe:
    """Read the recipe of an interrupted fit, and check that this call asks for the same run.

    Args:
        out: the run folder.
        folder: the images that this call names.
        members: the timm names that it gives; none, or `auto`, go with any that were chosen.
        overrides: `a.b=c`; those about members and stages that were left out are ignored.

    Raises:
        RunError: it asks for another recipe, or for other images.
    """
    path = out / "recipe.toml"
    recipe = Recipe.load(path)
    if LEFT_OUT in RunFolder(out).header:
        overrides = tuple(text for text in overrides if not _is_left_out(text, recipe))
    members = tuple(plain_backbone(name) for name in members)
    # Tuned members have the backbones of their probes.
    backbones = tuple(member.backbone for member in recipe.members if not member.starts_from)
    # The plan may have dropped the last of the members named.
    left_out = members[len(backbones) :]
    reason = left_out_reason(left_out)
    is_same = members == backbones + left_out and (
        not left_out or any(line.endswith(reason) for line in RunFolder(out).header)
    )
    # What was chosen stays chosen.
    is_same = is_same or not members or is_auto(members)
    if Recipe.load(path, overrides).digest() != recipe.digest() or not is_same:
        raise RunError(
            "the folder holds a run of another recipe",
            where=out,
            fix="choose another --out, or leave out --set and --members to resume it",
        )
    root = real_path(Path(find_stored_data(recipe.data.root, out)))
    table = find_table(folder) if folder.is_dir() else None  # which is the root of such a folder
    if root not in (real_path(folder), table and real_path(table)):
        raise RunError(
            "the folder holds a run on other images",
            where=out,
            got=recipe.data.root,
            fix=f"choose another --out, such as {out}-{folder.suffix.lstrip('.') or '2'}",
        )
    return Recipe.load(path, overrides)  # perhaps with another number of devices


def _is_left_out(override: str, recipe: Recipe) -> bool:
    """Whether an override is about a stage, a member or a table that the recipe does not have."""
    names = {
        "stages": [stage.name for stage in recipe.stages],
        "members": [member.name for member in recipe.members],
    }
    section, _, rest = override.partition("=")[0].strip().partition(".")
    if section == "pseudo_labels":
        return recipe.pseudo_labels is None
    entry = rest.partition(".")[0]
    return section in names and not entry.isdigit() and entry not in names[section]
