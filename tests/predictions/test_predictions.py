"""Predictions are read bit for bit as they were written; wrong ones are refused in one line."""

from __future__ import annotations

import contextlib
import os
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import AUTHORS_PREDICTIONS
from support.predictions import (
    Bomb,
    are_equal,
    assert_refused,
    foreign_arrays,
    make_predictions,
    predictions,
)

from threefold.errors import DataError, RunError
from threefold.predictions.predictions import Predictions


@settings(max_examples=60, deadline=None)
@given(original=predictions())
def test_saved_predictions_come_back_bit_for_bit(tmp_path_factory, original):
    path = tmp_path_factory.mktemp("p") / "oof.npz"
    original.save(path)

    assert are_equal(Predictions.load(path), original)


def test_saving_twice_writes_the_same_bytes(tmp_path):
    make_predictions().save(tmp_path / "a.npz")

    make_predictions().save(tmp_path / "b.npz")

    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_no_file_needs_pickle(tmp_path):
    make_predictions(groups=tuple("aabbcc"), folds=np.arange(6)).save(tmp_path / "p.npz")

    with np.load(tmp_path / "p.npz", allow_pickle=False) as file:
        assert {file[name].dtype.kind for name in file.files} == {"f", "i", "U"}


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    make_predictions().save(tmp_path / "p.npz")
    before = (tmp_path / "p.npz").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(RunError, match="No space left"):
        make_predictions(m=3).save(tmp_path / "p.npz")
    assert (tmp_path / "p.npz").read_bytes() == before
    assert os.listdir(tmp_path) == ["p.npz"]


def test_a_foreign_file_needs_only_probs_and_labels(tmp_path):
    np.savez(tmp_path / "p.npz", **foreign_arrays())

    loaded = Predictions.load(tmp_path / "p.npz")

    assert loaded.ids == tuple(f"row000{i}" for i in range(6))
    assert loaded.classes == ("0", "1", "2")
    assert loaded.members == ("member0", "member1")
    assert (loaded.kind, loaded.groups, loaded.folds) == ("foreign", None, None)


def test_a_foreign_file_may_hold_one_member_without_its_axis(tmp_path):
    np.savez(
        tmp_path / "p.npz",
        **foreign_arrays(probs=make_predictions().probs[0], members=np.array("mine")),
    )

    loaded = Predictions.load(tmp_path / "p.npz")

    assert loaded.probs.shape == (1, 6, 3)
    assert loaded.members == ("mine",)


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

    loaded = Predictions.load(tmp_path / "p.npz")

    assert loaded.probs.dtype == np.float32
    assert loaded.labels.dtype == np.int64
    assert loaded.ids[5] == "5"


