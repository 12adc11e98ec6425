"""Parquet files and data sets of the hub: labels, splits, groups, ids, and damaged tables."""

from __future__ import annotations

import builtins
import io
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.sources import load_source

from threefold.data.detect_source import find_fold_column
from threefold.data.load import load_data
from threefold.data.sources import parquet as parquet_source
from threefold.errors import DataError
from threefold.recipe.schema import DataSpec

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((3, 4, 3), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write(file: Path, names: list[str] | None = None, **columns: Any) -> Path:
    table = pa.table(columns)
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata(
            {"huggingface": json.dumps({"info": {"features": features}})}
        )
    pq.write_table(table, file, row_group_size=2)
    return file


def test_bytes_labels_splits_groups_and_ids(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.parquet",
        image=[png(i) for i in range(8)],
        label=["dog", "cat"] * 4,
        split=["train"] * 3 + ["val", "train", "Test", "test", "train"],
        group=[f"g{i // 2}" for i in range(8)],
        id=[f"i{7 - i}" for i in range(8)],
    )

    sources = load_source("parquet", path)

    train, test = sources.train, sources.test

    assert test is not None
    assert (train.classes, train.ids, test.ids) == (
        ("cat", "dog"),
        ("i0", "i3", "i4", "i5", "i6", "i7"),
        ("i1", "i2"),
    )
    assert [int(train.pixels(i)[0, 0, 0]) for i in range(6)] == [7, 4, 3, 2, 1, 0]
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert train.groups == ("g3", "g2", "g1", "g1", "g0", "g0")

    part = train.subset([4, 1])

    assert [int(part.pixels(i)[0, 0, 0]) for i in range(2)] == [1, 4]
    assert sources.warnings == ("2 groups are in both train and test: g2, g3",)
    assert len(load_source("parquet", path, limit_per_class=2).train) == 4


def test_files_as_the_hub_keeps_them(tmp_path: Path) -> None:
    """Images as structs, label names in the metadata, and the split in the name of the file."""
    for part, shades in (
        ("train-00000-of-00002", (0, 1, 2)),
        ("train-00001-of-00002", (3, 4, 5)),
        ("test-00000", (6, 7)),
    ):
        cells = [{"bytes": png(shade), "path": f"{shade}.png"} for shade in shades]
        write(
            tmp_path / f"{part}.parquet",
            ["wolf", "ant"],
            image=cells,
            label=[shade % 2 for shade in shades],
        )

    sources = load_source("parquet", tmp_path)

    assert sources.test is not None
    assert sources.train.classes == ("wolf", "ant")
    assert (len(sources.train), len(sources.test)) == (6, 2)
    assert sorted(int(sources.train.pixels(i)[0, 0, 0]) for i in range(6)) == [0, 1, 2, 3, 4, 5]
    for data in (sources.train, sources.test):
        for row, label in enumerate(data.labels):
            assert int(data.pixels(row)[0, 0, 0]) % 2 == label


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    path = write(tmp_path / "a.parquet", path=[f"{i}.png" for i in range(4)], label=[0, 10, 2, 10])

    with pytest.raises(DataError, match="fewer than 2"):
        load_source("parquet", path)

    path = write(tmp_path / "a.parquet", path=[f"{i}.png" for i in range(4)], label=[2, 10, 2, 10])

    assert load_source("parquet", path).train.classes == ("2", "10")
    assert load_source("parquet", path).train.images == tuple(
        tmp_path / f"{i}.png" for i in range(4)
    )

    (tmp_path / "3.png").unlink()

    with pytest.raises(DataError, match="1 file of the table does not exist"):
        load_source("parquet", path)


def test_bad_images_and_copies_in_tables_are_reported(tmp_path: Path) -> None:
    images = [png(0), png(1), png(2), png(1), b"none"]
    path = write(tmp_path / "a.parquet", image=images, label=list("abaab"), id=list("vwxyz"))

    with pytest.raises(DataError, match=r"1 of 5 images cannot be used; got z \(not an image"):
        load_source("parquet", path)

    path = write(
        tmp_path / "a.parquet", image=[*images, png(9)], label=list("abaabb"), id=list("uvwxyz")
    )

    sources = load_source("parquet", path, bad_images="skip")

    assert [str(bad.path) for bad in sources.skipped] == ["y"]
    assert "copy of others" in sources.warnings[0]
    assert sources.warnings[1] == "1 image is in several classes as exact copies: v = x"
    assert Counter(sources.train.labels.tolist()) == {0: 3, 1: 2}


GOOD: dict[str, Any] = {"image": [png(0), png(1), png(2), png(3)], "label": ["a", "b", "a", "b"]}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no label": ({"image": GOOD["image"]}, "no column that can be the label.*got image"),
    "no image": (
        {"label": GOOD["label"]},
        "no column that can be the path.*expected path: path, image, .*got label",
    ),
    "empty cell": ({**GOOD, "label": ["a", None, "a", "b"]}, "row 1; expected no empty cell"),
    "no picture": (
        {**GOOD, "image": [png(0), None, png(2), png(3)]},
        r"1 of 4 images cannot be used; got train/0000001 \(the cell has no image: NoneType\)",
    ),
    "number": ({**GOOD, "image": [1, 2, 3, 4]}, "the cell has no image"),
    "float": ({**GOOD, "label": [0.5, 1.0, 1.0, 0.5]}, "neither text nor a whole number"),
    "split": ({**GOOD, "split": ["train", "x", "test", "test"]}, "split one of"),
    "ids": ({**GOOD, "id": ["a", "a", "b", "c"]}, "ids are not unique"),
    "path only": (
        {**GOOD, "image": [{"bytes": None, "path": "/etc/passwd"}] * 4},
        "the cell has no image",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables(tmp_path: Path, case: str) -> None:
    columns, message = BAD[case]

    with pytest.raises(DataError, match=message):
        load_source("parquet", write(tmp_path / "data.parquet", **columns))


def test_bad_parquet_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.parquet files"):
        load_source("parquet", tmp_path)

    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")

    with pytest.raises(DataError, match="cannot read the parquet file"):
        load_source("parquet", tmp_path)

    write(tmp_path / "a.parquet", ["only"], **{**GOOD, "label": [0, 1, 0, 1]})

    with pytest.raises(DataError, match=r"a label has no name: .*expected 0 to 0, got 1"):
        load_source("parquet", tmp_path)


@pytest.mark.parametrize(
    ("source", "package", "extra"),
    [("parquet", "pyarrow", "parquet"), ("huggingface", "datasets", "hf")],
)
def test_a_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, package: str, extra: str
) -> None:
    write(tmp_path / "a.parquet", **GOOD)
    real: Callable[..., Any] = builtins.__import__
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.import_module", lambda name: real("no_such_package"))
    message = rf"{package} is not installed; fix: .*pip install .*\[{extra}\]"

    with pytest.raises(DataError, match=message):
        load_source(source, tmp_path)


def test_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library reads a folder as it reads the hub."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    hub = pytest.importorskip("datasets")
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = hub.Features(
        {
            "img": hub.Image(),
            "fine_label": hub.ClassLabel(names=["wolf", "ant"]),
            "note": hub.Value("string"),
            "fold": hub.Value("int64"),
        }
    )
    (tmp_path / "data").mkdir()
    for part, shades in (("train", range(4)), ("validation", range(4, 6)), ("test", range(6, 8))):
        rows = {
            "img": [{"bytes": png(shade), "path": None} for shade in shades],
            "fine_label": [shade % 2 for shade in shades],
            "note": ["xy"[shade % 2] for shade in shades],
            "fold": [shade // 2 for shade in shades],
        }
        hub.Dataset.from_dict(rows, features=features).to_parquet(
            str(tmp_path / f"data/{part}.parquet")
        )

    sources = load_source("huggingface", tmp_path / "data")

    assert sources.test is not None
    assert (sources.train.classes, len(sources.train), len(sources.test)) == (("wolf", "ant"), 6, 2)
    for data in (sources.train, sources.test):
        for row, label in enumerate(data.labels):
            assert int(data.pixels(row)[0, 0, 0]) % 2 == label
    spec = DataSpec(source="huggingface", root=str(tmp_path / "data"), label_column="note")
    folds = load_data(spec.model_copy(update={"fold_column": find_fold_column(spec)}), 0).train
    assert (folds.folds, folds.classes) == (("0", "0", "1", "1", "2", "2"), ("x", "y"))
    grouped = load_source("huggingface", tmp_path / "data", group_column="note").train
    assert grouped.groups == tuple("xy"[label] for label in grouped.labels)
    with pytest.raises(DataError, match=r"no column what: .*correct data\.label_column"):
        load_source("huggingface", tmp_path / "data", label_column="what")
    with pytest.raises(DataError, match=r"cannot load the data set: .*absent"):
        load_source("huggingface", tmp_path / "absent")


def test_images_of_large_files_are_copied_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(parquet_source, "MEMORY_BYTES", 0)
    images = [png(i) if i != 3 else None for i in range(8)]
    path = write(tmp_path / "a.parquet", image=images, label=["a", "b"] * 4)
    original = parquet_source.encoded_image

    def stop_at_five(cell: Any, where: str, may_open: bool) -> bytes:
        if where.endswith("row 5"):
            raise KeyboardInterrupt
        return original(cell, where, may_open)

    monkeypatch.setattr(parquet_source, "encoded_image", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        load_source("parquet", path)
    copied: list[str] = []
    monkeypatch.setattr(
        parquet_source,
        "encoded_image",
        lambda cell, where, may_open: copied.append(where) or original(cell, where, may_open),
    )

    sources = load_source("parquet", path, bad_images="skip")
    train = load_source("parquet", path, bad_images="skip").train

    assert [where.rpartition(" ")[2] for where in copied] == ["5", "6", "7"]
    assert [bad.reason for bad in sources.skipped] == [
        "there is no image: the cell has no image, NoneType"
    ]
    assert train.ids == sources.train.ids
    assert [int(train.pixels(i)[0, 0, 0]) for i in range(7)] == [0, 1, 2, 4, 5, 6, 7]
    assert train.labels.tolist() == [0, 1, 0, 0, 1, 0, 1]
