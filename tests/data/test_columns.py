"""Columns of a table that change what is trained on are read or refused, never ignored."""

from __future__ import annotations

import codecs
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.sources import load_source

from threefold.errors import DataError


def write_table(folder: Path, header: str, extra: list[str], encoding: str = "utf-8") -> Path:
    """Eight images of two classes; `extra` are the further cells of each row."""
    lines = [header]
    for i in range(8):
        Image.fromarray(np.full((3, 4), i, dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{'ab'[i % 2]},{extra[i]}")
    (folder / "data.csv").write_bytes("\n".join(lines).encode(encoding))
    return folder / "data.csv"


SPLIT = ["train"] * 4 + ["test"] * 4


@pytest.mark.parametrize(
    ("header", "cells"),
    [
        ("path,label,Split", SPLIT),
        ("Path,LABEL,split", ["Training"] * 4 + ["TEST"] * 4),
        ("path,label,SPLIT", ["dev", "train", "val", "valid", *["testing"] * 4]),
    ],
)
def test_capitals_do_not_matter(tmp_path: Path, header: str, cells: list[str]) -> None:
    sources = load_source("csv", write_table(tmp_path, header, cells))

    assert sources.test is not None
    assert sources.test.ids == ("4.png", "5.png", "6.png", "7.png")


def test_groups_are_known_in_any_case(tmp_path: Path) -> None:
    table = write_table(tmp_path, "path,label,Group", [f"g{i // 2}" for i in range(8)])

    assert load_source("csv", table).train.groups == tuple(f"g{i // 2}" for i in range(8))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("subset", "rename it to split"),
        ("is_valid", "rename it to split, with the values train, val or test"),
        ("Is Test", "rename it to split"),
        ("group_id", "rename it to group, or --set data.group_column=group_id"),
        ("Fold", 'data.fold_column to its name and folds.scheme = "column"'),
        ("fold", "data.fold_column"),
    ],
)
def test_near_misses_are_refused(tmp_path: Path, name: str, advice: str) -> None:
    table = write_table(tmp_path, f"path,label,{name}", SPLIT)

    with pytest.raises(DataError, match=f"would not be read: .*got {name}; fix: .*{advice}"):
        load_source("csv", table)


def test_what_is_not_read_is_noted(tmp_path: Path) -> None:
    cells = [f"{i},{i},x" for i in range(8)]
    table = write_table(tmp_path, "path,label,width,fold,height", cells)

    sources = load_source("csv", table, fold_column="fold")

    assert sources.notes[0] == "2 columns are not read: width, height"
    one = write_table(tmp_path, "path,label,width", SPLIT)
    assert load_source("csv", one).notes[0] == "1 column is not read: width"


@pytest.mark.parametrize("name", ["patient", "Patient ID", "lesion_id", "subject"])
def test_a_column_that_may_name_groups_is_named(tmp_path: Path, name: str) -> None:
    groups = tuple(f"p{i // 2}" for i in range(8))
    table = write_table(tmp_path, f"path,label,{name}", list(groups))

    unread, named = load_source("csv", table), load_source("csv", table, group_column=name)

    assert unread.train.groups is None
    assert f"--set data.group_column={name}" in unread.notes[1]
    assert (named.train.groups, named.notes) == (groups, (f"read from the table: group = {name}",))


def test_a_table_with_groups_has_no_other_column_of_them(tmp_path: Path) -> None:
    cells = [f"g{i // 2},p{i // 4}" for i in range(8)]
    table = write_table(tmp_path, "path,label,group,patient", cells)

    as_usual, named = load_source("csv", table), load_source("csv", table, group_column="patient")

    assert as_usual.notes == ("1 column is not read: patient",)
    assert as_usual.train.groups == tuple(f"g{i // 2}" for i in range(8))
    assert named.train.groups == tuple(f"p{i // 4}" for i in range(8))


def test_the_named_column_of_groups_must_exist_and_be_filled(tmp_path: Path) -> None:
    table = write_table(tmp_path, "path,label,patient", ["p0", "", *["p1"] * 6])

    with pytest.raises(DataError, match=r"no column who: .*fix: correct data\.group_column"):
        load_source("csv", table, group_column="who")
    with pytest.raises(DataError, match=r"invalid row: .*line 3; expected .*group not empty"):
        load_source("csv", table, group_column="patient")


