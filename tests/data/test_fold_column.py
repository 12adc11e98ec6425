"""The user's own folds: a column of a table decides who scores which row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.sources import load_source
from support.tiny_runs import paint, tiny_tree

from threefold.data.splits import assign_roles
from threefold.errors import DataError, RecipeError
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import FoldSpec
from threefold.training.jobs import train_members
from threefold.training.run import Run

COLUMN = FoldSpec(scheme="column", select=0.3)
FOLDS = ["b10", "b2", "a"] * 8
LABELS = np.repeat([0, 1], 12)


def write_table(folder: Path, folds: list[str], extra: str = "", groups: str = "") -> Path:
    """Write 24 images of two classes and their CSV file with the columns fold and group."""
    lines = ["path,label,split,fold" + (",group" if groups else "")]
    for i, fold in enumerate(folds):
        paint(folder / f"{i:02d}.png", (40, 160, 90), i)
        cells = [f"{i:02d}.png", "ab"[i // 12], "train", fold]
        lines.append(",".join(cells + ([groups[i % len(groups)]] if groups else [])))
    table = folder / "rows.csv"
    table.write_text("\n".join(lines) + "\n" + extra)
    return table


def test_each_value_is_a_fold_in_natural_order() -> None:
    roles = assign_roles(LABELS, None, COLUMN, "honest", 0, folds=FOLDS)

    assert [sorted({FOLDS[row] for row in part.score}) for part in roles] == [
        ["a"],
        ["b2"],
        ["b10"],
    ]
    for part in roles:
        assert np.array_equal(np.sort(np.concatenate(part)), np.arange(24))
        assert set(LABELS[part.fit]) == {0, 1}
        assert len(part.select)


def test_folds_of_a_column_ignore_k_and_the_seed() -> None:
    other = COLUMN.model_copy(update={"k": 7})

    first = assign_roles(LABELS, None, COLUMN, "paper", 0, folds=FOLDS)
    second = assign_roles(LABELS, None, other, "paper", 1, folds=FOLDS)

    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.score, b.score)


def test_select_rows_come_in_whole_groups_if_there_are_any() -> None:
    groups = [f"g{i // 2}" for i in range(24)]

    for part in assign_roles(LABELS, groups, COLUMN, "honest", 0, folds=FOLDS):
        assert not {groups[i] for i in part.fit} & {groups[i] for i in part.select}


@pytest.mark.parametrize(
    ("folds", "expected"),
    [
        (None, ["needs a fold column", "data.fold_column"]),
        (["a"] * 24, ["1 different values", "expected 2 to 50", "got a"]),
        (["a"] * 3, ["expected 24 folds, got 3"]),
        (["a"] * 12 + ["b"] * 12, ["fold 0 has no images of class dish", "several folds"]),
    ],
)
def test_impossible_columns_are_refused(folds: list[str] | None, expected: list[str]) -> None:
    with pytest.raises(DataError) as error:
        assign_roles(LABELS, None, COLUMN, "honest", 0, ("dish", "ring"), folds)
    for text in expected:
        assert text in str(error.value)


def test_a_column_of_something_else_is_refused() -> None:
    names = [str(i) for i in range(60)]

    with pytest.raises(DataError, match="60 different values"):
        assign_roles([0, 1] * 30, None, COLUMN, "honest", 0, folds=names)


def test_a_csv_file_with_folds(tmp_path: Path) -> None:
    paint(tmp_path / "t0.png", (1, 2, 3), 90)
    paint(tmp_path / "t1.png", (1, 2, 3), 91)
    table = write_table(tmp_path, FOLDS, extra="t0.png,a,test,\nt1.png,b,test,zzz\n")

    sources = load_source("csv", table, fold_column="fold")

    assert sources.train.folds == tuple(FOLDS)
    assert sources.test is not None
    assert sources.test.folds is None
    assert sources.notes == ("3 folds from the column fold: a, b2, b10",)
    assert sources.train.subset([2, 0]).folds == ("a", "b10")


def test_groups_split_between_folds_are_noted(tmp_path: Path) -> None:
    table = write_table(tmp_path, FOLDS, groups="xyzw")

    warnings = load_source("csv", table, fold_column="fold").warnings

    assert warnings[-1].startswith("4 groups are in several folds of data.fold_column")
    assert warnings[-1].endswith("w, x, y, z")


@pytest.mark.parametrize(
    ("folds", "column", "expected"),
    [
        (FOLDS, "part", ["no fold column part", "path, label, split, fold", "data.fold_column"]),
        ([*FOLDS[:-1], " "], "fold", ["an empty cell in the fold column fold", "line 25"]),
        (["1"] * 24, "fold", ["1 different values", "got 1"]),
    ],
)
def test_bad_csv_columns(
    tmp_path: Path, folds: list[str], column: str, expected: list[str]
) -> None:
    table = write_table(tmp_path, folds)

    with pytest.raises(DataError) as error:
        load_source("csv", table, fold_column=column)

    assert "\n" not in str(error.value)
    for text in expected:
        assert text in str(error.value)


def write_parquet(folder: Path, folds: list[Any], **columns: list[Any]) -> Path:
    """Write a parquet file of 24 rows that name images."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_table(folder, FOLDS)
    names = [f"{i:02d}.png" for i in range(24)]
    table = pa.table({"path": names, "label": ["a"] * 12 + ["b"] * 12, "fold": folds, **columns})
    parquet.write_table(table, folder / "rows.parquet")
    return folder / "rows.parquet"


