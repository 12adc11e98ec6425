"""A table or figure of the paper, run again: its runs at a scale and under a protocol, and its cells beside the paper's values.

Runs are those of `api.train`, so they resume; what is measured is read from their folders. `reproduce.json` has every cell with
its interval, the paired tests, hardware, date and commit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from threefold.api import train
from threefold.data.published import data_table
from threefold.data.synthetic import write_sample
from threefold.ensembles.registry import make_ensemble
from threefold.errors import DataError, RecipeError
from threefold.files import read_arrays, read_json, write_json
from threefold.models.views import view_counts
from threefold.paper.items import Answer, Cell, Item, Plan
from threefold.paper.scales import Protocol, Scale, keep_members, make_tiny, shrink, with_protocol
from threefold.recipe import Recipe, packaged
from threefold.stats import paired_tests, scores
from threefold.stats.bootstrap import LEVEL
from threefold.training.run import Run
from threefold.training.watcher import Watcher

PER_CLASS = {"cifar100": 4, "surrey-asl": 3}
"""Made-up training images of each class in a smoke run, where they are not 8."""


class Asked(NamedTuple):
    """What is asked for."""

    item: Item
    scale: Scale = "small"
    protocol: Protocol = "honest"
    out: Path = Path("runs/reproduce")
    """Folder of this item's runs and of reproduce.json."""
    data: Path | None = None
    """Where the data set lies; for an item of several, a folder with one folder per data set."""
    seeds: int = 1
    overrides: tuple[str, ...] = ()


class Rows(NamedTuple):
    """Which rows a cell's answer has right, in every seed."""

    hits: np.ndarray
    """(s, n) booleans."""
    ids: tuple[str, ...]
    groups: tuple[str, ...] | None
    kind: str
    """oof or test."""


def reproduce(asked: Asked, watcher: Watcher | None = None) -> dict[str, Any]:
    """Run what is missing of an item and measure its cells; of an item of several data sets, those that lie there.

    Args:
        asked: the item, and how.
        watcher: told how it goes on.

    Returns:
        The content of reproduce.json, which is written into `asked.out`.

    Raises:
        ThreefoldError: no data, no weights, or a recipe that cannot be used.
    """
    if asked.item.honest_only and asked.protocol == "paper":
        raise RecipeError(
            "there is no gate under protocol = paper, which this item is about",
            where=asked.item.name,
        )
    runs: dict[str, list[Run]] = {}
    for plan in at_hand(asked):
        recipe = plan_recipe(asked, plan)
        if recipe is not None:
            runs[plan.name] = [_run(asked, plan, recipe, i, watcher) for i in range(asked.seeds)]
    found = measure(asked, runs)
    write_json(asked.out / "reproduce.json", found)
    return found


def plan_recipe(asked: Asked, plan: Plan) -> Recipe | None:
    """The recipe of one run of an item, at its scale and under its protocol; None if no member of it is kept.

    Raises:
        ThreefoldError: no data are given, or an override cannot be applied.
    """
    recipe = packaged(plan.recipe)
    kept = {
        "small": tuple(asked.item.small.members),
        "smoke": asked.item.smoke or plan.members,
    }.get(asked.scale, plan.members)
    members = [n for n in plan.members if n in kept]
    if not members:
        return None
    tree = keep_members(recipe, members)
    tree["data"] |= _data(asked, plan)
    if tree["data"]["source"] != plan.source:
        _other_source(tree)
    with_protocol(tree, asked.protocol, asked.scale)
    if asked.scale == "small":
        shrink(tree, asked.item.small)
    elif asked.scale == "smoke":
        make_tiny(tree)
    return Recipe.parse(
        tree, (*plan.overrides, *asked.overrides), where=f"{asked.item.name}, {plan.name}"
    )


def at_hand(asked: Asked) -> list[Plan]:
    """The runs of an item whose data can be there: all, or of several data sets those with a folder in `asked.data`.

    Raises:
        DataError: not one of several has its folder.
    """
    plans, root = asked.item.plans, asked.data
    if root is None or asked.scale == "smoke" or not _several(asked.item):
        return list(plans)
    there = [plan for plan in plans if (root / plan.source).exists()]
    if not there:
        names = ", ".join(plan.source for plan in plans)
        raise DataError(
            "no data set of this item lies there",
            where=root,
            expected=f"a folder for any of {names}",
        )
    return there


