"""Bad files give one line that names the file and the fault; none takes memory or runs code."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.predictions import Bomb, assert_refused, foreign_arrays, make_predictions

from threefold.errors import DataError
from threefold.predictions import array_files, tables
from threefold.predictions.formats import read_predictions, write_predictions
from threefold.predictions.predictions import Predictions

HEAD = "id,label,cat,dog\n"
GOOD = HEAD + "a,cat,0.75,0.25\nb,dog,0.25,0.75\n"

TEXTS: dict[str, tuple[str | bytes, str]] = {
    "zero bytes": ("", "file is empty.*0 bytes"),
    "header only": (HEAD, "a header and no rows"),
    "header without line end": (HEAD.strip(), "a header and no rows"),
    "empty lines only": ("\n\n", "a column has no name"),
    "no label": ("id,cat,dog\na,1,0\n", "neither labels nor paths.*got id, cat, dog"),
    "label misspelt": ("id,labels,cat,dog\na,cat,1,0\n", "did you mean labels"),
    "no classes": (
        "id,label\na,cat\n",
        "too few class columns.*one column per class; answers alone",
    ),
    "one class": ("id,label,cat\na,cat,1\n", "too few class columns.*1 - p"),
    "member without ids": ("label,member,cat,dog\ncat,m,1,0\n", "member needs ids"),
    "id and path": ("id,path,cat,dog\na,cat/a,1,0\n", "id or path, not both"),
    "row of too few cells": (
        GOOD + "c,cat,1\n",
        "line 4; expected 4 cells as in the header, got 3",
    ),
    "row of too many cells": (GOOD + "c,cat,1,0,0\n", "line 4.*got 5"),
    "cut off in a row": (GOOD + "c,ca", "line 4.*got 2"),
    "cut off in a quote": (GOOD + 'c,"ca', "cannot read the CSV file.*unexpected end"),
    "quotes inside": (GOOD + 'c,"c"a"t",1,0\n', "cannot read the CSV file"),
    "a giant cell": (GOOD + "c" * 200_000 + ",cat,1,0\n", "field larger than field limit"),
    "empty id": (GOOD + ",cat,1,0\n", "cell is empty.*line 4; got column id"),
    "empty number": (GOOD + "c,cat,,1\n", "cell is empty.*line 4; got column cat"),
    "NaN": (GOOD + "c,cat,nan,1\n", "not a number: .*row c, class cat; got nan"),
    "infinite": (GOOD + "c,cat,inf,1\n", "not a number: .*row c, class cat; got inf"),
    "too large for float32": (
        GOOD + "c,cat,1e300,1\n",
        "not a number: .*row c, class cat; got inf",
    ),
    "logits": (
        GOOD + "c,cat,3.2,-1.5\n",
        "not probabilities .logits.*row c.*got 3.2, -1.5 with sum 1.7; fix: apply softmax",
    ),
    "logits that sum to 1": (GOOD + "c,cat,1.5,-0.5\n", "not probabilities .logits.*row c"),
    "percent": (GOOD + "c,cat,75,25\n", "these are percentages.*row c.*divide by 100"),
    "log probabilities": (GOOD + "c,cat,-0.2877,-1.3863\n", "logarithms.*row c.*apply exp"),
    "two digits": (
        HEAD[:-1] + ",cow\na,cat,0.33,0.33,0.33\n",
        "do not sum to 1.*row a.*at least 5 digits",
    ),
    "a class left out": (GOOD + "c,cat,0.3,0.2\n", "do not sum to 1.*row c.*all classes"),
    "several members side by side": (
        "label,m:cat,m:dog,n:cat,n:dog\n0,1,0,0.5,0.5\n",
        "several members.*column `member`",
    ),
    "text in a number column": (
        GOOD + "c,cat,high,0.5\n",
        "line 4, column cat; expected a probability, got high",
    ),
    "an extra text column": (
        "id,label,model,cat,dog\na,cat,resnet,1,0\n",
        "line 2, column model.*got resnet",
    ),
    "decimal commas": (GOOD + 'c,cat,"0,5","0,5"\n', "got 0,5; fix: write decimal points"),
    "semicolons": (
        GOOD.replace(",", ";"),
        "not separated by commas; got ;|not separated by commas: .*got ;",
    ),
    "tabs": (GOOD.replace(",", "\t"), "not separated by commas.*got tabs"),
    "a column twice": ("id,label,cat,cat\na,cat,1,0\n", "two columns have the same name.*got cat"),
    "row numbers of pandas": (
        ",id,label,cat,dog\n0,a,cat,1,0\n",
        "a column has no name.*index=False",
    ),
    "row numbers read and written again": (
        "Unnamed: 0,label,cat,dog\n0,cat,1,0\n",
        "row numbers.*Unnamed: 0.*index=False",
    ),
    "ids twice": (GOOD + "a,cat,1,0\n", "ids are not unique; got a twice"),
    "ids twice in one member": (
        "id,label,member,cat,dog\na,cat,m,1,0\na,cat,m,1,0\nb,cat,n,1,0\n",
        "member m; got ids are not unique",
    ),
    "a member without a row": (
        "id,label,member,cat,dog\na,cat,m,1,0\nb,dog,m,0,1\na,cat,n,1,0\n",
        "rows are not the same.*n.*1 missing.*is b",
    ),
    "labels of one id differ": (
        "id,label,member,cat,dog\na,cat,m,1,0\nb,dog,m,0,1\na,dog,n,1,0\nb,dog,n,0,1\n",
        "two labels: a",
    ),
    "an unknown label": (
        GOOD + "c,cow,1,0\n",
        "a label is not a class.*row 2; expected one of cat, dog, got cow",
    ),
    "a label nearly right": (GOOD + "c,Cat,1,0\n", "expected cat, or another, got Cat"),
    "a fold that is no number": (
        "label,fold,cat,dog\ncat,one,1,0\n",
        "not a whole number.*column fold; got one",
    ),
    "an unknown protocol": (
        "label,protocol,cat,dog\ncat,fair,1,0\n",
        "unknown protocol; expected honest or paper or taught, got fair",
    ),
    "two protocols": (
        "label,protocol,cat,dog\ncat,honest,1,0\ncat,paper,1,0\n",
        "same in all rows.*honest, paper",
    ),
    "Latin 1": (GOOD.encode() + "c,cät,1,0\n".encode("latin-1"), "not UTF-8.*0xe4.*utf-8"),
    "UTF-16": (GOOD.encode("utf-16"), "UTF-16 text content; fix: save it as UTF-8"),
    "binary": (bytes(range(256)) * 8, "contradicts its suffix.*expected csv, got binary content"),
    "zip named csv": (b"PK\x03\x04" + bytes(200), "cut off or damaged.*zip"),
    "gzip named csv": (b"\x1f\x8b\x08" + bytes(200), "expected csv, got gzip content"),
    "HDF5 named csv": (b"\x89HDF\r\n\x1a\n" + bytes(200), "got HDF5 content"),
    "npy named csv": (
        b"\x93NUMPY\x01\x00" + bytes(200),
        "got npy content; fix: rename the file to end in .npy",
    ),
    "parquet named csv": (b"PAR1" + bytes(200), "got parquet content; fix: rename"),
    "JSON named csv": ('{"a": {"prob": [0.5, 0.5]}}', "got json content; fix: rename"),
    "only a letter": ("x", "neither labels nor paths|header and no rows"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_bad_csv(tmp_path: Path, case: str) -> None:
    content, message = TEXTS[case]
    path = tmp_path / "net.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)

    assert_refused(path, message)


def test_the_good_file_that_the_bad_ones_come_from_is_read(tmp_path: Path) -> None:
    (tmp_path / "net.csv").write_text(GOOD)

    assert read_predictions(tmp_path / "net.csv").ids == ("a", "b")


JSONS = {
    "no table": ("[1, 2]", "not a table"),
    "an empty list": ("[]", "not a table"),
    "cut off": ('{"a.png": {"prob": [0.5,', "cannot read the JSON file"),
    "nested without end": ("[" * 100_000, "cannot read the JSON file"),
    "a name twice": (
        '{"a": {"prob": [1, 0]}, "a": {"prob": [1, 0]}}',
        "repeats a name.*got a",
    ),
    "rows that differ": (
        '{"a": {"prob_0": 1, "prob_1": 0}, "b": {"prob_0": 1}}',
        "differs from the others.*row 1",
    ),
    "null": ('{"a": {"prob_0": null, "prob_1": 0}}', "empty cell.*row 0"),
    "text for a number": ('{"a": {"prob_0": "x", "prob_1": 0}}', "row 0, column prob_0; got x"),
    "a number without end": ('{"a": {"prob_0": 1' + "0" * 400 + ', "prob_1": 0}}', "column prob_0"),
    "lists that differ": (
        '{"c/a": {"prob": [1, 0]}, "c/b": {"prob": [1]}}',
        "lists of a column differ",
    ),
    "ragged split": ('{"columns": ["filename", "prob"], "data": [["a"]]}', "not a table"),
    "settings": ('{"model": "resnet", "epochs": 3}', "not a table"),
}


@pytest.mark.parametrize("case", JSONS)
def test_bad_json(tmp_path: Path, case: str) -> None:
    content, message = JSONS[case]

    (tmp_path / "net.json").write_text(content)

    assert_refused(tmp_path / "net.json", message)


def npz(path: Path, **arrays: Any) -> None:
    np.savez(path, **{**foreign_arrays(), **arrays})


def forged(path: Path, shape: tuple[int, ...], name: str = "probs.npy") -> None:
    """Write an .npz whose header claims a shape that its content does not have."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, header.getvalue() + bytes(64))
        archive.writestr("labels.npy", header.getvalue())


