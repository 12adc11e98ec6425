"""Methods by name, selection of members, the choice among methods, the authors' predictions."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import AUTHORS_PREDICTIONS
from support.pools import draw_pool, scored

from threefold.ensembles.averaging import MeanEnsemble
from threefold.ensembles.base import Ensemble
from threefold.ensembles.cross_fit import cross_fit
from threefold.ensembles.registry import (
    ENSEMBLES,
    SelectedEnsemble,
    build_ensemble,
    choose,
    make_ensemble,
    restore,
)
from threefold.ensembles.scaling import apply_temperature
from threefold.ensembles.stacked import StackedEnsemble
from threefold.errors import DataError, RecipeError
from threefold.predictions.predictions import Predictions
from threefold.recipe.ensemble import EnsembleSpec
from threefold.stats import paired_tests, scores

AUTHORS = AUTHORS_PREDICTIONS
QUICK = ("mean", "best", "weighted", "greedy", "pool", "logistic")
LAW = settings(max_examples=50, deadline=None)


def two_class_probs(correct: int, n: int = 100) -> np.ndarray:
    """Probabilities (n, 2) that are right, for labels 0, on the first `correct` rows."""
    return np.where((np.arange(n) < correct)[:, None], [0.9, 0.1], [0.1, 0.9])


def skilled_pool(n: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Six members of which 1, 3 and 4 are better than the others."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    skill = np.array([0.5, 3.0, 0.2, 2.5, 2.8, 0.1])
    logits = rng.normal(size=(6, n, 4)) + skill[:, None, None] * np.eye(4)[labels]
    probs = np.exp(logits)
    return (probs / probs.sum(-1, keepdims=True)).astype(np.float32), labels


def fit_chosen(probs: np.ndarray, labels: np.ndarray) -> Ensemble:
    """The method that `choose` picks after a cross-fit, fitted on all rows."""
    crossed = {
        name: cross_fit(lambda name=name: make_ensemble(name), probs, labels) for name in QUICK
    }
    return make_ensemble(choose(crossed, labels).name).fit(probs, labels)


def test_methods_of_a_recipe_from_simple_to_complex() -> None:
    keys = EnsembleSpec.model_json_schema()["properties"]

    assert list(ENSEMBLES) == [
        "mean",
        "best",
        "vote",
        "pruned",
        "top2",
        "weighted",
        "greedy",
        "pool",
        "logistic",
        "stacked-shrunk",
        "stacked",
    ]
    assert keys["methods"]["items"]["enum"] == list(ENSEMBLES)
    for name in ("auto", *ENSEMBLES):
        assert EnsembleSpec(export=name).export == name
    assert make_ensemble("stacked", seed=5).seed == 5


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no such ensemble method: staked; expected stacked$"):
        make_ensemble("staked")
    with pytest.raises(RecipeError, match="expected one of mean, best, vote"):
        make_ensemble("xyz")


def test_the_best_method_is_chosen_with_a_reason() -> None:
    labels = np.zeros(100, int)

    equal = choose({"stacked": two_class_probs(90), "mean": two_class_probs(90)}, labels)
    better = choose({"stacked": two_class_probs(90), "mean": two_class_probs(80)}, labels)

    # 0.3251 is the entropy of 0.9.
    assert equal == (
        "mean",
        "the best, calibrated log loss 0.3251, accuracy 0.9000 cross-fitted; and the simplest",
    )
    assert better.name == "stacked"
    assert better.reason.endswith(
        "accuracy 0.9000 cross-fitted; no simpler method comes within one standard error"
    )


def test_the_simplest_within_one_standard_error_is_chosen() -> None:
    labels = np.zeros(100, int)
    # One row fewer is right, but many rows differ.
    scattered = two_class_probs(89)[np.random.default_rng(0).permutation(100)]

    name, reason = choose(
        {"stacked": two_class_probs(90), "vote": scattered, "pruned": two_class_probs(89)}, labels
    )

    assert name == "vote"
    assert reason.startswith("calibrated log loss 0.346")
    assert "within one standard error (0.0" in reason
    assert reason.endswith("of stacked, 0.3251, and simpler")


def test_log_loss_decides_between_equal_accuracies() -> None:
    labels = np.arange(200) % 2
    blunt = np.where(labels[:, None] == np.arange(2), 0.9, 0.1)
    blunt[:20] = blunt[:20, ::-1]
    sharp = blunt.copy()
    sharp[:20] = 0.5 + (blunt[:20] - 0.5) * 0.1

    assert choose({"mean": blunt, "logistic": sharp}, labels).name == "logistic"


def test_accuracy_is_not_traded_for_log_loss() -> None:
    labels = np.zeros(200, int)
    careful = np.where((np.arange(200) < 150)[:, None], [0.99, 0.01], [0.49, 0.51])
    mean = np.where((np.arange(200) < 151)[:, None], [0.9, 0.1], [0.1, 0.9])

    name, reason = choose({"mean": mean, "pool": careful}, labels)
    careful[150] = [0.51, 0.49]
    as_accurate = choose({"mean": mean, "pool": careful}, labels)

    assert name == "mean"
    assert reason.endswith("and the simplest of those that classify no fewer rows correctly")
    assert as_accurate.name == "pool"


@LAW
@given(temperature=st.floats(0.2, 5), seed=st.integers(0, 99))
def test_the_choice_does_not_depend_on_calibration(temperature: float, seed: int) -> None:
    probs, labels = scored(2, 150, seed=seed)
    raw = {"mean": probs[0], "pool": probs[1]}
    scaled = {"mean": probs[0], "pool": apply_temperature(probs[1], temperature)}

    assert choose(raw, labels).name == choose(scaled, labels).name


def test_balanced_accuracy_is_not_traded_for_accuracy() -> None:
    """One method answers the frequent class better, the simplest the rare one."""
    labels = np.repeat([0, 1], [180, 20])
    fair = np.where((labels == 0)[:, None], [0.8, 0.2], [0.3, 0.7])
    fair[:36] = fair[:36, ::-1]
    lazy = np.where((labels == 0)[:, None], [0.95, 0.05], [0.6, 0.4])
    candidates = {"mean": fair, "stacked": lazy}

    by_accuracy, by_classes = (
        choose(candidates, labels, metric) for metric in ("accuracy", "balanced_accuracy")
    )

    assert by_accuracy.name == "stacked"
    assert by_classes.name == "mean"
    assert "class-balanced log loss" in by_classes.reason
    assert "balanced accuracy 0.9000 cross-fitted" in by_classes.reason


@pytest.mark.parametrize("metric", ["balanced_accuracy", "macro_f1", "log_loss", "roc_auc"])
def test_the_best_members_are_those_of_the_metric(metric: str) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(300) < 0.15).astype(int)
    logits = rng.normal(0, 1, (6, 300)) + rng.uniform(0.2, 2, (6, 1)) * (2 * labels - 1)
    positive = 1 / (1 + np.exp(-logits - rng.normal(0, 1.5, (6, 1))))
    probs = np.stack([1 - positive, positive], -1)
    scikit = {
        "balanced_accuracy": lambda p: sklearn.metrics.balanced_accuracy_score(labels, p > 0.5),
        "macro_f1": lambda p: sklearn.metrics.f1_score(labels, p > 0.5, average="macro"),
        "log_loss": lambda p: -sklearn.metrics.log_loss(labels, p),
        "roc_auc": lambda p: sklearn.metrics.roc_auc_score(labels, p),
    }
    order = np.argsort([-scikit[metric](p) for p in positive], kind="stable")

    spec = EnsembleSpec(top=2)
    top = build_ensemble("mean", spec, metric=metric).fit(probs, labels)
    best = build_ensemble("best", EnsembleSpec(), metric=metric).fit(probs, labels)

    assert top.state()["chosen_"].tolist() == sorted(order[:2].tolist())
    assert best.state()["weights_"].argmax() == order[0]


def test_the_choice_does_not_depend_on_the_order() -> None:
    labels = np.zeros(100, int)
    candidates = {
        "weighted": two_class_probs(90),
        "pruned": two_class_probs(90),
        "greedy": two_class_probs(90),
        "top2": two_class_probs(40),
    }

    forward = choose(candidates, labels)
    backward = choose(dict(reversed(candidates.items())), labels)

    assert forward.name == backward.name == "pruned"


def test_a_choice_needs_known_candidates() -> None:
    with pytest.raises(DataError, match="no ensemble to choose from"):
        choose({}, [0])
    with pytest.raises(RecipeError, match="no such ensemble method: median"):
        choose({"median": two_class_probs(1)}, np.zeros(100, int))


@pytest.mark.parametrize(
    "kind",
    [
        "null",
        "sure-misses",
        pytest.param("few", marks=pytest.mark.slow),
        pytest.param("label-noise", marks=pytest.mark.slow),
        pytest.param("experts", marks=pytest.mark.slow),
        pytest.param("copies", marks=pytest.mark.slow),
    ],
)
def test_the_chosen_method_does_not_lose_to_the_mean(kind: str) -> None:
    """A small version of the claim that bench/ensembles.py checks with twenty draws."""
    gains = []
    for seed in range(4):
        probs, labels, new, truth = draw_pool(kind, seed, n=300, test=2000)
        chosen = fit_chosen(probs, labels).predict(new) == truth
        mean = MeanEnsemble().predict(new) == truth
        gains.append(100 * (chosen.mean() - mean.mean()))

    error = np.std(gains, ddof=1) / 2
    assert np.mean(gains) > -2 * error - 0.3


def test_a_dominant_member_or_better_is_chosen() -> None:
    probs, labels, new, truth = draw_pool("dominant", 1, n=500, test=2000)

    chosen = fit_chosen(probs, labels).predict(new) == truth
    best = make_ensemble("best").fit(probs, labels).predict(new) == truth

    assert chosen.mean() > best.mean() - 0.01
    assert chosen.mean() > (MeanEnsemble().predict(new) == truth).mean() + 0.05


def test_selection_combines_the_most_accurate_members() -> None:
    probs, labels = skilled_pool()

    selected = SelectedEnsemble(MeanEnsemble(), 3).fit(probs, labels)

    np.testing.assert_array_equal(selected.chosen_, [1, 3, 4])
    np.testing.assert_array_equal(
        selected.predict_proba(probs), MeanEnsemble().predict_proba(probs[[1, 3, 4]])
    )


def test_selection_is_cross_fitted() -> None:
    """A member that knows the labels of part 0 must not be chosen to answer part 0."""
    probs, labels = skilled_pool()
    folds = np.arange(len(labels)) % 2
    probs[0] = np.where(folds[:, None] == 0, np.eye(4)[labels], 0.25)

    crossed = cross_fit(lambda: SelectedEnsemble(MeanEnsemble(), 1), probs, labels, folds)

    first = folds == 0
    assert (crossed[first].argmax(1) == labels[first]).mean() < 0.99
    best = int((probs.argmax(-1) == labels)[:, ~first].mean(1).argmax())
    assert best != 0
    np.testing.assert_allclose(crossed[first], probs[best][first], atol=1e-7)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n.startswith("stacked") else ()) for n in ENSEMBLES],
)
def test_every_method_with_selection_can_be_restored(name: str) -> None:
    probs, labels = skilled_pool(200)
    spec = EnsembleSpec(top=3, methods=("mean",))
    ensemble = build_ensemble(name, spec, 0).fit(probs, labels)
    expected = ensemble.predict_proba(probs)

    restored = restore(name, ensemble.state(), list("abcdef"))
    answers = ensemble.to_module()(torch.tensor(probs).transpose(0, 1)).detach().numpy()

    assert restored.members == ["b", "d", "e"]
    np.testing.assert_allclose(
        restored.ensemble.predict_proba(probs[[1, 3, 4]]), expected, atol=1e-12
    )
    np.testing.assert_allclose(answers, expected, atol=1e-5)


def test_the_recipe_configures_the_stacked_network() -> None:
    spec = EnsembleSpec.model_validate(
        {"stacked": {"hidden": 7, "epochs": 2, "lr": 1e-5, "batch_size": 120}}
    )

    ensemble = build_ensemble("stacked", spec, 5)
    default = build_ensemble("stacked", EnsembleSpec())

    assert isinstance(ensemble, StackedEnsemble)
    assert (ensemble.hidden, ensemble.epochs, ensemble.lr) == (7, 2, 1e-5)
    assert (ensemble.batch_size, ensemble.seed) == (120, 5)
    assert default.epochs is None  # type: ignore[attr-defined]


def test_a_selection_needs_a_member() -> None:
    with pytest.raises(RecipeError, match="a selection has a member"):
        SelectedEnsemble(MeanEnsemble(), 0)


def test_the_array_packages_import_no_torch() -> None:
    code = (
        "import sys, numpy as np, threefold.predictions, threefold.stats;"
        "from threefold.ensembles.registry import make_ensemble;"
        "p = np.full((2, 10, 2), .5); y = np.arange(10) % 2;"
        f"[make_ensemble(n).fit(p, y).predict(p) for n in {(*QUICK, 'vote', 'top2')}];"
        "sys.exit('torch' in sys.modules)"
    )

    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )


@pytest.fixture(scope="module")
def authors() -> Predictions:
    if not AUTHORS.exists():
        pytest.skip("the authors' predictions are not here")
    return Predictions.load(AUTHORS)


@pytest.mark.parametrize(
    ("method", "correct"), [("mean", 9592), ("pruned", 9591), ("vote", 9590), ("top2", 9592)]
)
def test_the_papers_fashion_mnist_ensembles(
    authors: Predictions, method: str, correct: int
) -> None:
    """Table 4: AVG 0.9592, EXT 0.9591 from the authors' own three softmaxes."""
    mixed = authors.select([name for name in authors.members if "_Mixed_" in name])

    answers = make_ensemble(method).predict_proba(mixed.probs)

    assert len(mixed.members) == 3
    assert scores.correct(answers, mixed.labels).sum() == correct


