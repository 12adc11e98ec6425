"""Accuracies, comparisons and notes of an item's cells, checked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.paper import FakeResults, FakeRun, fake_run

from threefold.data.splits import Roles
from threefold.npz_files import read_arrays, write_arrays
from threefold.paper.items import Cell, ItemRun, find_item
from threefold.paper.measure import (
    CellHits,
    cell_results,
    collect_notes,
    compare_cells,
    find_hits,
    mix_folds,
)
from threefold.recipe.lookup import packaged
from threefold.recipe.recipe import Job


def item_run(cell: Cell, ensemble: tuple[str, ...] = ()) -> ItemRun:
    return ItemRun(recipe="demo", source="demo", cells=(cell,), ensemble=ensemble)


def test_cells_over_groups_and_seeds_by_hand(tmp_path: Path) -> None:
    """Two signers of 4 and 2 images: the paper's mean counts signers alike, 1/2 of (3/4 + 1/2)."""
    groups = ("A", "A", "A", "A", "B", "B")
    runs = [
        fake_run(tmp_path / str(s), {"x": [True, True, True, s == 1, True, False]}, groups)
        for s in (0, 1)
    ]
    cell = Cell(row="X", member="x", paper=0.949)

    hits = find_hits(runs, cell, item_run(cell))  # type: ignore[arg-type]
    results = cell_results(cell, "", hits, runs)  # type: ignore[arg-type]

    assert hits is not None
    assert hits.correct.shape == (2, 6)
    assert [r.column for r in results] == ["A", "B", "mean"]
    assert [r.paper for r in results] == [None, None, 0.949]
    assert results[0].per_seed == (0.75, 1.0)
    assert results[2].ours == pytest.approx((0.875 + 0.5) / 2)


@pytest.mark.parametrize(
    ("cell", "ensemble"),
    [(Cell(row="Y", member="y"), ()), (Cell(row="mean", method="mean"), ("x", "y"))],
)
def test_cells_of_absent_members(tmp_path: Path, cell: Cell, ensemble: tuple[str, ...]) -> None:
    runs = [fake_run(tmp_path, {"x": [True, False]})]

    hits = find_hits(runs, cell, item_run(cell, ensemble))  # type: ignore[arg-type]
    (result,) = cell_results(cell, "", hits, runs)  # type: ignore[arg-type]

    assert hits is None
    assert result.ours is None


def hits_of(*correct: np.ndarray) -> dict[str, CellHits]:
    """Hits of cells a, b and so on, on the same images."""
    ids = tuple(map(str, range(correct[0].shape[1])))
    return {
        name: CellHits(rows, ids, None, "test") for name, rows in zip("abc", correct, strict=False)
    }


@pytest.fixture
def better_and_worse() -> dict[str, CellHits]:
    """Of 40 images a has all right, b all but 12."""
    better = np.ones((1, 40), bool)
    worse = better.copy()
    worse[0, :12] = False
    return hits_of(better, worse)


def test_comparisons_by_hand(better_and_worse: dict[str, CellHits]) -> None:
    a = better_and_worse["a"]
    other_images = CellHits(a.correct, a.ids[::-1], None, "test")
    hits = {**better_and_worse, "c": other_images}

    (first,) = compare_cells((("a", "b"), ("a", "c"), ("a", "left out")), hits)
    both = compare_cells((("a", "b"), ("b", "a")), hits)

    assert (first.only_a, first.only_b, first.difference) == (12, 0, 0.3)
    assert first.p == pytest.approx(2 * 0.5**12) == first.p_holm
    assert first.verdict.startswith("a is better than b: 12 against 0 images")
    assert [c.p_holm for c in both] == pytest.approx([2 * first.p] * 2)


def test_comparisons_over_seeds(better_and_worse: dict[str, CellHits]) -> None:
    repeated = [np.repeat(hits.correct, 3, 0) for hits in better_and_worse.values()]

    (comparison,) = compare_cells((("a", "b"),), hits_of(*repeated))

    assert comparison.seeds == 3
    assert comparison.difference == pytest.approx(0.3)
    assert comparison.verdict.startswith("a is better than b over 3 seeds")


class FoldFolder:
    """A run folder of which only the predictions of the jobs exist."""

    chosen_views = None

    def __init__(self, path: Path) -> None:
        self.path = path

    def job_probs(self, job: Job, rows: np.ndarray) -> dict[str, np.ndarray]:
        arrays = read_arrays(self.path / job.path / "probs.npz")
        assert np.array_equal(arrays["rows"], rows)
        return arrays


class FoldRun(FakeRun):
    """A run of three folds with two rows each."""

    @property
    def roles(self) -> dict[int, Roles]:
        none = np.arange(0)
        return {fold: Roles(none, none, np.arange(2 * fold, 2 * fold + 2)) for fold in range(3)}

    def last_job(self, name: str, fold: int) -> Job:
        return Job(name, fold, "lr3")


def test_several_networks_in_some_folds_only(tmp_path: Path) -> None:
    """With two networks in fold 1, the mean of the folds' answers by hand."""
    run = FoldRun(folder=FoldFolder(tmp_path), recipe=packaged("demo"))
    for fold in range(3):
        for name, value in (("x", 0.1 * (fold + 1)), ("y", 0.7)):
            probs = np.full((1, 2, 2), value)
            folder = tmp_path / Job(name, fold, "lr3").path
            rows = np.arange(2 * fold, 2 * fold + 2)
            write_arrays(folder / "probs.npz", rows=rows, test=probs, score=probs)
    cell = Cell(row="mixed", member="x", ensemble_folds=(1,))

    test = mix_folds(run, cell, ("x", "y"), (2, 2), "test")  # type: ignore[arg-type]
    out_of_fold = mix_folds(run, cell, ("x", "y"), (6, 2), "oof")  # type: ignore[arg-type]

    np.testing.assert_allclose(test, (0.1 + (0.2 + 0.7) / 2 + 0.3) / 3)
    np.testing.assert_allclose(out_of_fold[:, 0], [0.1, 0.1, 0.45, 0.45, 0.3, 0.3])


def test_notes_of_several_seeds_are_said_once() -> None:
    notes = [(f"{n} pairs of images look nearly the same: {n}",) for n in (3, 44)]
    runs = [FakeRun(results=FakeResults(notes=lines)) for lines in notes]

    collected = collect_notes(find_item("table6"), "small", {"svhn": runs})  # type: ignore[dict-item]

    assert [note for note in collected if "pairs" in note] == list(notes[0])
    assert collected[-1].startswith("svhn: other notes in results.json of seeds")