NPZS: dict[str, tuple[Callable[[Path], None], str]] = {
    "text": (lambda path: path.write_text("probs") and None, "expected npz, got csv content"),
    "zero bytes": (lambda path: path.write_bytes(b"") and None, "file is empty"),
    "a zip of something else": (
        lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "x"),
        "got zip content",
    ),
    "a zip without anything": (lambda path: zipfile.ZipFile(path, "w").close(), "got zip content"),
    "no probs": (
        lambda path: np.savez(path, x=np.ones(3), labels=np.zeros(3, int)),
        "probabilities are missing.*got x, labels",
    ),
    "no labels": (lambda path: np.savez(path, probs=np.eye(2)), "there are no labels"),
    "text for numbers": (lambda path: npz(path, probs=np.full((2, 6, 3), "x")), "must be numbers"),
    "complex": (lambda path: npz(path, probs=np.ones((2, 6, 3), complex)), "must be numbers"),
    "four axes": (lambda path: npz(path, probs=np.ones((1, 2, 6, 3))), "wrong shape"),
    "wrong number of classes": (
        lambda path: npz(path, classes=np.array(["a", "b"])),
        "expected 3 names, got 2",
    ),
    "one-hot labels": (
        lambda path: npz(path, labels=np.eye(3, dtype=int)[[0, 1, 2, 0, 1, 2]]),
        "labels .*wrong shape",
    ),
    "an absurd shape": (
        lambda path: forged(path, (10**7, 10**9)),
        r"cut off or damaged.*expected \d+ bytes",
    ),
    "a shape beyond 64 bits": (lambda path: forged(path, (2**40, 2**40)), "cut off or damaged"),
    "a smaller shape": (lambda path: forged(path, (2, 2)), "cut off or damaged"),
    "an entry that is no array": (
        lambda path: forged(path, (4, 4), "probs"),
        "an entry that is not an array.*got probs",
    ),
}