def test_the_papers_ensemble_beats_its_best_member(authors: Predictions) -> None:
    hits = dict(zip(authors.members, authors.probs.argmax(-1) == authors.labels, strict=True))
    mixed = authors.select([name for name in authors.members if "_Mixed_" in name])
    best = max(mixed.members, key=lambda name: hits[name].sum())

    ensemble = scores.correct(MeanEnsemble().predict_proba(mixed.probs), mixed.labels)
    only_ensemble, only_best, p = paired_tests.mcnemar_exact(ensemble, hits[best])

    assert best.endswith("SEResNeXt101")
    assert (only_ensemble, only_best) == (114, 77)
    assert p == pytest.approx(0.009, abs=5e-4)


def test_the_papers_heads_do_not_differ(authors: Predictions) -> None:
    hits = dict(zip(authors.members, authors.probs.argmax(-1) == authors.labels, strict=True))
    std, gru = (hits[f"FashionMNIST_SEResNext101_LRG299_{name}"] for name in ("Mul", "GRU_Mul"))

    test = paired_tests.mcnemar_exact(std, gru)
    sentence = paired_tests.verdict("LRG299", "GRU", *test)

    assert test == pytest.approx((141, 140, 1.0))
    assert sentence == "no evidence of a difference: 141 against 140 images, p = 1.00"
