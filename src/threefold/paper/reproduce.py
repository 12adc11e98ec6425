"""Run a table or figure of the paper again: plan and train its runs, and measure its cells.

The runs are those of `api.train`, so they resume. `reproduce.json` holds every cell with its
interval beside the paper's value, the paired tests, hardware, date and commit.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threefold.api import train
from threefold.data.published import data_table
from threefold.data.synthetic import write_sample
from threefold.errors import DataError, RecipeError
from threefold.json_files import write_json
from threefold.paper.items import Item, ItemRun
from threefold.paper.measure import measure_item
from threefold.paper.results import ItemResults
from threefold.paper.scales import (
    Protocol,
    Scale,
    apply_protocol,
    apply_small,
    apply_smoke,
    keep_members,
)
from threefold.recipe.lookup import packaged
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import WITH_COLUMNS
from threefold.training.execution import Execution
from threefold.training.progress.watcher import Watcher
from threefold.training.run import Run

_SMOKE_IMAGES = {"cifar100": 4, "surrey-asl": 3}
"""Made-up training images of each class in a smoke run, where they are not 8."""


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """An item, and how to run it again.

    Attributes:
        out: folder of the item's runs and of reproduce.json.
        data: where the data set lies; for an item with several data sets, a folder with one folder
            for each.
        seeds: number of runs with different seeds.
        overrides: changes of the recipe, as `KEY=VALUE`.
        execution: where the jobs are done.
    """

    item: Item
    scale: Scale = "small"
    protocol: Protocol = "honest"
    out: Path = Path("runs/reproduce")
    data: Path | None = None
    seeds: int = 1
    overrides: tuple[str, ...] = ()
    execution: Execution | None = None


def reproduce_item(plan: Reproduction, watcher: Watcher | None = None) -> ItemResults:
    """Train the missing runs of an item and measure its cells.

    Of an item with several data sets, only the runs whose data set is there take part.

    Args:
        plan: the item, and how to run it.
        watcher: receives the progress of the training.

    Returns:
        The content of reproduce.json, which is written into `plan.out`.

    Raises:
        ThreefoldError: no data, no weights, or a recipe that cannot be used.
    """
    if plan.item.honest_only and plan.protocol == "paper":
        raise RecipeError(
            "there is no gate under protocol = paper, which this item is about",
            where=plan.item.name,
        )
    runs: dict[str, list[Run]] = {}
    for item_run in available_runs(plan):
        recipe = plan_recipe(plan, item_run)
        if recipe is not None:
            seeds = range(recipe.seed, recipe.seed + plan.seeds)
            runs[item_run.name] = [_train(plan, item_run, recipe, seed, watcher) for seed in seeds]
    results = measure_item(plan.item, plan.scale, plan.protocol, runs)
    results = results.replace(notes=(*results.notes, *left_out_notes(plan, runs)))
    write_json(plan.out / "reproduce.json", results.as_json())
    return results


def plan_recipe(plan: Reproduction, item_run: ItemRun) -> Recipe | None:
    """Return the recipe of one run at its scale and under its protocol.

    Returns:
        The recipe; None if the scale keeps no member of it.

    Raises:
        ThreefoldError: the data set is missing, or an override cannot be applied.
    """
    members = item_run.members
    if plan.scale == "small":
        members = tuple(name for name in members if name in plan.item.small.members)
    elif plan.scale == "smoke" and plan.item.smoke:
        members = tuple(name for name in members if name in plan.item.smoke)
    if not members:
        return None
    tree = keep_members(packaged(item_run.recipe), members)
    tree["data"] |= _data_values(plan, item_run)
    if tree["data"]["source"] != item_run.source:
        _adapt_to_other_data(tree)
    apply_protocol(tree, plan.protocol, plan.scale)
    if plan.scale == "small":
        apply_small(tree, plan.item.small)
    elif plan.scale == "smoke":
        apply_smoke(tree)
    overrides = (*item_run.overrides, *plan.overrides)
    return Recipe.parse(tree, overrides, where=f"{plan.item.name}, {item_run.name}")


def available_runs(plan: Reproduction) -> list[ItemRun]:
    """Return the runs whose data can be there.

    These are all runs, except that of an item with several data sets only those count that have a
    folder in `plan.data`.

    Raises:
        DataError: none of several data sets has its folder.
    """
    runs, root = plan.item.runs, plan.data
    if root is None or plan.scale == "smoke" or len(plan.item.sources) == 1:
        return list(runs)
    available = [run for run in runs if (root / run.source).exists()]
    if not available:
        names = ", ".join(plan.item.sources)
        raise DataError(
            "no data set of this item lies there",
            where=root,
            expected=f"a folder for any of {names}",
        )
    return available


def _adapt_to_other_data(tree: dict[str, Any]) -> None:
    """Drop what only the paper's data set has: an extra part, and groups without a table."""
    tree["data"]["extra"] = False
    if tree["folds"]["scheme"] == "leave-one-group-out":
        has_groups = tree["data"]["source"] in WITH_COLUMNS
        tree["folds"] |= {"scheme": "grouped" if has_groups else "stratified", "k": 5}


def _data_values(plan: Reproduction, item_run: ItemRun) -> dict[str, Any]:
    """Return the recipe's `data` values, and make up the images of a smoke run."""
    source = item_run.source
    if plan.scale == "smoke":
        root = plan.out / "data" / source
        if not root.is_dir():
            write_sample(source, root, per_class=_SMOKE_IMAGES.get(source, 8))
        return {"source": source, "root": str(root)}
    if plan.data is not None:
        several = len(plan.item.sources) > 1
        return data_table(source, plan.data / source if several else plan.data)
    if source == "fashion-mnist":
        return {"source": "demo" if plan.scale == "small" else source, "root": ""}
    fix = "add --data FOLDER"
    if source != "folder":
        fix += f"; to get it: threefold data fetch {source} --to FOLDER"
    raise DataError(f"{plan.item.name} needs {source} data", fix=fix)


def _train(
    plan: Reproduction, item_run: ItemRun, recipe: Recipe, seed: int, watcher: Watcher | None
) -> Run:
    header = (
        f"threefold reproduce {plan.item.name} --scale {plan.scale} "
        f"--protocol {plan.protocol}, seed {seed}"
    )
    folder = plan.out / item_run.name / f"seed{seed}"
    seeded = recipe.model_copy(update={"seed": seed})
    return train(seeded, folder, watcher, header, execution=plan.execution)


def left_out_notes(plan: Reproduction, names: Collection[str]) -> list[str]:
    """Return why runs of the item are missing.

    Args:
        plan: the item, and how to run it.
        names: names of the runs that took part.
    """
    available = [run.name for run in available_runs(plan)]
    reasons = {
        "no data at hand": [run.name for run in plan.item.runs if run.name not in available],
        "left out at this scale": [name for name in available if name not in names],
    }
    return [f"{reason}: {', '.join(missing)}" for reason, missing in reasons.items() if missing]
