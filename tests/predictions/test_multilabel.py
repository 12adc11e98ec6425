"""MultilabelPredictions: the record of several labels per image and its file."""

from __future__ import annotations

import numpy as np
import pytest
from support.multilabel import make_multilabel

from threefold.errors import DataError
from threefold.predictions import MultilabelPredictions, Predictions, load_predictions
from threefold.predictions.formats import read_predictions
from threefold.predictions.ledger import FIT, SCORE


def test_save_and_load_give_the_same_record(tmp_path):
    rows = make_multilabel(groups=True)

    rows.save(tmp_path / "p.npz")
    loaded = load_predictions(tmp_path / "p.npz")

    assert isinstance(loaded, MultilabelPredictions)
    for name in ("probs", "targets", "folds", "roles"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(rows, name))
    for name in ("ids", "classes", "members", "groups", "protocol", "kind"):
        assert getattr(loaded, name) == getattr(rows, name)


def test_rows_need_not_sum_to_one_and_may_have_no_label():
    rows = MultilabelPredictions.from_arrays([[0.9, 0.8], [0.1, 0.0]], [[1, 1], [0, 0]])

    assert rows.probs.dtype == np.float32
    assert rows.targets.dtype == np.uint8
    assert rows.targets.sum(1).tolist() == [2, 0]
    assert rows.members == ("member0",)


def test_select_and_rows_keep_what_belongs_together():
    rows = make_multilabel()

    chosen = rows.member("b").rows([3, 1])

    np.testing.assert_array_equal(chosen.probs[0], rows.probs[1, [3, 1]])
    np.testing.assert_array_equal(chosen.targets, rows.targets[[3, 1]])
    np.testing.assert_array_equal(chosen.folds, rows.folds[[3, 1]])
    assert chosen.ids == (rows.ids[3], rows.ids[1])


def test_a_row_scored_by_what_saw_it_is_refused():
    with pytest.raises(DataError, match="scored by what was fitted on them"):
        MultilabelPredictions(
            probs=np.full((1, 2, 2), 0.5),
            targets=np.eye(2, dtype=np.uint8),
            ids=("x", "y"),
            classes=("a", "b"),
            members=("m",),
            kind="oof",
            folds=np.array([0, 0]),
            roles=np.array([[FIT + SCORE, SCORE]]),
        )


@pytest.mark.parametrize(
    ("probs", "targets", "message"),
    [
        ([[2.5, -1.0]], [[1, 0]], "outside 0 to 1"),
        ([[np.nan, 0.5]], [[1, 0]], "NaN or infinite"),
        ([[0.5, 0.5]], [1], "targets have the wrong shape"),
        ([[0.5, 0.5]], [[2, 0]], "targets are not 0 and 1"),
        ([[0.5, 0.5]], [["cat", "dog"]], "targets must be numbers"),
    ],
)
def test_wrong_arrays_are_one_line(probs, targets, message):
    with pytest.raises(DataError, match=message) as caught:
        MultilabelPredictions.from_arrays(probs, targets)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [Predictions.load, read_predictions])
def test_readers_of_one_label_refuse_the_file(read, tmp_path):
    make_multilabel().save(tmp_path / "p.npz")

    with pytest.raises(DataError, match="several labels per image"):
        read(tmp_path / "p.npz")


def test_a_file_of_one_label_is_refused_by_this_record(tmp_path):
    Predictions.from_arrays([[0.5, 0.5]], [0], axes="nk").save(tmp_path / "p.npz")

    assert isinstance(load_predictions(tmp_path / "p.npz"), Predictions)
    with pytest.raises(DataError, match="one label per image"):
        MultilabelPredictions.load(tmp_path / "p.npz")


def test_a_foreign_file_needs_probs_and_targets(tmp_path):
    np.savez(tmp_path / "p.npz", probs=[[0.9, 0.8]], targets=[[1, 0]])

    loaded = load_predictions(tmp_path / "p.npz")

    assert isinstance(loaded, MultilabelPredictions)
    assert loaded.classes == ("0", "1")
