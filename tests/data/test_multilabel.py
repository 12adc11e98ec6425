"""Images with any number of labels: every form of table gives the same targets, or one clear line.

Folds by iterative stratification: each label is shared out evenly, groups stay whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.sources import load_source

from threefold.data.dataset import Sources
from threefold.data.detect_source import detect_source, find_multilabel
from threefold.data.in_memory import store_data
from threefold.data.label_folds import stratify
from threefold.data.labelled import load_labelled
from threefold.data.load import load_data
from threefold.data.shapes import SHAPES, write_shapes
from threefold.data.sources.label_sets import find_separator, split_labels
from threefold.data.splits import assign_roles, refit_roles
from threefold.errors import DataError
from threefold.recipe.schema import DataSpec, FoldSpec

SETS = [
    ("cat", "dog"),
    ("cat",),
    (),
    ("dog",),
    ("cat", "dog", "sun hat"),
    ("sun hat",),
    ("cat",),
    (),
]
CLASSES = ("cat", "dog", "sun hat")
TARGETS = np.array([[int(name in labels) for name in CLASSES] for labels in SETS], np.uint8)


def paint(folder: Path, count: int = len(SETS)) -> list[str]:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((3, 4), i, np.uint8)).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(count)]


def write_csv(folder: Path, header: str, cells: list[str], suffix: str = ".csv") -> Path:
    names = paint(folder)
    path = folder / f"data{suffix}"
    sign = "\t" if suffix == ".tsv" else ","
    rows = [f"{name}{sign}{cell}" for name, cell in zip(names, cells, strict=True)]
    path.write_text("\n".join([header.replace(",", sign), *rows]))
    return path


def load_found(path: Path) -> Sources:
    """Load a table as `fit` does, which finds the task."""
    spec = detect_source(path)
    found = find_multilabel(spec)
    assert found is not None
    changes = {"task": "multilabel", "label_separator": found.separator or None}
    return load_data(spec.model_copy(update=changes), 0)


def check(sources: Sources) -> None:
    assert sources.train.classes == CLASSES
    np.testing.assert_array_equal(sources.train.targets, TARGETS)
    assert set(sources.train.labels) == {-1}
    assert sources.train.label_names(4) == ("cat", "dog", "sun hat")


@pytest.mark.parametrize("sign", ["|", ";", ", "])
def test_a_cell_names_several_labels(tmp_path: Path, sign: str) -> None:
    cells = [f'"{sign.join(labels)}"' for labels in SETS]

    check(load_found(write_csv(tmp_path, "path,labels", cells)))
    check(load_found(write_csv(tmp_path, "file,tags", cells, ".tsv")))


@pytest.mark.parametrize("yes_no", [("1", "0"), ("1.0", "0.0"), ("True", "False")])
def test_each_label_has_a_column(tmp_path: Path, yes_no: tuple[str, str]) -> None:
    cells = [",".join(yes_no[0] if mark else yes_no[1] for mark in row) for row in TARGETS]

    sources = load_found(write_csv(tmp_path, "path,cat,dog,sun hat", cells))

    check(sources)
    assert "the labels are 3 columns of 0 and 1: cat, dog, sun hat" in sources.notes
    assert any("none on 2 and at most 3" in note for note in sources.notes)


def test_lists_that_pandas_has_written_are_read(tmp_path: Path) -> None:
    check(load_found(write_csv(tmp_path, "path,labels", [f'"{list(row)}"' for row in SETS])))


def test_a_separator_can_be_named(tmp_path: Path) -> None:
    cells = ["/".join(labels) for labels in SETS]
    table = write_csv(tmp_path, "path,labels", cells)

    check(load_source("csv", table, task="multilabel", label_separator="/"))


@pytest.mark.parametrize("form", ["text", "lists", "columns"])
def test_parquet(tmp_path: Path, form: str) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    labels: dict[str, Any] = {
        "text": {"labels": ["|".join(labels) or None for labels in SETS]},
        "lists": {"labels": [list(labels) for labels in SETS]},
        "columns": {name: TARGETS[:, i].tolist() for i, name in enumerate(CLASSES)},
    }[form]
    pq.write_table(pa.table({"path": paint(tmp_path), **labels}), tmp_path / "data.parquet")

    check(load_found(tmp_path / "data.parquet"))


def test_arrays(tmp_path: Path) -> None:
    images = np.arange(8, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=TARGETS, classes=CLASSES)
    np.savez(tmp_path / "b.npz", x=images, y=TARGETS)

    check(load_found(tmp_path / "a.npz"))
    assert load_found(tmp_path / "b.npz").train.classes == ("0", "1", "2")


@pytest.mark.parametrize("form", ["lists", "sets", "frame of lists", "frame of columns", "texts"])
def test_data_in_memory(tmp_path: Path, form: str) -> None:
    paths = [str(tmp_path / "images" / name) for name in paint(tmp_path / "images")]
    columns = {name: TARGETS[:, i].tolist() for i, name in enumerate(CLASSES)}
    data, labels = {
        "lists": (paths, [list(row) for row in SETS]),
        "sets": (paths, list(map(set, SETS))),
        "frame of lists": ({"path": paths, "tags": list(map(list, SETS))}, None),
        "frame of columns": ({"path": paths, **columns}, None),
        "texts": (paths, [";".join(row) for row in SETS]),
    }[form]

    check(load_found(store_data(data, labels, tmp_path / "run")))


def test_targets_of_arrays_in_memory(tmp_path: Path) -> None:
    images = np.zeros((8, 4, 4), np.uint8)

    sources = load_found(store_data(images, TARGETS, tmp_path / "run"))

    np.testing.assert_array_equal(sources.train.targets, TARGETS)
    assert sources.train.classes == ("0", "1", "2")


def test_a_folder_with_a_table_of_columns_is_found(tmp_path: Path) -> None:
    write_shapes(tmp_path, 40, test=20, size=8)

    sources = load_found(tmp_path)

    assert sources.test is not None
    assert sources.train.classes == SHAPES
    assert sources.test.is_multilabel
    assert (len(sources.train), len(sources.test)) == (40, 20)


@pytest.mark.parametrize(
    "cells",
    [
        ["golden retriever", "labrador retriever", "great dane", "poodle"],
        ["Pepper,_bell___healthy", "Pepper,_bell___spot", "Corn_(maize)___healthy"],
        ["tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark, white shark"],
        ["sea", "sea ice", "ice"],
        ["a", "b"],
        ["new york", "los angeles", "york"],
        ["red car", "blue car", "red bus", "blue bus"],
        ["", ""],
    ],
)
def test_names_of_classes_are_no_lists(cells: list[str]) -> None:
    assert find_separator(cells) == ""


def test_tags_with_spaces_are_found() -> None:
    planet = ["haze primary", "clear primary", "clear primary water", "cloudy", "haze water"]
    planet += ["clear water", "haze primary water", "primary", "water", "haze"]

    assert find_separator(planet) == " "
    assert split_labels("haze  primary haze", " ") == ("haze", "primary")


def test_one_class_for_each_image_stays_so(tmp_path: Path) -> None:
    cells = ["1,0", "0,1"] * 4

    assert find_multilabel(detect_source(write_csv(tmp_path, "path,cat,dog", cells))) is None


BAD = [
    (["a|b", "a|b", "b", "a", "a", "b", "a|c", "a"], {}, r"fewer than 2 usable .*got c \(1\)"),
    (["a|b", "a|b", "b", "a|b", "a|b", "b", "a|b", "b"], {}, r"missing on fewer.*got b \(0\)"),
    (["a", "", "", "", "a", "a", "a", "a"], {}, "too few labels: .*got only a"),
    (["a|b"] * 8, {"task": "multiclass"}, "too few classes"),
]


@pytest.mark.parametrize(("cells", "options", "message"), BAD)
def test_labels_that_cannot_be_learned_are_refused(
    tmp_path: Path, cells: list[str], options: dict[str, str], message: str
) -> None:
    table = write_csv(tmp_path, "path,labels", cells)

    with pytest.raises(DataError, match=message.replace(": .*", ".*")) as error:
        load_source("csv", table, **{"task": "multilabel", **options})
    assert "\n" not in str(error.value)


def test_a_recipe_for_one_class_names_the_task(tmp_path: Path) -> None:
    cells = [",".join(map(str, row)) for row in TARGETS]
    table = write_csv(tmp_path, "path,cat,dog,sun hat", cells)

    with pytest.raises(DataError, match=r'several labels per image .*data\.task = "multilabel"'):
        load_source("csv", table)


def test_a_label_of_test_images_only_is_refused(tmp_path: Path) -> None:
    cells = [
        "a,train",
        "a|b,train",
        "b,train",
        ",train",
        "a|b,train",
        "a,test",
        "b|c,test",
        "b,test",
    ]
    table = write_csv(tmp_path, "path,labels,split", cells)

    with pytest.raises(DataError, match="only in test: c"):
        load_source("csv", table, task="multilabel")


def test_images_to_score_keep_labels_that_none_of_them_has(tmp_path: Path) -> None:
    table = write_csv(tmp_path, "path,cat,dog,sun hat", ["1,0,0", "0,0,0"] * 4)

    data = load_labelled(table, "multilabel")

    assert data.classes == CLASSES
    assert data.targets is not None
    assert data.targets.sum() == 4


def test_a_limit_keeps_images_of_every_label(tmp_path: Path) -> None:
    table = write_shapes(tmp_path, 60, size=8)

    data = load_source("csv", table, task="multilabel", limit_per_class=4).train

    assert data.targets is not None
    counts = data.targets.sum(0)
    assert (counts >= 4).all()
    assert len(data) < 30


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    k = draw(st.integers(2, 6))
    shares = rng.uniform(0.1, 0.7, k)
    return (rng.random((draw(st.integers(40, 120)), k)) < shares).astype(np.int64), rng


@settings(max_examples=25, deadline=None)
@given(tables(), st.integers(2, 5))
def test_labels_are_shared_out_evenly(case: Any, k: int) -> None:
    targets, rng = case

    parts = stratify(targets, None, [1 / k] * k, rng)

    def unevenness(of_row: np.ndarray) -> float:
        counts = np.array([targets[of_row == part].sum(0) for part in range(k)])
        return float(np.abs(counts - targets.sum(0) / k).mean())

    sizes = np.bincount(parts, minlength=k)
    assert sizes.max() - sizes.min() <= 0.15 * len(targets) + 2
    by_chance = [unevenness(np.random.default_rng(i).permutation(parts)) for i in range(10)]
    assert unevenness(parts) < np.mean(by_chance)
    rarest = int(np.argmin(np.where(targets.sum(0) > 0, targets.sum(0), 10**6)))
    assert np.ptp(np.bincount(parts, targets[:, rarest], k)) <= 1


@pytest.mark.parametrize("scheme", ["stratified", "grouped", "leave-one-group-out", "column"])
def test_roles_of_several_labels(scheme: Any) -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random((90, 4)) < (0.5, 0.3, 0.2, 0.1)).astype(np.uint8)
    groups = [f"g{i // 3 % 12}" for i in range(90)]
    folds = [str(i % 3) for i in range(90)]
    spec = FoldSpec(k=3, scheme=scheme, select=0.2)

    roles = assign_roles(targets, groups, spec, "honest", 7, None, folds)
    again = assign_roles(targets, groups, spec, "honest", 7, None, folds)

    np.testing.assert_array_equal(np.sort(np.concatenate([r.score for r in roles])), np.arange(90))
    for part, same in zip(roles, again, strict=True):
        np.testing.assert_array_equal(np.sort(np.concatenate(part)), np.arange(90))
        np.testing.assert_array_equal(part.select, same.select)
        assert 0 < targets[part.fit].mean(0).min() <= targets[part.fit].mean(0).max() < 1
        assert 0.1 <= len(part.select) / (90 - len(part.score)) <= 0.35
        if scheme in ("grouped", "leave-one-group-out"):
            of_role = [{groups[row] for row in rows} for rows in part]
            assert not of_role[0] & of_role[1]
            assert not of_role[0] & of_role[2]
    refit = refit_roles(targets, groups, spec, 7)
    assert len(refit.fit) + len(refit.select) == 90


@pytest.mark.parametrize("rare", [[1, 0], [0, 1]])
def test_a_label_too_rare_for_the_folds_is_refused(rare: list[int]) -> None:
    common, other = [1 - rare[0], 1], [rare[0], 0]
    targets = np.array([common] * 9 + [other] * 2)

    with pytest.raises(DataError, match=r"too few images with.* the label .* for 3 folds"):
        assign_roles(targets, None, FoldSpec(k=3), "honest", 0, ("a", "b"))


def test_a_task_needs_a_table() -> None:
    with pytest.raises(ValueError, match="folder has one class for each image; task = multilabel"):
        DataSpec(task="multilabel")
    with pytest.raises(ValueError, match="label_separator needs task = multilabel"):
        DataSpec(source="csv", label_separator="|")