@pytest.mark.parametrize("header", ["path,label,label", "path,label,Label", "path,label,path"])
def test_a_column_twice_is_refused(tmp_path: Path, header: str) -> None:
    table = write_table(tmp_path, header, ["a", "b"] * 4)

    with pytest.raises(DataError, match=r"two columns (have the same name|can be the label)"):
        load_source("csv", table)


def write_isic(folder: Path, header: str, rows: list[str], images: str = "Input") -> Path:
    """A table beside a folder with the eight images img0.jpg to img7.jpg."""
    (folder / images).mkdir(parents=True, exist_ok=True)
    for i in range(8):
        Image.fromarray(np.full((3, 4), i, dtype=np.uint8)).save(folder / images / f"img{i}.jpg")
    (folder / "truth.csv").write_text("\n".join([header, *rows]))
    return folder / "truth.csv"


ISIC = [f"img{i},{1.0 - i % 2},{float(i % 2)},0.0,g{i // 2}" for i in range(8)]


def test_truth_files_of_isic_are_read(tmp_path: Path) -> None:
    sources = load_source("csv", write_isic(tmp_path, "image,MEL,NV,UNK,group", ISIC))

    assert sources.train.ids == tuple(f"img{i}" for i in range(8))
    assert sources.train.classes == ("MEL", "NV")
    assert sources.train.labels.tolist() == [0, 1] * 4
    assert sources.train.groups == tuple(f"g{i // 2}" for i in range(8))
    assert sources.train.pixels(7)[0, 0].tolist() == [7, 7, 7]
    assert "the classes are 3 columns of 0 and 1: MEL, NV, UNK" in sources.notes


@pytest.mark.parametrize(
    ("row", "got"), [("img8,1,1", "1 in MEL, NV"), ("img8,0,0", "0 in all of them")]
)
def test_rows_of_several_classes_are_refused(tmp_path: Path, row: str, got: str) -> None:
    table = write_isic(tmp_path, "image,MEL,NV", [*(r[:12] for r in ISIC), row])
    table.write_text(table.read_text().replace(".0", ""))

    with pytest.raises(DataError, match=f"exactly one class: .* line 10; .*got {got}; .*multi"):
        load_source("csv", table)


def test_a_name_of_two_images_is_refused(tmp_path: Path) -> None:
    write_isic(tmp_path, "image,MEL,NV", [r[:12] for r in ISIC], images="copy")
    table = write_isic(tmp_path, "image,MEL,NV", [r[:12] for r in ISIC])

    with pytest.raises(DataError, match=r"img0; got Input/img0\.jpg, copy/img0\.jpg"):
        load_source("csv", table)


@pytest.mark.parametrize("name", ["subset", "Fold"])
def test_near_misses_in_parquet(tmp_path: Path, name: str) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write_table(tmp_path, "path,label,x", SPLIT)
    columns = {"path": [f"{i}.png" for i in range(8)], "label": ["a", "b"] * 4, name: SPLIT}
    parquet.write_table(pa.table(columns), tmp_path / "data.parquet")

    with pytest.raises(DataError, match=f"would not be read: .*got {name}"):
        load_source("parquet", tmp_path / "data.parquet")


def test_a_table_in_utf16(tmp_path: Path) -> None:
    table = write_table(tmp_path, "path,label,split", SPLIT, "utf-16")

    assert table.read_bytes().startswith(codecs.BOM_UTF16)
    assert len(load_source("csv", table).train) == 4


def test_a_path_with_the_accents_of_macos(tmp_path: Path) -> None:
    lines = ["path,label"]
    for i in range(4):
        image = Image.fromarray(np.full((3, 4), i, dtype=np.uint8))
        image.save(tmp_path / f"{unicodedata.normalize('NFD', 'é')}{i}.png")
        lines.append(f"é{i}.png,{'ab'[i % 2]}")
    (tmp_path / "data.csv").write_text("\n".join(lines), encoding="utf-8")

    assert load_source("csv", tmp_path / "data.csv").train.ids[0] == "é0.png"