def _several(item: Item) -> bool:
    return len({plan.source for plan in item.plans}) > 1


def _other_source(tree: dict[str, Any]) -> None:
    """Images that are not the paper's data set have no extra part, and their groups, if any, from a table."""
    tree["data"]["extra"] = False
    if tree["folds"]["scheme"] == "leave-one-group-out":
        scheme = "grouped" if tree["data"]["source"] in ("csv", "parquet") else "stratified"
        tree["folds"] |= {"scheme": scheme, "k": 5}


def _data(asked: Asked, plan: Plan) -> dict[str, Any]:
    """The `data` values of a run: made-up pictures, what is at hand, or where the data set lies."""
    if asked.scale == "smoke":
        root = asked.out / "data" / plan.source
        if not root.is_dir():
            write_sample(plan.source, root, per_class=PER_CLASS.get(plan.source, 8))
        return {"source": plan.source, "root": str(root)}
    if asked.data is not None:
        return data_table(
            plan.source, asked.data / plan.source if _several(asked.item) else asked.data
        )
    if plan.source == "fashion-mnist":
        return {"source": "demo" if asked.scale == "small" else plan.source, "root": ""}
    fix = "add --data FOLDER"
    if plan.source != "folder":
        fix += f"; to get it: threefold data fetch {plan.source} --to FOLDER"
    raise DataError(f"{asked.item.name} needs {plan.source} data", fix=fix)


