"""Files of predictions are read as they were written; files of other programs are read too."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import ROOT
from support.predictions import are_equal, make_predictions, predictions
from typer.testing import CliRunner

from threefold import npz_files, scratch
from threefold.cli.app import app
from threefold.errors import DataError, RunError
from threefold.predictions.adapters import COLUMNS, is_reserved_column
from threefold.predictions.formats import read_predictions, write_predictions
from threefold.predictions.predictions import Predictions


def holdable(rows: Predictions) -> bool:
    """Whether a table can hold the names; the strategy draws all of Unicode."""
    names = [*rows.ids, *rows.members, *rows.classes, *(rows.groups or ())]
    return not any(map(is_reserved_column, rows.classes)) and not any(
        "\ud800" <= c <= "\udfff" for name in names for c in name
    )


tables = predictions().filter(holdable)


@pytest.mark.parametrize("suffix", ["npz", "csv", "parquet"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_written_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: Any
) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    original = data.draw(predictions() if suffix == "npz" else tables)
    path = tmp_path_factory.mktemp("p") / f"x.{suffix}"

    write_predictions(original, path)

    assert are_equal(read_predictions(path), original)


@pytest.mark.parametrize("suffix", ["npz", "csv", "parquet"])
def test_roles_come_back(tmp_path: Path, suffix: str) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    roles: Any = np.array([[4, 1, 2, 1, 1, 1], [1, 4, 1, 4, 4, 4], [2, 1, 4, 2, 1, 1]], np.int8)
    original = replace(
        make_predictions(), folds=np.array([0, 1, 2, 1, 1, 1]), kind="oof", roles=roles
    )
    write_predictions(original, tmp_path / f"x.{suffix}")

    loaded = read_predictions(tmp_path / f"x.{suffix}")

    assert are_equal(loaded, original)
    assert (loaded.roles == roles).all()


def test_no_field_of_predictions_is_forgotten_by_the_tables() -> None:
    """A new field of Predictions must also be written to CSV and parquet."""
    known = {
        "probs",
        "labels",
        "ids",
        "classes",
        "members",
        "groups",
        "protocol",
        "kind",
        "folds",
        "roles",
    }

    assert {field.name for field in fields(Predictions)} <= known


def test_the_protocol_survives_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    original = make_predictions(m=1, protocol="paper", kind="test")
    write_predictions(original, tmp_path / "a.parquet")
    pandas.read_parquet(tmp_path / "a.parquet").sort_values("id", ascending=False).to_parquet(
        tmp_path / "b.parquet"
    )

    loaded = read_predictions(tmp_path / "b.parquet")

    assert (loaded.protocol, loaded.kind) == ("paper", "test")
    assert are_equal(loaded.rows(np.arange(6)[::-1]), original)


def test_files_written_as_in_the_docs_are_read(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    single = make_predictions(m=1)
    classes, ids, probs = single.classes, single.ids, single.probs[0]
    names = [classes[label] for label in single.labels]
    frame = pandas.DataFrame(probs, columns=classes).assign(id=ids, label=names)
    frame.to_csv(tmp_path / "net0.csv", index=False)
    frame.to_parquet(tmp_path / "net0.parquet", index=False)

    assert are_equal(read_predictions(tmp_path / "net0.csv"), single)
    assert are_equal(read_predictions(tmp_path / "net0.parquet"), single)

    np.savez(tmp_path / "net0.npz", probs=probs, labels=single.labels, ids=ids, classes=classes)

    assert are_equal(read_predictions(tmp_path / "net0.npz"), single)

    pair = make_predictions()
    parts = [
        pandas.DataFrame(p, columns=classes).assign(id=ids, label=names, member=m)
        for m, p in zip(pair.members, pair.probs, strict=True)
    ]
    pandas.concat(parts).to_csv(tmp_path / "both.csv", index=False)

    assert are_equal(read_predictions(tmp_path / "both.csv"), pair)


def read(tmp_path: Path, text: str, name: str = "net.csv", **options: Any) -> Predictions:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return read_predictions(path, **options)


def test_the_smallest_table(tmp_path: Path) -> None:
    loaded = read(tmp_path, "label,cat,dog\ndog,0.25,0.75\ncat,1,0\n")

    assert loaded.ids == ("row0000", "row0001")
    assert loaded.members == ("net",)
    assert (loaded.kind, loaded.protocol, loaded.labels.tolist()) == ("foreign", "honest", [1, 0])
    assert loaded.probs.tolist() == [[[0.25, 0.75], [1, 0]]]


def test_csv_with_bom_groups_folds_and_an_empty_last_line(tmp_path: Path) -> None:
    text = "\ufeffdog,fold,label,group,cat,id\r\n0.75,1,dog,ann,0.25,a\r\n0,0,cat,bob,1,b\r\n\r\n"

    loaded = read(tmp_path, text)

    assert (loaded.classes, loaded.ids, loaded.groups) == (
        ("dog", "cat"),
        ("a", "b"),
        ("ann", "bob"),
    )
    assert loaded.folds is not None
    assert (loaded.folds.tolist(), loaded.labels.tolist()) == ([1, 0], [0, 1])


def test_labels_as_column_numbers(tmp_path: Path) -> None:
    assert read(tmp_path, "label,cat,dog\n1,0.25,0.75\n0,1,0\n").labels.tolist() == [1, 0]
    # Names win: the class named 10 is column 1 here, as Keras sorts folders by their text.
    assert read(tmp_path, "label,1,10,2\n10,0,1,0\n2,0,0,1\n").labels.tolist() == [1, 2]
    with pytest.raises(DataError, match=r"a label is not a class.*got 0"):
        read(tmp_path, "label,1,10,2\n0,0,1,0\n2,0,0,1\n")
    with pytest.raises(DataError, match="out of range"):
        read(tmp_path, "label,cat,dog\n1,0.25,0.75\n2,1,0\n")


def test_labels_and_ids_from_posix_and_windows_paths(tmp_path: Path) -> None:
    posix_text = "path,cat,dog\n/home/me/test/cat/1.jpg,1,0\n/home/me/test/dog/x/1.jpg,0,1\n"
    windows_text = "path,cat,dog\nD:\\test\\cat\\1.jpg,1,0\nD:\\test\\dog\\x\\1.jpg,0,1\n"

    posix = read(tmp_path, posix_text, "a.csv")
    windows = read(tmp_path, windows_text, "b.csv")

    assert posix.ids == windows.ids == ("cat/1.jpg", "dog/x/1.jpg")
    assert posix.labels.tolist() == windows.labels.tolist() == [0, 1]


def test_rows_of_members_are_matched_by_id_in_any_order(tmp_path: Path) -> None:
    text = "id,label,member,cat,dog\nb,dog,m,0,1\nb,dog,n,0.5,0.5\na,cat,n,0.25,0.75\na,cat,m,1,0\n"

    loaded = read(tmp_path, text)

    assert (loaded.ids, loaded.members) == (("b", "a"), ("m", "n"))
    assert loaded.probs.tolist() == [[[0, 1], [1, 0]], [[0.5, 0.5], [0.25, 0.75]]]


def test_labels_from_a_table_beside_the_file(tmp_path: Path) -> None:
    truth = tmp_path / "labels.csv"
    truth.write_text("id,label,group\nc,dog,x\nb,cat,y\na,dog,z\n")
    np.savez(tmp_path / "net.npz", probs=np.eye(2), ids=["a", "b"], classes=["cat", "dog"])

    loaded = read_predictions(tmp_path / "net.npz", labels=truth)

    assert (loaded.labels.tolist(), loaded.groups, loaded.ids) == ([1, 0], ("z", "y"), ("a", "b"))

    np.save(tmp_path / "net.npy", np.array([[0.5, 0.5], [1, 0], [0, 1]]))

    loaded = read_predictions(tmp_path / "net.npy", labels=truth, classes=["cat", "dog"])

    assert (loaded.ids, loaded.labels.tolist(), loaded.members) == (
        ("c", "b", "a"),
        [1, 0, 1],
        ("net",),
    )

    (tmp_path / "classes.txt").write_text("cat\ndog\n")

    assert are_equal(
        read_predictions(tmp_path / "net.npy", labels=truth, classes=tmp_path / "classes.txt"),
        loaded,
    )


def test_labels_from_folders_when_asked(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "net.npz",
        probs=np.eye(2),
        ids=["t/dog/1.png", "t/cat/1.png"],
        classes=["cat", "dog"],
    )

    with pytest.raises(DataError, match="there are no labels"):
        read_predictions(tmp_path / "net.npz")

    loaded = read_predictions(tmp_path / "net.npz", labels="folder")

    assert (loaded.labels.tolist(), loaded.ids) == ([1, 0], ("dog/1.png", "cat/1.png"))

    command = ["evaluate", str(tmp_path / "net.npz"), "--labels", "folder", "--json"]
    done = CliRunner().invoke(app, command)

    assert done.exit_code == 0, done.exception


def refused(message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_predictions(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_labels_beside_the_file_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "net.npz", probs=np.eye(2), ids=["a", "b"], classes=["cat", "dog"])
    np.save(tmp_path / "net.npy", np.eye(2))

    for text, message in {
        "id,label\na,cat\n": r"labels are missing.*1 missing, the first is b",
        "id,label\na,cat\nb,cow\n": "a label is not a class.*row 1.*got cow",
        "id,label\na,cat\na,dog\nb,cat\n": "ids are not unique.*got a",
        "id,one,two\na,cat,x\nb,cat,y\n": "no column label",
        "label\ncat\n": "labels do not fit.*expected 2 rows.*got 1",
        "id,label\n": "header and no rows",
    }.items():
        (tmp_path / "labels.csv").write_text(text)
        refused(message, tmp_path / "net.npz", labels=tmp_path / "labels.csv")

    (tmp_path / "labels.csv").write_text("label\ncat\ndog\n")

    refused(
        "order of the classes is not known", tmp_path / "net.npy", labels=tmp_path / "labels.csv"
    )
    refused(
        "2 names, one per column.*got 3",
        tmp_path / "net.npy",
        labels=tmp_path / "labels.csv",
        classes=[*"abc"],
    )
    refused(
        "cannot read the class names",
        tmp_path / "net.npy",
        labels=tmp_path / "labels.csv",
        classes=tmp_path / "no",
    )
    refused("labels must be a table", tmp_path / "net.npz", labels=tmp_path / "net.npz")
    refused(
        "the file has other class names",
        tmp_path / "net.npz",
        labels=tmp_path / "labels.csv",
        classes=("dog", "cat"),
    )
    refused("there are no paths", tmp_path / "net.npy", labels="folder")


def test_two_sources_of_labels_must_agree(tmp_path: Path) -> None:
    arrays = {"probs": np.eye(2), "paths": ["cat/1.png", "dog/1.png"], "classes": ["cat", "dog"]}
    np.savez(tmp_path / "net.npz", labels=np.array([0, 1]), **arrays)

    assert read_predictions(tmp_path / "net.npz").labels.tolist() == [0, 1]

    np.savez(tmp_path / "net.npz", labels=np.array([0, 0]), **arrays)

    refused("a row has two labels.*dog/1.png; expected cat, got dog", tmp_path / "net.npz")


def test_names_that_a_table_cannot_hold_are_refused(tmp_path: Path) -> None:
    for change, message in (
        (
            {"classes": ("a", "label", "c")},
            "a class has the name of a column.*got label; fix: write .npz",
        ),
        ({"classes": ("a", "", "c")}, "an empty name"),
        ({"members": ("a\0", "b")}, "cannot be written to a table"),
        ({"ids": ("", *"abcde")}, "cannot be written to a table"),
        ({"ids": ("\ud800", *"abcde")}, "cannot be written to a table"),
    ):
        for suffix in ("csv", "parquet"):
            with pytest.raises(DataError, match=message):
                write_predictions(make_predictions(**change), tmp_path / f"x.{suffix}")

    with pytest.raises(DataError, match=r"unknown format.*got \.xlsx"):
        write_predictions(make_predictions(), tmp_path / "x.xlsx")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_predictions(make_predictions(), tmp_path / "x.csv")
    before = (tmp_path / "x.csv").read_bytes()
    monkeypatch.setattr(
        "os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )

    with pytest.raises(RunError, match="No space left"):
        write_predictions(make_predictions(m=1), tmp_path / "x.csv")
    assert (tmp_path / "x.csv").read_bytes() == before


def test_without_pyarrow_parquet_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + bytes(100))

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", absent)

    with pytest.raises(DataError, match=r"pip install .*\[parquet\]'"):
        read_predictions(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"pip install .*\[parquet\]'"):
        write_predictions(make_predictions(), tmp_path / "y.parquet")


@pytest.mark.parametrize("name", ["stored.npz", "packed.npz", "columns.npz", "one.npy"])
def test_a_file_larger_than_memory_is_read_as_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Its arrays lie in temporary files, so that whoever writes it again does no harm."""
    path, rows = tmp_path / name, make_predictions(m=2, n=500, k=4)
    labels = tmp_path / "labels.csv"
    labels.write_text("label\n" + "".join(f"{label}\n" for label in rows.labels))
    arrays = {"probs": rows.probs, "labels": rows.labels}
    if name == "one.npy":
        np.save(path, rows.probs[0])
    elif name == "packed.npz":
        np.savez_compressed(path, **arrays)
    elif name == "columns.npz":
        np.savez(path, **arrays | {"probs": np.asfortranarray(rows.probs)})
    else:
        np.savez(path, **arrays)
    given = {"labels": labels, "classes": tuple("0123")} if name == "one.npy" else {}
    whole = read_predictions(path, **given)  # type: ignore[arg-type]
    monkeypatch.setattr(scratch, "SPILL_BYTES", 0)
    monkeypatch.setattr(npz_files, "_PIECE", 1000)

    read = read_predictions(path, **given)  # type: ignore[arg-type]

    path.write_bytes(b"\0" * path.stat().st_size)
    assert are_equal(read, whole)
    assert read.probs[0, 7, 2] == rows.probs[0, 7, 2]


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path) -> None:
    path, rows = tmp_path / "net.npz", make_predictions(m=2, n=500, k=4)
    np.savez(path, probs=rows.probs, labels=rows.labels)
    content = bytearray(path.read_bytes())
    content[content.index(rows.probs[1, 100].tobytes())] ^= 1  # the last bit of a number
    path.write_bytes(content)

    with pytest.raises(DataError, match="cut off or damaged"):
        read_predictions(path)


def test_every_column_of_the_convention_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")

    assert all(f"`{name}`" in text for name in COLUMNS)