def test_a_parquet_file_with_folds(tmp_path: Path) -> None:
    """Numbers are read alike as whole numbers and as the floats of a column with gaps."""
    split = ["train"] * 11 + ["test"] + ["train"] * 11 + ["test"]
    whole, gaps = [i % 3 for i in range(24)], [float(i % 3) for i in range(24)]
    gaps[11] = None

    for folds in (whole, gaps):
        table = write_parquet(tmp_path, folds, split=split)
        train = load_source("parquet", table, fold_column="fold").train
        assert train.folds == tuple(str(i % 3) for i in range(24) if split[i] == "train")


@pytest.mark.parametrize(
    ("change", "column", "expected"),
    [
        ({3: None}, "fold", ["an empty cell in the fold column fold", "row 3"]),
        ({3: float("nan")}, "fold", ["an empty cell in the fold column fold", "row 3"]),
        ({}, "part", ["no fold column part", "path, label, fold"]),
    ],
)
def test_bad_parquet_columns(
    tmp_path: Path, change: dict[int, Any], column: str, expected: list[str]
) -> None:
    folds = [float(i % 3) for i in range(24)]
    for row, cell in change.items():
        folds[row] = cell
    table = write_parquet(tmp_path, folds)

    with pytest.raises(DataError) as error:
        load_source("parquet", table, fold_column=column)

    for text in expected:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("folds.scheme=column", "folds.scheme = column needs data.fold_column"),
        ('data={source="csv",root="x",fold_column="f"}', "set folds.scheme = column"),
        ('data={root="x",fold_column="f"}', "fold_column needs a table: source = csv"),
    ],
)
def test_recipes_that_contradict_themselves(override: str, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.parse(tiny_tree(Path("x")), [override])
    assert expected in str(error.value)


def test_a_run_scores_the_folds_of_the_column(tmp_path: Path) -> None:
    table = write_table(tmp_path, FOLDS)
    tree = tiny_tree(
        tmp_path,
        data={"source": "csv", "root": str(table), "fold_column": "fold"},
        folds={"scheme": "column", "select": 0.3},
        stages=[{"name": "one", "epochs": 1, "lr": 1e-3}],
    )
    tree["members"] = tree["members"][:1]
    recipe = Recipe.parse(tree)

    train_members(Run.create(recipe, tmp_path / "run"))

    oof = Run.open(tmp_path / "run").predictions("oof")
    values = ["a", "b2", "b10"]
    assert oof.folds is not None
    assert [values[fold] for fold in oof.folds] == FOLDS
