"""Run folders of several labels per image, made of simulated predictions; nothing is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support.multilabel import make_multilabel
from support.tiny_runs import tiny_tree
from threefold.evaluation.multilabel import evaluate_multilabel
from threefold.json_files import write_json
from threefold.npz_files import write_arrays
from threefold.predictions.multilabel_results import MultilabelResults
from threefold.predictions.records import VERSION
from threefold.recipe.recipe import Recipe

TEST, TRAIN, UNSCORED = 40, 80, 20
"""Test images, those of the folds' scored parts, and training images that no fold scores."""


def label_recipe(table: Path | str, *sets: str) -> Recipe:
    """A recipe of two members on a table with several labels per image."""
    tree = tiny_tree(Path(table))
    members = [{**member, "name": name} for name, member in zip("ab", tree["members"], strict=True)]
    data = {"source": "csv", "root": str(table), "task": "multilabel"}
    tree = {**tree, "data": data, "members": members}
    del tree["ensemble"]
    return Recipe.parse(tree, sets)


def fake_label_run(folder: Path, *sets: str, test: bool = True) -> Path:
    """Write a finished run of the labels cat, dog and tree, with pictures of its mistakes."""
    recipe, oof = label_recipe("labels.csv", *sets), make_multilabel(TRAIN)
    test_rows = make_multilabel(TEST, seed=1, kind="test") if test else None
    evaluation = evaluate_multilabel(oof, test_rows)
    rows, decided = evaluation.rows, evaluation.decided
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe.dump(), encoding="utf-8")
    oof.save(folder / "oof.npz")
    if test_rows is not None:
        test_rows.save(folder / "test.npz")
    ids = np.array(rows.ids)
    write_arrays(
        folder / "chosen.npz",
        probs=evaluation.probs,
        decided=decided,
        targets=rows.targets,
        ids=ids,
    )
    wrong = (decided != rows.targets).any(1)
    pixels = np.random.default_rng(0).integers(0, 255, (int(wrong.sum()), 8, 8, 3), dtype=np.uint8)
    write_arrays(folder / "thumbs.npz", images=pixels, ids=ids[wrong], preview=pixels[:1])
    common = {
        "version": VERSION,
        "digest": recipe.digest(),
        "created": "2026-11-20T09:30:00+00:00",
        "hardware": "2 cores",
        "threads": 2,
        "commit": "abc1234",
        "classes": oof.classes,
    }
    roles = {"fold0": {"fit": 50, "select": 10, "score": TRAIN}}
    info = {"data": "0" * 64, "versions": {}, "notes": [], "skipped": [], "roles": roles}
    counts = {"n_train": TRAIN + UNSCORED, "n_test": TEST if test else 0, "folds": 1}
    write_json(folder / "run.json", {**common, **info, **counts})
    results = MultilabelResults(
        **common,
        name="labels",
        protocol="honest",
        seconds={},
        scores=tuple(evaluation.scores),
        per_label=tuple(evaluation.per_label),
        chosen=evaluation.chosen,
        chosen_reason=evaluation.reason,
        combined=evaluation.combined,
        ensemble=evaluation.state,
        expected=evaluation.expected,
        members=(),
        notes=(),
    )
    write_json(folder / "results.json", results.as_json())
    return folder