@pytest.mark.parametrize("case", NPZS)
def test_bad_npz(tmp_path: Path, case: str) -> None:
    build, message = NPZS[case]
    build(tmp_path / "net.npz")

    assert_refused(tmp_path / "net.npz", message)


@pytest.mark.parametrize(
    "name",
    ["probs", "labels", "ids", "members", "provenance", "class_indices", "classes_", "other"],
)
def test_object_arrays_are_never_unpickled(tmp_path: Path, name: str) -> None:
    npz(tmp_path / "net.npz", **{name: np.array([Bomb(tmp_path / "exploded")], dtype=object)})

    assert_refused(tmp_path / "net.npz", "never unpickled")

    np.save(
        tmp_path / "net.npy",
        np.array([Bomb(tmp_path / "exploded")], dtype=object),
        allow_pickle=True,
    )

    assert_refused(tmp_path / "net.npy", "never unpickled")
    assert not (tmp_path / "exploded").exists()


def test_a_pt_file_runs_no_code(tmp_path: Path) -> None:
    import torch

    torch.save({"probs": Bomb(tmp_path / "exploded")}, tmp_path / "net.pt")

    assert_refused(tmp_path / "net.pt", "more than tensors")
    assert not (tmp_path / "exploded").exists()


def peak(read: Callable[[], None]) -> int:
    """Most bytes that Python and numpy held at once."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_oversized_file_is_refused_before_allocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(
        tmp_path / "net.npz", probs=np.zeros((2, 10**6, 4), np.float32), labels=np.zeros(10**6, int)
    )
    np.save(tmp_path / "net.npy", np.zeros((10**6, 4), np.float32))

    assert (tmp_path / "net.npz").stat().st_size < 100_000

    monkeypatch.setattr(array_files, "MAX_BYTES", 8 << 20)

    for name in ("net.npz", "net.npy"):
        read = partial(assert_refused, tmp_path / name, "too large.*at most 8 MiB")
        assert peak(read) < 4 << 20


def test_a_large_text_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_files, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(tables, "MAX_JSON", 1 << 20)

    (tmp_path / "net.csv").write_text(GOOD * 60_000)

    assert_refused(tmp_path / "net.csv", "too large")

    (tmp_path / "net.json").write_text(json.dumps([0.5] * 400_000))

    assert_refused(
        tmp_path / "net.json",
        "JSON file is too large; expected at most 1 MiB|JSON file is too large: ",
    )


# parquet


def parquet(path: Path, **columns: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    good = {"id": ["a", "b"], "label": ["cat", "dog"], "cat": [0.75, 0.25], "dog": [0.25, 0.75]}
    table = arrow.table(
        {name: cells for name, cells in {**good, **columns}.items() if cells is not None}
    )
    pytest.importorskip("pyarrow.parquet").write_table(table, path)


PARQUETS: dict[str, tuple[dict[str, Any], str]] = {
    "no label": ({"label": None}, "neither labels nor paths"),
    "text in a number column": ({"cat": ["high", "low"]}, "column cat; got string"),
    "lists": ({"cat": [[1.0], [2.0]]}, "column cat; got list"),
    "an empty cell": ({"id": ["a", None]}, "cell is empty.*column id; got 1 empty"),
    "an empty number": ({"cat": [0.5, None]}, "cell is empty.*column cat"),
    "NaN": ({"cat": [0.5, float("nan")]}, "not a number.*row b, class cat"),
    "percent": ({"cat": [75, 25], "dog": [25, 75]}, "percent"),
    "no rows": (
        {name: [] for name in ("id", "label", "cat", "dog")},
        "header and no rows|something else",
    ),
    "row numbers of pandas": ({"__index_level_0__": [0, 1]}, "row numbers.*__index_level_0__"),
    "labels as fractions": ({"label": [0.5, 1.0]}, "a label is not a class.*got 0.5"),
    "labels as dates": ({"label": [datetime.date(2026, 1, 1)] * 2}, "neither text nor numbers"),
}


@pytest.mark.parametrize("case", PARQUETS)
def test_bad_parquet(tmp_path: Path, case: str) -> None:
    changes, message = PARQUETS[case]
    parquet(tmp_path / "net.parquet", **changes)

    assert_refused(tmp_path / "net.parquet", message)


def test_a_parquet_file_cannot_claim_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 10**6
    columns = {"label": ["cat"] * n, "cat": np.ones(n), "dog": np.zeros(n)}
    parquet(tmp_path / "net.parquet", id=None, **columns)

    assert (tmp_path / "net.parquet").stat().st_size < 100_000

    monkeypatch.setattr(array_files, "MAX_BYTES", 8 << 20)

    assert_refused(tmp_path / "net.parquet", "too large.*at most 8 MiB")


def test_parquet_that_is_not_whole(tmp_path: Path) -> None:
    parquet(tmp_path / "net.parquet")

    whole = (tmp_path / "net.parquet").read_bytes()

    for content in (
        whole[:4],
        whole[:100],
        whole[:-4],
        whole[:-8] + struct.pack("<I", 2**31) + b"PAR1",
    ):
        (tmp_path / "net.parquet").write_bytes(content)
        assert_refused(tmp_path / "net.parquet", "cannot read the parquet file")


# any file


def test_no_file_a_folder_and_unknown_formats(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent.csv", "no such file")
    assert_refused(tmp_path, "a folder")

    (tmp_path / "net.xlsx").write_bytes(b"PK\x03\x04")

    assert_refused(tmp_path / "net.xlsx", "cut off or damaged")

    (tmp_path / "net.h5").write_bytes(b"\x89HDF\r\n")

    assert_refused(
        tmp_path / "net.h5", "unknown format.*got HDF5 content; fix: save .npz, .csv or .parquet"
    )

    (tmp_path / "net.pkl").write_bytes(b"\x80\x04]")

    assert_refused(tmp_path / "net.pkl", "got pickle content")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good file of each format."""
    import torch

    folder = tmp_path_factory.mktemp("whole")
    rows = make_predictions(groups=tuple("aabbcc"), folds=np.arange(6))
    for suffix in ("npz", "csv", "parquet"):
        with contextlib.suppress(DataError):  # no pyarrow
            write_predictions(rows, folder / f"x.{suffix}")
    torch.save(
        {"probs": torch.tensor(rows.probs), "labels": torch.tensor(rows.labels)}, folder / "x.pt"
    )
    np.save(folder / "x.npy", rows.probs)
    lists = zip(rows.labels, rows.probs[0].tolist(), strict=True)
    tree = {f"{rows.classes[label]}/{i}.png": {"prob": row} for i, (label, row) in enumerate(lists)}
    (folder / "x.json").write_text(json.dumps(tree))
    (folder / "labels.csv").write_text("label\na\nb\nc\na\nb\nc\n")
    return folder


@pytest.mark.parametrize("suffix", ["npz", "csv", "parquet", "pt", "npy", "json"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_in_one_line_or_read(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, suffix: str, data: Any
) -> None:
    """A file that is cut or altered anywhere gives a DataError or valid predictions."""
    if not (whole / f"x.{suffix}").exists():
        pytest.skip("no pyarrow")
    content = bytearray((whole / f"x.{suffix}").read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("p") / f"x.{suffix}"
    path.write_bytes(
        bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    )
    options: dict[str, Any] = (
        {"labels": whole / "labels.csv", "classes": ["a", "b", "c"]} if suffix == "npy" else {}
    )

    with contextlib.suppress(DataError):
        assert isinstance(read_predictions(path, **options), Predictions)


@settings(max_examples=100, deadline=None)
@given(
    content=st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "ignore")),
    suffix=st.sampled_from(["npz", "csv", "parquet", "pt", "npy", "json", "txt"]),
)
def test_any_bytes_are_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("p") / f"x.{suffix}"
    path.write_bytes(content)

    with pytest.raises(DataError) as caught:
        read_predictions(path)
    assert "\n" not in str(caught.value)
