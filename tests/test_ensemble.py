"""Cross-fitting, the choice among methods, temperature, and the authors' own predictions scored again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from threefold import paired, stats
from threefold.combiners import Ensemble, MeanEnsemble, WeightedEnsemble
from threefold.ensemble import (
    ENSEMBLES,
    TemperatureModule,
    apply_temperature,
    choose,
    cross_fit,
    fit_temperature,
    make_ensemble,
)
from threefold.errors import DataError, RecipeError
from threefold.predictions import Predictions
from threefold.recipe import EnsembleSpec

AUTHORS = Path(__file__).parents[2] / "shared" / "data" / "fashion_mnist_authors_predictions.npz"
LAW = settings(max_examples=50, deadline=None)


class Memory(Ensemble):
    """Answers 1 for the label of a row it has seen, found by its probabilities; a leak would make it perfect."""

    _state = ("seen_",)
    seen_: dict[bytes, int]

    def _fit(self, probs, labels):
        self.seen_ = {probs[:, i].tobytes(): int(labels[i]) for i in range(len(labels))}

    def _combine(self, probs):
        answers = [self.seen_.get(probs[:, i].tobytes(), 0) for i in range(probs.shape[1])]
        return np.eye(probs.shape[2])[answers]

    def to_module(self):
        raise NotImplementedError


class Witness(Memory):
    """Records the rows of every fit: members' first probability holds the row number."""

    fits: list[set[int]]

    def _fit(self, probs, labels):
        super()._fit(probs, labels)
        self.fits.append({round(float(p) * 1e4) for p in probs[0, :, 0]})


def numbered(n: int, k: int = 3) -> np.ndarray:
    """Probabilities (1, n, k) of which the first tells the row's number."""
    first = np.arange(n) / 1e4
    rest = np.repeat((1 - first)[:, None] / (k - 1), k - 1, 1)
    return np.column_stack([first, rest])[None]


def parts_of(labels: np.ndarray, groups: list[str] | None = None) -> np.ndarray:
    """The parts that cross_fit made, recovered from what it fitted on."""
    fits: list[set[int]] = []

    def factory() -> Witness:
        witness = Witness()
        witness.fits = fits
        return witness

    n = len(labels)
    cross_fit(factory, numbered(n), labels, groups=groups)
    held = [set(range(n)) - rows for rows in fits]
    assert sum(map(len, held)) == n
    part = np.full(n, -1)
    for number, rows in enumerate(held):
        part[list(rows)] = number
    assert (part >= 0).all()
    return part


def test_every_method_of_a_recipe_exists_and_in_the_order_of_simplicity() -> None:
    assert list(ENSEMBLES) == ["mean", "vote", "pruned", "top2", "weighted", "greedy", "stacked"]
    known = EnsembleSpec.model_json_schema()["properties"]["methods"]["items"]["enum"]
    assert set(known) == set(ENSEMBLES)
    assert make_ensemble("stacked", seed=5).seed == 5
    with pytest.raises(RecipeError, match=r"no such ensemble method: staked; expected one of stacked$"):
        make_ensemble("staked")
    with pytest.raises(RecipeError, match="expected one of mean, vote"):
        make_ensemble("xyz")


@pytest.mark.parametrize("folds", [None, np.arange(60) % 3])
def test_no_row_is_predicted_by_an_ensemble_that_has_seen_it(folds: np.ndarray | None) -> None:
    labels = np.array([1, 2] * 30)
    probs = numbered(60)
    assert (Memory().fit(probs, labels).predict(probs) == labels).all()
    assert (cross_fit(Memory, probs, labels, folds).argmax(1) == 0).all()


def test_cross_fit_uses_the_folds_it_is_given() -> None:
    rng = np.random.default_rng(0)
    probs, labels, folds = rng.dirichlet(np.ones(3), (2, 40)), rng.integers(0, 3, 40), rng.integers(-1, 3, 40)
    found = cross_fit(WeightedEnsemble, probs, labels, folds)
    for value in np.unique(folds):
        held = folds == value
        expected = WeightedEnsemble().fit(probs[:, ~held], labels[~held]).predict_proba(probs[:, held])
        assert (found[held] == expected).all()
    assert (cross_fit(MeanEnsemble, probs, labels) == MeanEnsemble().predict_proba(probs)).all()


