"""Predictions are read bit for bit as they were written; wrong ones are refused in one line."""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import AUTHORS_PREDICTIONS
from support.predictions import Bomb, make, predictions, raw, same

from threefold.errors import DataError, RunError
from threefold.predictions.predictions import Predictions

AUTHORS = AUTHORS_PREDICTIONS


@settings(max_examples=60, deadline=None)
@given(original=predictions())
def test_saved_predictions_come_back_bit_for_bit(tmp_path_factory, original):
    path = tmp_path_factory.mktemp("p") / "oof.npz"
    original.save(path)

    assert same(Predictions.load(path), original)


def test_saving_twice_writes_the_same_bytes(tmp_path):
    make().save(tmp_path / "a.npz")
    make().save(tmp_path / "b.npz")

    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_no_file_needs_pickle(tmp_path):
    make(groups=tuple("aabbcc"), folds=np.arange(6)).save(tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz", allow_pickle=False) as file:
        assert {file[name].dtype.kind for name in file.files} == {"f", "i", "U"}


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    make().save(tmp_path / "p.npz")
    before = (tmp_path / "p.npz").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(RunError, match="No space left"):
        make(m=3).save(tmp_path / "p.npz")
    assert (tmp_path / "p.npz").read_bytes() == before
    assert os.listdir(tmp_path) == ["p.npz"]


def test_a_foreign_file_needs_only_probs_and_labels(tmp_path):
    np.savez(tmp_path / "p.npz", **raw())
    found = Predictions.load(tmp_path / "p.npz")

    assert found.ids == tuple(f"row000{i}" for i in range(6))
    assert found.classes == ("0", "1", "2")
    assert found.members == ("member0", "member1")
    assert (found.kind, found.groups, found.folds) == ("foreign", None, None)


def test_a_foreign_file_may_hold_one_member_without_its_axis(tmp_path):
    np.savez(tmp_path / "p.npz", **raw(probs=make().probs[0], members=np.array("mine")))
    found = Predictions.load(tmp_path / "p.npz")

    assert found.probs.shape == (1, 6, 3)
    assert found.members == ("mine",)


def test_default_ids_sort_in_row_order(tmp_path):
    probs = np.full((1, 10_001, 2), 0.5, np.float32)
    np.savez(tmp_path / "p.npz", probs=probs, labels=np.zeros(10_001, int))
    ids = Predictions.load(tmp_path / "p.npz").ids

    assert list(ids) == sorted(ids)


def test_numbers_of_other_types_are_taken_without_loss(tmp_path):
    one_hot = np.eye(3, dtype=np.uint8)[None, np.arange(6) % 3]
    np.savez(
        tmp_path / "p.npz",
        probs=one_hot,
        labels=(np.arange(6) % 3).astype(np.uint8),
        ids=np.arange(6),
    )
    found = Predictions.load(tmp_path / "p.npz")

    assert found.probs.dtype == np.float32
    assert found.labels.dtype == np.int64
    assert found.ids[5] == "5"


probs = make().probs
BROKEN = {
    "probs missing": ({"probs": None}, "arrays are missing.*no probs"),
    "both missing": ({"probs": None, "labels": None, "x": np.zeros(3)}, "no probs and no labels"),
    "labels missing": ({"labels": None}, "no labels"),
    "one axis": ({"probs": probs[0, 0]}, r"wrong shape.*\(3,\)"),
    "four axes": ({"probs": probs[None]}, "wrong shape"),
    "no rows": ({"probs": probs[:, :0], "labels": np.zeros(0, int)}, "wrong shape"),
    "one class": ({"probs": np.ones((2, 6, 1))}, "at least two classes"),
    "text for numbers": ({"probs": probs.astype(str)}, "must be numbers"),
    "NaN": (
        {"probs": np.where(np.arange(3) == 1, np.nan, probs)},
        r"NaN or infinite: index \(0, 0, 1\)",
    ),
    "infinite": ({"probs": np.where(np.arange(3) == 1, np.inf, probs)}, "NaN or infinite"),
    "negative": ({"probs": np.array([[[1.5, -0.5]] * 6])}, r"negative: index \(0, 0, 1\).*softmax"),
    "logits": ({"probs": probs * 7}, r"sum to 1: index \(0, 0\); got 7; fix: apply softmax"),
    "sums a little off": ({"probs": probs * 1.002}, "do not sum to 1"),
    "label too large": (
        {"labels": np.array([0, 1, 2, 0, 1, 3])},
        "out of range: index 5; expected 0 to 2, got 3",
    ),
    "label negative": ({"labels": np.array([0, 1, 2, 0, 1, -1])}, "out of range"),
    "labels as floats": ({"labels": np.zeros(6)}, "class numbers"),
    "one-hot labels": (
        {"labels": np.eye(3, dtype=int)[[0, 1, 2, 0, 1, 2]]},
        r"labels have the wrong shape",
    ),
    "labels too few": ({"labels": np.zeros(5, int)}, r"expected \(6,\), one per row, got \(5,\)"),
    "ids twice": ({"ids": np.array(list("abcdea"))}, "ids are not unique; got a twice"),
    "ids too few": ({"ids": np.array(list("abc"))}, "ids do not match.*expected 6 names, got 3"),
    "class names too many": (
        {"classes": np.array(list("abcd"))},
        "classes do not match.*expected 3 names, got 4",
    ),
    "class names twice": ({"classes": np.array(list("aba"))}, "classes are not unique"),
    "members too few": (
        {"members": np.array(["x"])},
        "members do not match.*expected 2 names, got 1",
    ),
    "groups too few": ({"groups": np.array(["x"])}, "groups do not match"),
    "folds too few": ({"folds": np.zeros(2, int)}, "folds have the wrong shape"),
    "provenance is not JSON": ({"provenance": np.array("{")}, "provenance is not readable"),
    "provenance is incomplete": ({"provenance": np.array("{}")}, "provenance is not readable"),
    "unknown protocol": (
        {"provenance": np.array('{"protocol": "x", "kind": "oof"}')},
        "unknown protocol; expected honest",
    ),
    "unknown kind": (
        {"provenance": np.array('{"protocol": "paper", "kind": "x"}')},
        "unknown kind",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_arrays_are_refused_with_the_file_name(tmp_path, case):
    changes, message = BROKEN[case]
    path = tmp_path / "broken.npz"
    np.savez(path, **raw(**changes))

    with pytest.raises(DataError, match=message) as caught:
        Predictions.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def refuse(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Predictions.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_are_no_npz_are_refused(tmp_path):
    refuse(tmp_path / "absent.npz", "no such file")
    refuse(tmp_path, "a folder")

    (tmp_path / "empty.npz").touch()

    refuse(tmp_path / "empty.npz", "file is empty")

    (tmp_path / "text.npz").write_text("probs,labels\n0.5,1\n")

    refuse(tmp_path / "text.npz", "expected npz, got csv content")

    np.save(tmp_path / "one.npy", np.ones(3))

    refuse(tmp_path / "one.npy", r"not an \.npz")

    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("probs.npy", "not an array")
        archive.writestr("labels.npy", "not an array")

    refuse(tmp_path / "other.npz", "damaged|must be numbers")


@pytest.mark.parametrize("name", ["probs", "labels", "ids", "members", "provenance"])
def test_object_arrays_are_refused_and_never_unpickled(tmp_path, name):
    np.savez(
        tmp_path / "p.npz", **raw(**{name: np.array([Bomb(tmp_path / "exploded")], dtype=object)})
    )

    refuse(tmp_path / "p.npz", "never unpickled.*string arrays")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "header", ["{'descr': '<f4', 'shape': (2, 3", "{'descr': '<f4',\n   1\n  2: }"]
)
def test_a_header_that_python_cannot_parse_is_refused(tmp_path, header):
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive:
        archive.writestr("probs.npy", content)

    refuse(tmp_path / "p.npz", "damaged")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_unchanged(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("p") / "p.npz"
    make().save(path)
    buffer = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        buffer[data.draw(st.integers(0, len(buffer) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(buffer[: data.draw(st.integers(len(buffer) // 2, len(buffer)))])
    with contextlib.suppress(DataError):
        found = Predictions.load(path)
        # The damage hit a byte that zip readers ignore, or the name of an optional array.
        assert found.probs.tobytes() == make().probs.tobytes()
        assert found.labels.tobytes() == make().labels.tobytes()


def test_predictions_are_read_only_but_the_input_is_not():
    mine = make().probs.copy()
    found = make(probs=mine)

    with pytest.raises(ValueError, match="read-only"):
        found.probs[0, 0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        found.labels[0] = 1

    mine[0, 0, 0] = 0.25


def test_select_keeps_the_given_order_of_members():
    found = make(m=3).select(["net2", "net0"])

    assert found.members == ("net2", "net0")
    assert (found.probs == make(m=3).probs[[2, 0]]).all()
    assert found.ids == make().ids


def test_an_unknown_member_is_an_error_that_names_the_nearest():
    found = make(m=3, members=("lite0", "lite1", "resnet"))

    with pytest.raises(
        DataError, match=r"no such member: lite2; expected one of lite[01], lite[01]$"
    ):
        found.select(["lite2"])
    with pytest.raises(DataError, match=r"expected one of resnet$"):
        found.select(["NET"])
    with pytest.raises(DataError, match="expected one of lite0, lite1, resnet"):
        found.select(["zzz"])
    with pytest.raises(DataError, match="wrong shape"):
        found.select([])
    with pytest.raises(DataError, match="members are not unique"):
        found.select(["lite0", "lite0"])


@settings(max_examples=50, deadline=None)
@given(original=predictions(), data=st.data())
def test_rows_takes_every_part_of_a_row_along(original, data):
    index = data.draw(st.lists(st.integers(0, len(original) - 1), min_size=1, unique=True))
    found = original.rows(index)
    for new, old in enumerate(index):
        assert found.ids[new] == original.ids[old]
        assert found.labels[new] == original.labels[old]
        assert (found.probs[:, new] == original.probs[:, old]).all()
        assert found.groups is None or found.groups[new] == original.groups[old]
        assert found.folds is None or found.folds[new] == original.folds[old]

    assert (found.protocol, found.kind) == (original.protocol, original.kind)


def test_rows_takes_booleans_and_refuses_what_does_not_exist():
    mask = np.array([1, 0, 0, 1, 0, 0], bool)

    assert make().rows(mask).ids == make().rows([0, 3]).ids

    for index in ([6], [], [True, False], [0.5]):
        with pytest.raises(DataError, match="no such rows"):
            make().rows(index)

    with pytest.raises(DataError, match="not unique"):
        make().rows([1, 1])


@pytest.mark.skipif(not AUTHORS.exists(), reason="the authors' predictions are not here")
def test_the_authors_predictions_load():
    found = Predictions.load(AUTHORS)

    assert found.probs.shape == (10, 10_000, 10)
    assert found.members[7] == "FashionMNIST_SEResNext101_LRG299_GRU_Mul"
    assert (np.bincount(found.labels) == 1000).all()