PROBS = make_predictions().probs
BROKEN = {
    "probs missing": ({"probs": None}, "arrays are missing.*no probs"),
    "both missing": ({"probs": None, "labels": None, "x": np.zeros(3)}, "no probs and no labels"),
    "labels missing": ({"labels": None}, "no labels"),
    "one axis": ({"probs": PROBS[0, 0]}, r"wrong shape.*\(3,\)"),
    "four axes": ({"probs": PROBS[None]}, "wrong shape"),
    "no rows": ({"probs": PROBS[:, :0], "labels": np.zeros(0, int)}, "wrong shape"),
    "one class": ({"probs": np.ones((2, 6, 1))}, "at least two classes"),
    "text for numbers": ({"probs": PROBS.astype(str)}, "must be numbers"),
    "NaN": (
        {"probs": np.where(np.arange(3) == 1, np.nan, PROBS)},
        r"NaN or infinite: index \(0, 0, 1\)",
    ),
    "infinite": ({"probs": np.where(np.arange(3) == 1, np.inf, PROBS)}, "NaN or infinite"),
    "negative": (
        {"probs": np.array([[[1.5, -0.5]] * 6])},
        r"not probabilities.*index \(0, 0\).*softmax",
    ),
    "logits": (
        {"probs": PROBS * 7},
        r"logits.*index \(0, 0\).*got .* with sum 7; fix: apply softmax",
    ),
    "sums a little off": ({"probs": PROBS * 1.002}, "do not sum to 1"),
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
    np.savez(path, **foreign_arrays(**changes))

    assert_refused(path, message, Predictions.load)


def test_files_that_are_no_npz_are_refused(tmp_path):
    assert_refused(tmp_path / "absent.npz", "no such file", Predictions.load)
    assert_refused(tmp_path, "a folder", Predictions.load)

    (tmp_path / "empty.npz").touch()

    assert_refused(tmp_path / "empty.npz", "file is empty", Predictions.load)

    (tmp_path / "text.npz").write_text("probs,labels\n0.5,1\n")

    assert_refused(tmp_path / "text.npz", "expected npz, got csv content", Predictions.load)

    np.save(tmp_path / "one.npy", np.ones(3))

    assert_refused(tmp_path / "one.npy", r"not an \.npz", Predictions.load)

    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("probs.npy", "not an array")
        archive.writestr("labels.npy", "not an array")

    assert_refused(tmp_path / "other.npz", "damaged|must be numbers", Predictions.load)


@pytest.mark.parametrize("name", ["probs", "labels", "ids", "members", "provenance"])
def test_object_arrays_are_refused_and_never_unpickled(tmp_path, name):
    np.savez(
        tmp_path / "p.npz",
        **foreign_arrays(**{name: np.array([Bomb(tmp_path / "exploded")], dtype=object)}),
    )

    assert_refused(tmp_path / "p.npz", "never unpickled.*string arrays", Predictions.load)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "header", ["{'descr': '<f4', 'shape': (2, 3", "{'descr': '<f4',\n   1\n  2: }"]
)
def test_a_header_that_python_cannot_parse_is_refused(tmp_path, header):
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive:
        archive.writestr("probs.npy", content)

    assert_refused(tmp_path / "p.npz", "damaged", Predictions.load)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_unchanged(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("p") / "p.npz"
    make_predictions().save(path)
    buffer = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        buffer[data.draw(st.integers(0, len(buffer) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(buffer[: data.draw(st.integers(len(buffer) // 2, len(buffer)))])

    with contextlib.suppress(DataError):
        loaded = Predictions.load(path)
        # The damage hit a byte that zip readers ignore, or the name of an optional array.
        assert loaded.probs.tobytes() == make_predictions().probs.tobytes()
        assert loaded.labels.tobytes() == make_predictions().labels.tobytes()


def test_predictions_are_read_only_but_the_input_is_not():
    probs = make_predictions().probs.copy()
    pool = make_predictions(probs=probs)

    with pytest.raises(ValueError, match="read-only"):
        pool.probs[0, 0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        pool.labels[0] = 1

    probs[0, 0, 0] = 0.25


def test_select_keeps_the_given_order_of_members():
    selected = make_predictions(m=3).select(["net2", "net0"])

    assert selected.members == ("net2", "net0")
    assert (selected.probs == make_predictions(m=3).probs[[2, 0]]).all()
    assert selected.ids == make_predictions().ids


def test_an_unknown_member_is_an_error_that_names_the_nearest():
    pool = make_predictions(m=3, members=("lite0", "lite1", "resnet"))

    with pytest.raises(
        DataError, match=r"no such member: lite2; expected one of lite[01], lite[01]$"
    ):
        pool.select(["lite2"])
    with pytest.raises(DataError, match=r"expected one of resnet$"):
        pool.select(["NET"])
    with pytest.raises(DataError, match="expected one of lite0, lite1, resnet"):
        pool.select(["zzz"])
    with pytest.raises(DataError, match="wrong shape"):
        pool.select([])
    with pytest.raises(DataError, match="members are not unique"):
        pool.select(["lite0", "lite0"])


@settings(max_examples=50, deadline=None)
@given(original=predictions(), data=st.data())
def test_rows_takes_every_part_of_a_row_along(original, data):
    index = data.draw(st.lists(st.integers(0, len(original) - 1), min_size=1, unique=True))

    subset = original.rows(index)

    for new, old in enumerate(index):
        assert subset.ids[new] == original.ids[old]
        assert subset.labels[new] == original.labels[old]
        assert (subset.probs[:, new] == original.probs[:, old]).all()
        assert subset.groups is None or subset.groups[new] == original.groups[old]
        assert subset.folds is None or subset.folds[new] == original.folds[old]

    assert (subset.protocol, subset.kind) == (original.protocol, original.kind)


def test_rows_takes_booleans_and_refuses_what_does_not_exist():
    mask = np.array([1, 0, 0, 1, 0, 0], bool)

    assert make_predictions().rows(mask).ids == make_predictions().rows([0, 3]).ids

    for index in ([6], [], [True, False], [0.5]):
        with pytest.raises(DataError, match="no such rows"):
            make_predictions().rows(index)

    with pytest.raises(DataError, match="not unique"):
        make_predictions().rows([1, 1])


@pytest.mark.skipif(
    not AUTHORS_PREDICTIONS.exists(), reason="the authors' predictions are not at hand"
)
def test_the_authors_predictions_load():
    loaded = Predictions.load(AUTHORS_PREDICTIONS)

    assert loaded.probs.shape == (10, 10_000, 10)
    assert loaded.members[7] == "FashionMNIST_SEResNext101_LRG299_GRU_Mul"
    assert (np.bincount(loaded.labels) == 1000).all()


PROBS = np.random.default_rng(0).dirichlet(np.ones(3), (2, 5)).astype(np.float32)


@pytest.mark.parametrize("axes", ["mnk", "nmk", "nkm", "kmn", "NMK"])
def test_named_axes_are_put_in_order(axes):
    array = PROBS.transpose(["mnk".index(axis) for axis in axes.lower()])

    rows = Predictions.from_arrays(array, [0, 1, 2, 0, 1], axes=axes)

    assert np.array_equal(rows.probs, PROBS)
    assert rows.members == ("member0", "member1")
    assert rows.classes == ("0", "1", "2")


def test_one_member_and_names_in_place_of_numbers():
    names = ("cat", "dog", "elk")

    rows = Predictions.from_arrays(PROBS[0], ["cat", "elk", "dog", "dog", "cat"], names, axes="nk")

    assert np.array_equal(rows.probs, PROBS[:1])
    assert rows.labels.tolist() == [0, 2, 1, 1, 0]


def test_numbers_as_classes_are_values_of_the_labels():
    rows = Predictions.from_arrays(PROBS, [1, 1, 2, 2, 5], np.array([1, 2, 5]))

    assert rows.classes == ("1", "2", "5")
    assert rows.labels.tolist() == [0, 0, 1, 1, 2]
    with pytest.raises(DataError, match="labels are no class; expected 1, 2, 5, got '0'"):
        Predictions.from_arrays(PROBS, [0] * 5, [1, 2, 5])


@pytest.mark.parametrize(
    ("axes", "labels", "reason"),
    [
        ("nm", [0] * 5, "the axes do not fit the array; expected 3 letters"),
        ("nmm", [0] * 5, "got 'nmm'"),
        ("nk", [0] * 5, "got 'nk'"),
        ("nmk", [0] * 5, "labels have the wrong shape"),
        ("mnk", ["cat"] * 5, "labels are no class; expected 0, 1, 2, got 'cat'"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(axes, labels, reason):
    with pytest.raises(DataError, match=reason):
        Predictions.from_arrays(PROBS, labels, axes=axes)
