"""Scores on seen rows are refused or called apparent; memorised labels never help a score."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from threefold.data.splits import assign_roles
from threefold.ensembles.averaging import GreedyEnsemble, MeanEnsemble, WeightedEnsemble
from threefold.ensembles.base import Ensemble
from threefold.ensembles.cross_fit import cross_fit
from threefold.ensembles.registry import SelectedEnsemble, make_ensemble
from threefold.errors import DataError
from threefold.evaluation.evaluate import evaluate
from threefold.evaluation.scoring import score_ensemble
from threefold.predictions.ledger import FIT, SCORE, SELECT, Ledger, SeenRows
from threefold.predictions.predictions import Predictions
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.ensemble import EnsembleSpec
from threefold.recipe.schema import FoldSpec
from threefold.stats.scores import accuracy, share_interval


def noise(n: int, k: int = 4, m: int = 6, seed: int = 0, **more: object) -> Predictions:
    """Members that know nothing: shuffled labels."""
    rng = np.random.default_rng(seed)
    ids = tuple(f"image{i}" for i in range(n))
    tree = {
        "ids": ids,
        "classes": tuple("abcdefgh"[:k]),
        "members": tuple(f"m{i}" for i in range(m)),
        "kind": "oof",
        **more,
    }
    return Predictions(
        probs=rng.dirichlet(np.ones(k), (m, n)).astype(np.float32),
        labels=rng.integers(0, k, n),
        **tree,
    )  # type: ignore[arg-type]


class Memorizer(Ensemble):
    """Returns the labels of the rows of its fit, and random classes for all others."""

    _state = ("known_",)
    known_: dict[bytes, int]

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        self.known_ = {probs[:, i].tobytes(): int(y) for i, y in enumerate(labels)}

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        n, k = probs.shape[1:]
        answer = np.random.default_rng(1).dirichlet(np.ones(k), n)
        for i in range(n):
            if (label := self.known_.get(probs[:, i].tobytes())) is not None:
                answer[i] = np.eye(k)[label]
        return answer

    def to_module(self):  # type: ignore[no-untyped-def]
        raise NotImplementedError


def test_scores_on_seen_rows_are_refused_or_apparent() -> None:
    rows = noise(60)

    for ensemble in (GreedyEnsemble(), WeightedEnsemble(), SelectedEnsemble(WeightedEnsemble())):
        ensemble.fit(rows.probs[:, :40], rows.labels[:40], rows.ids[:40])
        honest = score_ensemble(ensemble, rows.rows(range(40, 60)))
        assert honest.apparent is False
        assert honest.n == 20
        with pytest.raises(
            DataError,
            match=r"fitted on some of these rows: \w+; expected none, got 1 of 21, "
            r"the first image39; fix: ",
        ):
            score_ensemble(ensemble, rows.rows(range(39, 60)))
        assert score_ensemble(ensemble, rows.rows(range(39, 60)), apparent=True).apparent is True

    mean = MeanEnsemble().fit(rows.probs, rows.labels, rows.ids)

    assert score_ensemble(mean, rows).apparent is False  # it learns nothing


def test_the_order_of_rows_and_the_file_do_not_matter() -> None:
    seen = SeenRows.from_ids(["b", "a", "ü"])

    np.testing.assert_array_equal(seen.contains(["a", "c", "ü"]), [True, False, True])
    assert not SeenRows.from_ids([]).contains(["a"]).any()


def test_ledger_refuses_overlap_and_lists_steps() -> None:
    ledger = Ledger(4, "oof")
    ledger.declare("weights", [1, 1, 0, 0], [0, 0, 1, 1])
    ledger.declare("weights", [0, 0, 1, 1], [1, 1, 0, 0])

    with pytest.raises(
        DataError, match=r"scored by what was fitted on them: weights; expected none, got 1 row"
    ):
        ledger.declare("weights", [1, 0, 0, 0], [1, 0, 0, 1])
    with pytest.raises(DataError, match="another number of rows: weights"):
        ledger.declare("weights", [1, 0], [0, 1])

    ledger.declare("checkpoints", [1, 0, 0, 0], [1, 1, 0, 0], apparent=True)

    with pytest.raises(DataError, match="got 1 of 2, the first b"):
        ledger.declare_other_table("ensembles", ["a", "b"], ["b", "c"], "test")

    first, second = ledger.table()

    assert first.as_json() == {
        "step": "weights",
        "fitted_on": "2 of 4 oof rows, 2 times",
        "scored": "4 oof rows, each time the others",
        "overlap": 0,
    }
    assert (second.step, second.overlap) == ("checkpoints", 1)


def test_predictions_from_networks_that_saw_a_row_are_refused(tmp_path: Path) -> None:
    roles = np.array([[SCORE, SCORE, FIT, SELECT], [FIT, SELECT, SCORE, SCORE]], np.int8)
    rows = noise(4, folds=np.array([0, 0, 1, 1]), roles=roles)
    rows.save(tmp_path / "oof.npz")

    back = Predictions.load(tmp_path / "oof.npz")

    np.testing.assert_array_equal(back.roles, roles)
    assert [line.overlap for line in back.ledger().table()] == [0, 0]
    np.testing.assert_array_equal(rows.rows([3, 0]).roles, roles[:, [3, 0]])

    for bit, what in ((FIT, "weights of the members"), (SELECT, "checkpoints and stages")):
        bad = roles.copy()
        bad[0, 1] += bit
        with pytest.raises(DataError, match=f"fitted on them: {what}"):
            noise(4, folds=np.array([0, 0, 1, 1]), roles=bad)

    paper = noise(
        4,
        folds=np.array([0, 0, 1, 1]),
        roles=np.where(roles == SCORE, SCORE + SELECT, FIT),
        protocol="paper",
    )

    assert {line.step: line.overlap for line in paper.ledger().table()}[
        "checkpoints and stages"
    ] == 4

    for bad in (roles[:1], roles[:, :3], roles.astype(float), roles + 16):
        with pytest.raises(DataError, match="roles"):
            noise(4, folds=np.array([0, 0, 1, 1]), roles=bad)

    with pytest.raises(DataError, match="no folds"):
        noise(4, roles=roles)


@settings(deadline=None, max_examples=20)
@given(
    n=st.integers(150, 300),
    k=st.integers(2, 6),
    folds=st.sampled_from([None, 2, 5]),
    grouped=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_planted_canary_never_leaks(
    n: int, k: int, folds: int | None, grouped: bool, seed: int
) -> None:
    """An ensemble that memorises labels is right on its own rows, and at chance cross-fitted."""
    rows = noise(n, k, 2, seed)
    part = None if folds is None else np.arange(n) % folds
    groups = [f"g{i // 3}" for i in range(n)] if grouped else None
    ledger = Ledger(n, "oof")

    def declare(saw: np.ndarray, answers: np.ndarray) -> None:
        ledger.declare("canary", saw, answers)

    honest = cross_fit(Memorizer, rows.probs, rows.labels, part, groups, declare)

    apparent = Memorizer().fit(rows.probs, rows.labels).predict_proba(rows.probs)
    low, high = share_interval(honest.argmax(1) == rows.labels, level=0.9999)
    assert accuracy(apparent, rows.labels) == 1
    assert low <= 1 / k <= high
    assert ledger.table()[0].overlap == 0


@settings(deadline=None, max_examples=15)
@given(
    scheme=st.sampled_from(["stratified", "grouped", "leave-one-group-out"]),
    k=st.integers(2, 5),
    seed=st.integers(0, 99),
)
def test_networks_that_memorise_never_answer_what_they_saw(scheme: str, k: int, seed: int) -> None:
    """A network that memorises its fit and select rows scores at chance on the other folds."""
    n, classes = 240, 4
    rng = np.random.default_rng(seed)
    labels, groups = rng.integers(0, classes, n), [f"g{i % 12}" for i in range(n)]
    spec = FoldSpec.model_validate({"k": k, "scheme": scheme})
    roles = assign_roles(labels, groups, spec, "honest", seed)
    probs = np.empty((1, n, classes), np.float32)
    folds = np.full(n, -1)
    table = np.zeros((len(roles), n), np.int8)
    for fold, part in enumerate(roles):
        known = np.union1d(part.fit, part.select)
        answer = rng.dirichlet(np.ones(classes), n)
        answer[known] = np.eye(classes)[labels[known]]
        probs[0, part.score] = answer[part.score]
        folds[part.score] = fold
        table[fold, part.fit] = FIT
        table[fold, part.select] = SELECT
        table[fold, part.score] = SCORE
    rows = Predictions(
        probs=probs,
        labels=labels,
        ids=tuple(map(str, range(n))),
        classes=tuple("abcd"),
        members=("canary",),
        groups=tuple(groups),
        kind="oof",
        folds=folds,
        roles=table,
    )

    evaluation = evaluate(rows, None, EnsembleSpec(methods=("mean",), export="mean"))

    assert abs(evaluation.scores[0].accuracy - 1 / classes) < 0.13  # 4.6 standard errors
    assert [line.overlap for line in evaluation.ledger] == [0, 0]


def test_shuffled_labels_score_at_chance_honestly() -> None:
    rows = noise(600, 4, 20, 3, folds=np.arange(600) % 3)
    spec = EnsembleSpec(methods=("mean", "weighted", "greedy", "logistic"), export="greedy")

    evaluation = evaluate(rows, None, spec)

    for entry in evaluation.scores:
        low, high = share_interval(
            np.arange(entry.n) < round(entry.accuracy * entry.n), level=0.999
        )
        assert low <= 0.25 <= high, entry.name

    apparent = {line.choice: line for line in evaluation.optimism}

    assert apparent["greedy"].apparent > 0.25 + 3 * (0.1875 / 600) ** 0.5
    assert apparent["greedy"].interval[0] > 0
    assert apparent["member"].difference > 0.01
    assert abs(apparent["greedy"].honest - 0.25) < 0.06


def test_a_test_image_among_the_training_rows_is_refused() -> None:
    oof = noise(60, folds=np.arange(60) % 2)
    test = noise(20, seed=1, kind="test", ids=("image3", *(f"t{i}" for i in range(19))))

    with pytest.raises(
        DataError, match=r"choice of the method; expected none, got 1 of 20, the first image3"
    ):
        evaluate(oof, test, EnsembleSpec(methods=("mean", "weighted")))


def test_opening_the_test_rows_is_noted(tmp_path: Path) -> None:
    """Once for training and for each export; each time for other verbs."""
    folder = RunFolder(tmp_path)

    assert folder.test_opened() is None

    for by in ("train", "train", "ensemble", "ensemble", "export", "export"):
        folder.open_test(by, 7)

    opened = folder.test_opened()

    assert opened is not None
    assert (opened.by, opened.rows, opened.times) == ("train", 7, 3)

    stored = json.loads((tmp_path / "ledger.json").read_text())["test_opened"]

    assert [entry["by"] for entry in stored] == ["train", "ensemble", "ensemble", "export"]


def test_every_method_declares_its_rows() -> None:
    rows = noise(40, 3, 3)

    for name in ("best", "weighted", "greedy", "pool", "logistic"):
        fitted = make_ensemble(name).fit(rows.probs, rows.labels, rows.ids)
        assert fitted.seen_ is not None
        assert fitted.seen_.contains(rows.ids).all(), name
        assert make_ensemble(name).fit(rows.probs, rows.labels).seen_ is None

    with pytest.raises(DataError, match="ids do not match"):
        GreedyEnsemble().fit(rows.probs, rows.labels, rows.ids[:3])