@LAW
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=3).filter(lambda c: sum(c) > 1), seed=st.integers(0, 99)
)
def test_parts_are_stratified_whatever_the_classes_sizes(counts: list[int], seed: int) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    part = parts_of(labels)
    for c, count in enumerate(counts):
        sizes = np.bincount(part[labels == c], minlength=min(5, len(labels)))
        assert sizes.max() - sizes.min() <= 1, count


@LAW
@given(seed=st.integers(0, 999), number=st.integers(2, 15))
def test_groups_stay_in_one_part(seed: int, number: int) -> None:
    rng = np.random.default_rng(seed)
    labels, numbers = rng.integers(0, 3, 80), rng.integers(0, number, 80)
    part = parts_of(labels, [f"signer{g}" for g in numbers])
    assert all(len(set(part[numbers == g])) == 1 for g in numbers)
    assert len(set(part)) == min(5, len(set(numbers)))


def test_groups_are_spread_so_that_classes_stay_even() -> None:
    """Fifty groups of one class each, every fifth of the rare one: every part gets its share of both."""
    groups = np.repeat(np.arange(50), 4)
    labels = (groups % 5 == 0).astype(int)
    part = parts_of(labels, [f"{g:02d}" for g in groups])
    table = np.array([np.bincount(part[labels == c], minlength=5) for c in (0, 1)])
    assert (table == [[32], [8]]).all()


def test_rows_that_make_no_two_parts_are_refused() -> None:
    probs, labels = numbered(6), np.arange(6) % 3
    with pytest.raises(DataError, match="cannot be cross-fitted"):
        cross_fit(MeanEnsemble, probs, labels, folds=np.zeros(6, int))
    with pytest.raises(DataError, match="folds have the wrong shape"):
        cross_fit(MeanEnsemble, probs, labels, folds=np.arange(5))
    with pytest.raises(DataError, match="cannot be cross-fitted"):
        cross_fit(MeanEnsemble, probs, labels, groups=["one"] * 6)
    with pytest.raises(DataError, match="groups do not match"):
        cross_fit(MeanEnsemble, probs, labels, groups=["one", "two"])


def right(rows: int, n: int = 100) -> np.ndarray:
    """Probabilities (n, 2) that are right, for labels 0, on the first `rows`."""
    return np.where((np.arange(n) < rows)[:, None], [0.9, 0.1], [0.1, 0.9])


def test_the_simplest_within_one_standard_error_is_chosen() -> None:
    labels = np.zeros(100, int)
    # 89 against 90 nested rows: the difference is 0.01, its standard error 0.00995; 88 against 90: 0.02 against 0.014.
    name, reason = choose({"stacked": right(90), "mean": right(90)}, labels)
    assert name == "mean"
    assert reason == "the best, 0.9000 cross-fitted; and the simplest"
    name, reason = choose({"stacked": right(90), "mean": right(88)}, labels)
    assert name == "stacked"
    assert reason == "the best, 0.9000 cross-fitted; no simpler method comes within one standard error"
    scattered = right(89)[np.random.default_rng(0).permutation(100)]  # one image fewer, but many differ
    name, reason = choose({"stacked": right(90), "vote": scattered, "pruned": right(50)}, labels)
    assert name == "vote"
    assert reason.startswith("0.8900, within one standard error (0.0")
    assert reason.endswith("of stacked, 0.9000 cross-fitted, and simpler")


def test_the_choice_does_not_depend_on_the_order_of_the_candidates() -> None:
    labels = np.zeros(100, int)
    table = {"weighted": right(90), "pruned": right(90), "greedy": right(90), "top2": right(40)}
    assert choose(table, labels)[0] == choose(dict(reversed(table.items())), labels)[0] == "pruned"


def test_the_paired_error_is_smaller_than_an_unpaired_one_would_be() -> None:
    """Nested mistakes: 0.05 apart, paired error 0.022 (unpaired 0.04 to 0.06 would have tolerated more)."""
    assert choose({"stacked": right(80), "mean": right(75)}, np.zeros(100, int))[0] == "stacked"


def test_a_choice_needs_known_candidates() -> None:
    with pytest.raises(DataError, match="no ensemble to choose from"):
        choose({}, [0])
    with pytest.raises(RecipeError, match="no such ensemble method: median"):
        choose({"median": right(1)}, np.zeros(100, int))


