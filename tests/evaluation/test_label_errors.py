"""Suspect labels: planted errors are found first, sound labels are left alone, nothing edited."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threefold import scratch
from threefold.errors import DataError, RunError
from threefold.evaluation import label_errors
from threefold.evaluation.label_errors import Suspect, find_suspects, write_suspects
from threefold.predictions.predictions import Predictions

LAW = settings(max_examples=40, deadline=None)


def flipped_world(
    seed: int = 0, n: int = 400, flips: int = 20, members: int = 3
) -> tuple[Predictions, np.ndarray]:
    """Draw members that mostly see the true class, and labels of which some are flipped."""
    rng = np.random.default_rng(seed)
    truth, names = rng.integers(0, 4, n), ("ant", "bee", "cat", "dog")
    labels, rows = truth.copy(), rng.choice(n, flips, replace=False)
    labels[rows] = (truth[rows] + rng.integers(1, 4, flips)) % 4
    logits = 5 * np.eye(4)[truth] + rng.normal(0, 1.2, (members, n, 4))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ids = tuple(f"{names[y]}/{i:04d}.jpg" for i, y in enumerate(labels))
    member_names = tuple(f"m{i}" for i in range(members))
    return Predictions(probs, labels, ids, names, member_names, kind="oof"), rows


def test_planted_label_errors_are_found_first() -> None:
    predictions, rows = flipped_world()
    before = predictions.labels.copy()
    planted = {predictions.ids[row] for row in rows}

    suspects = find_suspects(predictions)

    correct = [s.id in planted for s in suspects]
    assert sum(correct) >= 16
    assert np.mean(correct[:15]) == 1
    assert len(suspects) < 40
    assert [s.score for s in suspects] == sorted(s.score for s in suspects)
    assert (predictions.labels == before).all()
    assert find_suspects(predictions, 5) == suspects[:5]


def test_a_contradiction_alone_is_no_suspicion() -> None:
    """cleanlab decides the number of suspects: fewer than the rows the ensemble contradicts."""
    from cleanlab.filter import find_label_issues

    for seed in range(3):
        rng = np.random.default_rng(seed)
        truth = rng.integers(0, 3, 300)
        seen = np.where(rng.random(300) < 0.05, (truth + 1) % 3, truth)
        logits = 2.5 * np.eye(3)[seen] + rng.normal(0, 1, (2, 300, 3))
        probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        rows = Predictions(probs, truth, tuple(map(str, range(300))), ("a", "b", "c"), ("m", "o"))

        suspects = find_suspects(rows)

        theirs = find_label_issues(truth, probs.mean(0), n_jobs=1)
        assert {int(s.id) for s in suspects} == set(np.flatnonzero(theirs))
        assert 0 < len(suspects) < (probs.mean(0).argmax(1) != truth).sum()


@pytest.mark.parametrize("classes", [3, 40])
def test_many_rows_have_the_suspects_of_cleanlab_on_all_of_them(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cleanlab gets the rows of a few classes at a time, and one count of all rows."""
    from cleanlab.filter import find_label_issues

    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(800) % classes)
    seen = np.where(rng.random(800) < 0.1, (labels + 1) % classes, labels)
    logits = 2 * np.eye(classes)[seen] + rng.normal(0, 1, (800, classes))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    monkeypatch.setattr(scratch, "BLOCK_VALUES", 1000)
    monkeypatch.setattr(label_errors, "_BATCH_VALUES", 6000)

    found = label_errors._find_issues(labels, probs)

    theirs = find_label_issues(labels, probs, n_jobs=1)
    assert 20 < theirs.sum() < 400
    assert (found == theirs).all()


def test_the_reason_says_who_says_what() -> None:
    probs = np.tile(np.array([[0.7, 0.3], [0.3, 0.7]]), (1, 15, 1)).repeat(3, 0)
    labels = np.array([0, 1] * 15)
    probs[:, 4], probs[2, 4] = [0.02, 0.98], [0.55, 0.45]

    for kind, who in (("oof", "the ensemble that never saw it"), ("foreign", "the ensemble")):
        rows = Predictions(
            probs, labels, tuple(map(str, range(30))), ("cat", "dog"), ("a", "b", "c"), kind=kind
        )  # type: ignore[arg-type]

        (suspect,) = find_suspects(rows)

        assert suspect[:3] == ("4", "cat", "dog")
        assert suspect.score == pytest.approx((0.02 + 0.02 + 0.55) / 3, abs=1e-4)
        assert suspect.reason == f"labelled cat; {who} says dog with 0.80; 2 of 3 members agree"


@LAW
@given(seed=st.integers(0, 999), n=st.integers(2, 40), k=st.integers(2, 6))
def test_any_predictions_can_be_audited(seed: int, n: int, k: int) -> None:
    """Suspects are distinct and contradicted even with few rows, empty classes or exact zeros."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(k, 0.3), (2, n)).round(2)
    probs[..., 0] += 1 - probs.sum(-1)
    probs = probs.clip(min=0) / probs.clip(min=0).sum(-1, keepdims=True)
    names = tuple(map(str, range(k)))
    rows = Predictions(probs, rng.integers(0, k, n), tuple(map(str, range(n))), names, ("a", "b"))

    suspects = find_suspects(rows)

    assert all(s.label != s.suggested for s in suspects)
    assert len({s.id for s in suspects}) == len(suspects)


def test_sure_rows_or_a_single_class_give_no_suspects() -> None:
    labels = np.array([0, 1, 2] * 10)
    probs = (0.94 * np.eye(3) + 0.02)[labels][None]
    names, ids = ("a", "b", "c"), tuple(map(str, range(30)))

    assert find_suspects(Predictions(probs, labels, ids, names, ("m",))) == []
    assert find_suspects(Predictions(probs, np.zeros(30, int), ids, names, ("m",))) == []


def test_the_ensembles_own_probabilities_are_used_where_given() -> None:
    predictions, _ = flipped_world()
    sure = 0.96 * np.eye(4)[predictions.labels] + 0.01

    assert find_suspects(predictions, probs=sure) == []
    with pytest.raises(
        DataError, match=r"of other rows or classes; expected \(400, 4\), got \(399, 4\)"
    ):
        find_suspects(predictions, probs=sure[1:])
    with pytest.raises(DataError, match="the limit is 1 or more; got 0"):
        find_suspects(predictions, 0)


def test_a_missing_cleanlab_is_an_error_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    monkeypatch.delitem(sys.modules, "cleanlab.filter", raising=False)

    with pytest.raises(
        RunError,
        match=r"need cleanlab, which is not installed; fix: .*pip install .*\[audit\]'",
    ):
        find_suspects(flipped_world()[0])


def test_suspects_are_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "suspects.csv"

    write_suspects(path, [Suspect('a, "b".jpg', "Café", "dog", 0.0123456789, "because")])

    with open(path, encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["id", "label", "suggested", "score", "reason"],
            ['a, "b".jpg', "Café", "dog", "0.0123457", "because"],
        ]