def _run(asked: Asked, plan: Plan, recipe: Recipe, i: int, watcher: Watcher | None) -> Run:
    seed = recipe.seed + i
    header = f"threefold reproduce {asked.item.name} --scale {asked.scale} --protocol {asked.protocol}, seed {seed}"
    folder = asked.out / plan.name / f"seed{seed}"
    return train(recipe.model_copy(update={"seed": seed}), folder, watcher, header)


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(asked: Asked, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Every cell with its interval beside the paper's value, and the paired tests, from finished runs.

    Args:
        asked: the item, and how.
        runs: the runs of each plan by its name, one per seed.
    """
    rows = {cell.label: _rows(runs, cell.answer) for cell in asked.item.cells}
    found = {label: r for label, r in rows.items() if r is not None}
    first = next(iter(runs.values()))[0]
    results = first.results
    seconds = sum(run.results.seconds["train"] for several in runs.values() for run in several)
    return {
        "item": asked.item.name,
        "title": asked.item.title,
        "scale": asked.scale,
        "protocol": asked.protocol,
        "draw": asked.item.draw,
        "seeds": [run.recipe.seed for run in next(iter(runs.values()))],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "trained": results.created,
        "hardware": results.hardware,
        "threads": results.threads,
        "commit": results.commit,
        "training_minutes": seconds / 60,
        "cells": [
            entry
            for cell in asked.item.cells
            for entry in _entries(cell, found.get(cell.label), runs)
        ],
        "comparisons": _comparisons(asked.item.pairs, found),
        "stages": [entry for several in runs.values() for entry in _stages(asked.item, several[0])],
        "notes": _notes(asked, runs),
    }


def _rows(runs: Mapping[str, Sequence[Run]], answer: Answer) -> Rows | None:
    """The answer's hits in every seed; None if its run or members are left out at this scale."""
    if answer.run not in runs:
        return None
    found = [_hits(run, answer) for run in runs[answer.run]]
    if found[0] is None:
        return None
    return found[0]._replace(hits=np.concatenate([rows.hits for rows in found if rows is not None]))


def _hits(run: Run, answer: Answer) -> Rows | None:
    """What an answer has right on the test rows, or out of fold where there are none.

    Which members and methods are asked was fixed by the item before the run, and none of the methods is fitted.
    """
    rows = run.folder.headline_rows()
    if rows.kind == "test":
        run.folder.open_test("reproduce", len(rows))
    there = [m for m in answer.members if m in rows.members]
    if answer.kind == "ensemble":
        if len(there) < 2:
            return None
        picked = rows.select(there)
        probs = (
            make_ensemble(answer.name).fit(picked.probs, picked.labels).predict_proba(picked.probs)
        )
    elif answer.name not in rows.members:
        return None
    elif answer.kind == "folds":
        probs = _mixed(run, answer, rows.probs.shape[1:], rows.kind)
    else:
        probs = rows.probs[rows.members.index(answer.name)]
    return Rows((probs.argmax(1) == rows.labels)[None], rows.ids, rows.groups, rows.kind)


def _mixed(run: Run, answer: Answer, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Probabilities (n, k) of several networks in some folds and of one in the others (paper, table 3)."""
    views = run.recipe.views
    chosen = run.folder.chosen_views if views.choose else None
    choice = view_counts(views).index(chosen.views) if chosen is not None else 0
    folds = [fold for fold in run.roles if fold >= 0]
    probs = np.zeros(shape)
    for fold in folds:
        names = answer.members if fold in answer.folds else (answer.name,)
        saved = [
            read_arrays(run.folder.job_folder(run.last_job(name, fold)) / "probs.npz")
            for name in names
        ]
        part = np.mean(
            [arrays["test" if kind == "test" else "score"][choice] for arrays in saved], axis=0
        )
        if kind == "test":
            probs += part / len(folds)
        else:
            probs[run.roles[fold].score] = part
    return probs


def _entries(
    cell: Cell, rows: Rows | None, runs: Mapping[str, Sequence[Run]]
) -> list[dict[str, Any]]:
    """A cell; of data with groups, one per group before it, and the mean over groups, as in the paper."""
    base = {"row": cell.row, "column": cell.column, "paper": cell.paper, "note": cell.note}
    cost = _cost(cell, runs)
    if rows is None:
        return [
            {**base, "ours": None, "interval": None, "n": 0, "rows": "", "per_seed": [], **cost}
        ]
    whole = _score(rows.hits, rows.groups)
    if rows.groups is None:
        return [{**base, **whole, "rows": rows.kind, **cost}]
    parts = np.array(rows.groups)
    entries = [
        {
            **base,
            "column": str(name),
            "paper": None,
            "note": "",
            **_score(rows.hits[:, parts == name]),
            "rows": rows.kind,
        }
        for name in np.unique(parts)
    ]
    mean = float(np.mean([entry["ours"] for entry in entries]))
    note = (
        cell.note
        or "mean over groups, each counts alike; the interval is that of all images, for other groups"
    )
    return [
        *entries,
        {**base, **whole, "column": "mean", "ours": mean, "rows": rows.kind, "note": note},
    ]


def _score(hits: np.ndarray, groups: Sequence[str] | None = None) -> dict[str, Any]:
    """Mean over seeds; the interval counts images (or groups), not seeds."""
    intervals = np.array([scores.share_interval(row, groups, LEVEL) for row in hits])
    per_seed = hits.mean(1).tolist()
    return {
        "ours": float(hits.mean()),
        "interval": intervals.mean(0).tolist(),
        "n": hits.shape[1],
        "per_seed": per_seed,
    }


def _cost(cell: Cell, runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """Parameters and multiply-adds of a member (figure 4)."""
    if cell.answer.kind != "member" or cell.answer.run not in runs:
        return {}
    for row in runs[cell.answer.run][0].results.members:
        if row.name == cell.answer.name:
            return row.model_dump(include={"backbone", "img_size", "parameters", "macs"})
    return {}


def _comparisons(
    pairs: Sequence[tuple[str, str]], found: Mapping[str, Rows]
) -> list[dict[str, Any]]:
    """Paired tests on the same images, Holm's correction over the item."""
    usable = [
        (a, b) for a, b in pairs if a in found and b in found and found[a].ids == found[b].ids
    ]
    entries = [_compare(a, b, found[a], found[b]) for a, b in usable]
    adjusted = paired_tests.holm([entry["p"] for entry in entries]) if entries else np.zeros(0)
    for entry, p in zip(entries, adjusted, strict=True):
        entry["p_holm"] = float(p)
        entry["verdict"] = _verdict(entry)
    return entries


def _compare(a: str, b: str, left: Rows, right: Rows) -> dict[str, Any]:
    base = {"a": a, "b": b, "seeds": len(left.hits)}
    if len(left.hits) > 1:
        over = paired_tests.seeds_difference(left.hits, right.hits, left.groups, LEVEL)
        test = "crossed random effects over seeds and images"
        return {
            **base,
            "test": test,
            "difference": over.estimate,
            "interval": [over.low, over.high],
            "p": over.p,
            "per_seed": over.per_seed,
        }
    counts = paired_tests.mcnemar_exact(left.hits[0], right.hits[0], left.groups)
    gap = paired_tests.paired_bootstrap(
        left.hits[0].astype(float), right.hits[0].astype(float), left.groups, level=LEVEL
    )
    return {
        **base,
        "test": "exact McNemar",
        "difference": gap.estimate,
        "interval": [gap.low, gap.high],
        "p": counts.p,
        "only_a": counts.only_a,
        "only_b": counts.only_b,
    }


def _verdict(entry: Mapping[str, Any]) -> str:
    a, b, p = entry["a"], entry["b"], entry["p_holm"]
    if "only_a" in entry:
        return paired_tests.verdict(a, b, entry["only_a"], entry["only_b"], p)
    if p > 1 - LEVEL:
        return f"no evidence of a difference over {entry['seeds']} seeds, p = {p:.2f}"
    better, worse = (a, b) if entry["difference"] > 0 else (b, a)
    return f"{better} is better than {worse} over {entry['seeds']} seeds, p = {p:.3f}"


def _stages(item: Item, run: Run) -> list[dict[str, Any]]:
    """Accuracy on the select rows, epoch by epoch, of every stage: its mean over folds, beside the notebooks' best epoch."""
    if item.draw != "curves":
        return []
    entries = []
    for member in run.recipe.members:
        for number, stage in enumerate(run.recipe.stages_of(member.name)):
            jobs = [j for j in run.jobs if (j.member, j.stage) == (member.name, stage.name)]
            histories = [read_json(run.folder.job_folder(job) / "history.json") for job in jobs]
            curves = [[epoch["select_accuracy"] for epoch in h["epochs"]] for h in histories]
            length = min(map(len, curves))
            told = item.stages.get(member.name, ())
            entries.append(
                {
                    "run": run.dir.parent.name,
                    "member": member.name,
                    "stage": stage.name,
                    "number": number,
                    "lr": stage.lr,
                    "select": np.mean([c[:length] for c in curves], axis=0).tolist(),
                    "best": float(np.mean([max(c) for c in curves])),
                    "kept": sum(bool(h["accepted"]) for h in histories),
                    "folds": len(histories),
                    "paper": told[number] if number < len(told) else None,
                }
            )
    return entries


def _notes(asked: Asked, runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """What has to be said beside the figures."""
    notes = []
    if asked.scale == "smoke":
        notes.append(
            "made-up pictures and tiny fresh networks: this shows that the path works, and nothing about the paper"
        )
    if asked.scale == "small":
        stand_ins = sorted(
            {
                m.backbone
                for several in runs.values()
                for m in several[0].recipe.members
                if m.backbone
            }
        )
        notes.append(
            f"small: {', '.join(stand_ins)} in place of the paper's networks, fewer images and epochs; not the paper's setting"
        )
    for name, several in runs.items():
        data = several[0].recipe.data
        if data.source != next(p.source for p in asked.item.plans if p.name == name):
            notes.append(f"{name}: images from {data.source} {data.root}".rstrip())
    said = {
        re.sub(r"[0-9,]+", "", note)[:60]: note
        for several in runs.values()
        for run in reversed(several)
        for note in run.results.notes
    }
    notes += sorted(said.values())  # what seeds say in nearly the same words is said once
    there = [plan.name for plan in at_hand(asked)]
    for why, names in (
        ("no data at hand", [p.name for p in asked.item.plans if p.name not in there]),
        ("left out at this scale", [name for name in there if name not in runs]),
    ):
        if names:
            notes.append(f"{why}: {', '.join(names)}")
    return notes