def test_temperature_undoes_a_known_sharpening() -> None:
    rng = np.random.default_rng(0)
    probs = softmax(rng.normal(0, 2, (20_000, 5)), -1)
    labels = (rng.random((20_000, 1)) > probs.cumsum(1)).sum(1)
    for temperature in (0.5, 1.0, 2.5):
        sharpened = softmax(np.log(probs) / temperature, -1)
        assert fit_temperature(sharpened, labels) == pytest.approx(1 / temperature, rel=0.05)
    overconfident = softmax(np.log(probs) * 3, -1)
    calibrated = apply_temperature(overconfident, fit_temperature(overconfident, labels))
    assert stats.ece(calibrated, labels) < 0.02 < stats.ece(overconfident, labels)


@LAW
@given(temperature=st.floats(0.05, 20), seed=st.integers(0, 999))
def test_temperature_keeps_the_order_of_the_classes(temperature: float, seed: int) -> None:
    probs = np.random.default_rng(seed).dirichlet(np.ones(5), 20).astype(np.float32)
    found = apply_temperature(probs, temperature)
    assert found.sum(1) == pytest.approx(1)
    assert (found.argmax(1) == probs.argmax(1)).all()
    with torch.inference_mode():
        assert TemperatureModule(temperature)(torch.tensor(probs)).numpy() == pytest.approx(found, abs=1e-6)


def test_temperature_of_one_changes_nothing_but_exact_zeros() -> None:
    probs = np.array([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])
    found = apply_temperature(probs, 1.0)
    assert found[0] == pytest.approx(probs[0])
    assert found[1] == pytest.approx([1, 1e-7, 1e-7])


def test_temperature_is_bounded_where_every_row_is_right() -> None:
    assert 0.05 <= fit_temperature(right(100), np.zeros(100, int)) < 0.1
    assert 19 < fit_temperature(right(0), np.zeros(100, int)) <= 20


def test_temperature_survives_export() -> None:
    probs = torch.full((3, 4), 0.25)
    exported = torch.export.export(TemperatureModule(2.0), (probs,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert torch.allclose(exported.module()(probs[:2]), probs[:2])


@pytest.mark.parametrize("temperature", [0, -1, np.nan])
def test_a_temperature_is_positive(temperature: float) -> None:
    for use in (lambda: apply_temperature(right(1), temperature), lambda: TemperatureModule(temperature)):
        with pytest.raises(DataError, match="above 0"):
            use()


def test_the_array_half_starts_without_torch() -> None:
    code = (
        "import sys, numpy as np, threefold.predictions, threefold.stats, threefold.ensemble as e;"
        "p = np.full((2, 10, 2), .5); y = np.arange(10) % 2;"
        "[e.make_ensemble(n).fit(p, y).predict(p) for n in e.ENSEMBLES if n != 'stacked'];"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})


@pytest.fixture(scope="module")
def authors() -> Predictions:
    if not AUTHORS.exists():
        pytest.skip("the authors' predictions are not here")
    return Predictions.load(AUTHORS)


@pytest.mark.parametrize(("method", "right"), [("mean", 9592), ("pruned", 9591), ("vote", 9590), ("top2", 9592)])
def test_the_papers_fashion_mnist_ensembles(authors: Predictions, method: str, right: int) -> None:
    """Table 4: AVG 0.9592, EXT 0.9591 from the authors' own three softmaxes."""
    mixed = authors.select([name for name in authors.members if "_Mixed_" in name])
    assert len(mixed.members) == 3
    assert stats.correct(make_ensemble(method).predict_proba(mixed.probs), mixed.labels).sum() == right


def test_the_papers_ensemble_beats_its_best_member_and_its_heads_do_not_differ(authors: Predictions) -> None:
    hits = dict(zip(authors.members, authors.probs.argmax(-1) == authors.labels, strict=True))
    mixed = authors.select([name for name in authors.members if "_Mixed_" in name])
    ensemble = stats.correct(MeanEnsemble().predict_proba(mixed.probs), mixed.labels)
    best = max(mixed.members, key=lambda name: hits[name].sum())
    assert best.endswith("SEResNeXt101")
    only_ensemble, only_best, p = paired.mcnemar_exact(ensemble, hits[best])
    assert (only_ensemble, only_best) == (114, 77)
    assert p == pytest.approx(0.009, abs=5e-4)
    std, gru = (hits[f"FashionMNIST_SEResNext101_LRG299_{name}"] for name in ("Mul", "GRU_Mul"))
    found = paired.mcnemar_exact(std, gru)
    assert found == (141, 140, 1.0)
    sentence = paired.verdict("LRG299", "GRU", *found)
    assert sentence == "no evidence of a difference: 141 against 140 images, p = 1.00"
