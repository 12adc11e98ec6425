"""Ensembles: one contract for every method, then what each of them is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load, save
from scipy.special import softmax

from threefold import combiners
from threefold.combiners import (
    Ensemble,
    GreedyEnsemble,
    MeanEnsemble,
    PrunedEnsemble,
    StackedEnsemble,
    VoteEnsemble,
    WeightedEnsemble,
)
from threefold.ensemble import ENSEMBLES, make_ensemble
from threefold.errors import DataError, RecipeError, RunError

METHODS = pytest.mark.parametrize("method", ENSEMBLES)
FITTED = pytest.mark.parametrize("method", [name for name in ENSEMBLES if make_ensemble(name).needs_fit])
LAW = settings(max_examples=60, deadline=None)


def scored(m: int = 3, n: int = 90, k: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Members of different quality: probabilities (m, n, k) float32 and labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = rng.normal(0, 1.5, (m, n, k)) + np.eye(k)[labels] * np.linspace(2, 3, m)[:, None, None]
    return softmax(logits, -1).astype(np.float32), labels


def build(method: str, seed: int = 0) -> Ensemble:
    """The method, with a small network where it has one."""
    return StackedEnsemble(64, epochs=30, lr=1e-2, seed=seed) if method == "stacked" else make_ensemble(method, seed)


def answer(module: torch.nn.Module, probs: np.ndarray) -> np.ndarray:
    """A module's probabilities (n, k) of the members' (m, n, k)."""
    with torch.inference_mode():
        return module(torch.tensor(probs.swapaxes(0, 1))).numpy()


# Tenths, so that ties within a member and between classes are common; every row sums to 1.
tied = (
    st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(2, 5))
    .flatmap(lambda shape: hnp.arrays(np.int64, shape, elements=st.integers(0, 3)))
    .map(lambda counts: (counts + (counts.sum(-1, keepdims=True) == 0)).astype(np.float32))
    .map(lambda counts: counts / counts.sum(-1, keepdims=True))
)


@METHODS
def test_answers_are_probabilities(method: str) -> None:
    probs, labels = scored()
    ensemble = build(method)
    assert ensemble.fit(probs, labels) is ensemble
    found = ensemble.predict_proba(probs)
    assert found.shape == (90, 4)
    assert found.dtype == np.float64
    assert found.min() >= 0
    assert found.sum(1) == pytest.approx(1, abs=1e-6)
    assert (ensemble.predict(probs) == found.argmax(1)).all()
    assert (found.argmax(1) == labels).mean() > 0.8


@METHODS
def test_the_module_answers_as_the_ensemble_and_survives_export(method: str) -> None:
    probs, labels = scored(n=40)
    ensemble = build(method).fit(probs, labels)
    before = torch.random.get_rng_state()
    module = ensemble.to_module()
    assert (torch.random.get_rng_state() == before).all()
    expected = ensemble.predict_proba(probs)
    assert answer(module, probs) == pytest.approx(expected, abs=1e-6)
    example = (torch.tensor(probs[:, :2].swapaxes(0, 1)),)
    exported = torch.export.export(module, example, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert answer(exported.module(), probs) == pytest.approx(expected, abs=1e-6)


@METHODS
def test_a_saved_state_answers_the_same(method: str) -> None:
    probs, labels = scored()
    ensemble = build(method).fit(probs, labels)
    again = make_ensemble(method).from_state(load(save(ensemble.state())))
    assert type(again) is type(ensemble)
    assert (again.predict_proba(probs) == ensemble.predict_proba(probs)).all()
    assert (answer(again.to_module(), probs) == answer(ensemble.to_module(), probs)).all()


@FITTED
def test_using_a_method_before_fit_is_an_error(method: str) -> None:
    probs, _ = scored()
    ensemble = make_ensemble(method)
    for use in (
        lambda: ensemble.predict_proba(probs),
        lambda: ensemble.predict(probs),
        ensemble.state,
        ensemble.to_module,
    ):
        with pytest.raises(RunError, match=r"not fitted.*call fit"):
            use()
    with pytest.raises(DataError, match="not the state of a"):
        ensemble.from_state({})


@METHODS
def test_methods_that_learn_nothing_work_at_once(method: str) -> None:
    probs, labels = scored()
    if not build(method).needs_fit:
        assert (build(method).predict_proba(probs) == build(method).fit(probs, labels).predict_proba(probs)).all()


@METHODS
def test_one_member_alone_works(method: str) -> None:
    probs, labels = scored(m=1)
    found = build(method).fit(probs, labels).predict_proba(probs)
    assert found.sum(1) == pytest.approx(1, abs=1e-6)
    if method in ("mean", "weighted", "greedy"):
        assert found == pytest.approx(probs[0], abs=1e-7)


@METHODS
def test_the_same_seed_gives_the_same_bits_and_the_global_generators_are_left_alone(method: str) -> None:
    probs, labels = scored()
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = build(method, seed=3).fit(probs, labels).predict_proba(probs)
    assert (torch.random.get_rng_state() == torch_state).all()
    assert (np.random.get_state()[1] == numpy_state).all()
    torch.rand(7)
    assert (build(method, seed=3).fit(probs, labels).predict_proba(probs) == first).all()
    if method == "stacked":
        assert (build(method, seed=4).fit(probs, labels).predict_proba(probs) != first).any()


@pytest.mark.parametrize("method", [name for name in ENSEMBLES if name != "stacked"])
def test_the_order_of_the_members_does_not_matter(method: str) -> None:
    probs, labels = scored()
    expected = build(method).fit(probs, labels).predict_proba(probs)
    for order in itertools.permutations(range(3)):
        assert build(method).fit(probs[list(order)], labels).predict_proba(probs[list(order)]) == pytest.approx(
            expected, abs=1e-4
        )


@METHODS
def test_inputs_are_never_changed(method: str) -> None:
    probs, labels = scored()
    kept = probs.copy()
    build(method).fit(probs, labels).predict_proba(probs)
    assert (probs == kept).all()


@METHODS
def test_wrong_inputs_are_refused(method: str) -> None:
    probs, labels = scored()
    wrong = probs.copy()
    wrong[1, 2, 3] = np.nan
    ensemble = build(method).fit(probs, labels)
    for call in (ensemble.predict_proba, lambda array: build(method).fit(array, labels)):
        with pytest.raises(DataError, match=r"NaN or infinite: index \(1, 2, 3\)"):
            call(wrong)
        with pytest.raises(DataError, match="wrong shape"):
            call(probs[0])
        with pytest.raises(DataError, match="softmax"):
            call(np.log(probs))
    with pytest.raises(DataError, match="labels have the wrong shape"):
        ensemble.fit(probs, labels[1:])


@FITTED
def test_other_members_than_in_fit_are_refused(method: str) -> None:
    ensemble = build(method).fit(*scored())
    with pytest.raises(DataError, match="fitted on other members"):
        ensemble.predict_proba(scored(m=2)[0])


def test_a_stacked_ensemble_refuses_other_classes_with_the_same_product() -> None:
    ensemble = build("stacked").fit(*scored(m=3, k=4))
    with pytest.raises(DataError, match="fitted on other classes; expected 4, got 3"):
        ensemble.predict_proba(scored(m=4, k=3)[0])


def test_pruning_by_hand() -> None:
    probs = np.array([[[0.6, 0.3, 0.1]], [[0.1, 0.5, 0.4]], [[0.2, 0.4, 0.4]]])  # the last: a tie, the first wins
    assert PrunedEnsemble().predict_proba(probs) == pytest.approx(np.array([[0.6, 0.9, 0.0]]) / 1.5)
    assert PrunedEnsemble(2).predict_proba(probs) == pytest.approx(np.array([[0.6, 1.2, 0.8]]) / 2.6)
    assert VoteEnsemble().predict_proba(probs) == pytest.approx(np.array([[1, 2, 0]]) / 3)
    with pytest.raises(RecipeError, match="keeps at least one"):
        PrunedEnsemble(0)


def test_pruning_and_voting_can_disagree() -> None:
    probs = np.array([[[0.98, 0.01, 0.01]], [[0.3, 0.4, 0.3]], [[0.3, 0.4, 0.3]]])
    assert PrunedEnsemble().predict(probs) == 0  # 0.98 against 0.4 + 0.4
    assert VoteEnsemble().predict(probs) == 1


def test_tied_votes_go_to_the_first_class() -> None:
    probs = np.array([[[0.1, 0.2, 0.7]], [[0.2, 0.7, 0.1]]])
    assert VoteEnsemble().predict(probs) == 1


@LAW
@given(probs=tied)
def test_keeping_every_class_is_the_mean(probs: np.ndarray) -> None:
    mean = MeanEnsemble().predict_proba(probs)
    assert PrunedEnsemble(probs.shape[-1]).predict_proba(probs) == pytest.approx(mean, abs=1e-6)


@LAW
@given(probs=tied, keep=st.integers(1, 6))
def test_modules_break_ties_as_numpy_does(probs: np.ndarray, keep: int) -> None:
    for ensemble in (PrunedEnsemble(keep), VoteEnsemble()):
        assert answer(ensemble.to_module(), probs) == pytest.approx(ensemble.predict_proba(probs), abs=1e-6)


@LAW
@given(probs=tied)
def test_a_pruned_member_keeps_only_its_first_largest_value(probs: np.ndarray) -> None:
    one = probs[:1]
    found = PrunedEnsemble().predict_proba(one)
    assert (found == np.eye(probs.shape[-1])[one[0].argmax(-1)]).all()
    assert (VoteEnsemble().predict_proba(one) == found).all()


def test_weights_minimise_the_penalised_log_loss() -> None:
    probs, labels = scored(m=2, n=200)
    hits = probs[:, np.arange(200), labels].astype(float)
    grid = np.linspace(0, 1, 2001)
    loss = [-np.log(w * hits[0] + (1 - w) * hits[1]).sum() + 10 * 2 * (w - 0.5) ** 2 for w in grid]
    assert WeightedEnsemble().fit(probs, labels).weights_[0] == pytest.approx(grid[np.argmin(loss)], abs=2e-3)


def test_weights_stay_near_equal_for_few_rows_and_leave_for_many() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 4000)
    good = softmax(rng.normal(size=(4000, 4)) + 4 * np.eye(4)[labels], -1)
    probs = np.stack([good, rng.dirichlet(np.ones(4), 4000)])  # the second member guesses
    few = WeightedEnsemble().fit(probs[:, :5], labels[:5]).weights_
    many = WeightedEnsemble().fit(probs, labels).weights_
    assert few[1] > 0.3
    assert many[1] < 0.03
    assert WeightedEnsemble(ridge=1e6).fit(probs, labels).weights_ == pytest.approx(0.5, abs=0.01)


@LAW
@given(seed=st.integers(0, 10_000), m=st.integers(1, 6), n=st.integers(1, 60))
def test_weights_are_on_the_simplex_and_fit_no_worse_than_equal_ones(seed: int, m: int, n: int) -> None:
    probs, labels = scored(m, n, seed=seed)
    weights = WeightedEnsemble().fit(probs, labels).weights_
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    hits = probs[:, np.arange(n), labels].astype(float)
    assert np.log(weights @ hits).sum() >= np.log(hits.mean(0)).sum() - 1e-6


def test_greedy_takes_the_best_member_first_then_what_helps_it() -> None:
    labels = np.array([0] * 6 + [1] * 4)
    wrong = [[9], [6, 7], [0, 1]]  # rows that each member misses: a is best; b's misses are covered by the others
    sure = np.where(labels[:, None] == np.arange(2), 0.9, 0.1)
    members = []
    for rows in wrong:
        member = sure.copy()
        member[rows] = member[rows][:, ::-1] * [0.75, 1.25] + [[0.125, -0.125]]
        members.append(member / member.sum(1, keepdims=True))
    probs = np.stack(members)
    one = GreedyEnsemble(max_members=1).fit(probs, labels)
    assert one.weights_.tolist() == [1, 0, 0]
    three = GreedyEnsemble().fit(probs, labels)
    assert (three.predict(probs) == labels).all()
    assert three.weights_[0] > 0
    with pytest.raises(RecipeError, match="max_members"):
        GreedyEnsemble(0)


@LAW
@given(seed=st.integers(0, 10_000), size=st.integers(1, 5))
def test_greedy_is_never_worse_than_the_best_member_on_its_own_rows(seed: int, size: int) -> None:
    probs, labels = scored(4, 40, seed=seed)
    ensemble = GreedyEnsemble(size).fit(probs, labels)
    assert (ensemble.predict(probs) == labels).mean() >= (probs.argmax(-1) == labels).mean(1).max()
    assert ensemble.weights_.sum() == pytest.approx(1)
    assert (ensemble.weights_ > 0).sum() <= size


@pytest.mark.parametrize("seed", range(10))
def test_greedy_with_more_picks_is_never_worse_on_its_own_rows(seed: int) -> None:
    probs, labels = scored(6, 40, seed=seed)
    fits = [(GreedyEnsemble(size).fit(probs, labels).predict(probs) == labels).mean() for size in range(1, 9)]
    assert fits == sorted(fits)


def test_greedy_breaks_ties_in_accuracy_by_log_loss() -> None:
    labels = np.array([0, 1, 0, 1])
    unsure = np.where(labels[:, None] == np.arange(2), 0.6, 0.4)
    sure = np.where(labels[:, None] == np.arange(2), 0.9, 0.1)
    assert GreedyEnsemble().fit(np.stack([unsure, sure]), labels).weights_.tolist() == [0, 1]


def test_the_stacked_network_is_the_papers() -> None:
    probs, labels = scored(n=20, k=10)
    module = StackedEnsemble(epochs=1).fit(probs, labels).to_module()
    assert sum(p.numel() for p in module.parameters()) == 167_946
    assert [type(layer).__name__ for layer in module] == [
        "Flatten",
        "Linear",
        "LeakyReLU",
        "Dropout",
        "Linear",
        "Softmax",
    ]
    assert (module[2].negative_slope, module[3].p, module.training) == (0.2, 0.5, False)


def test_dropout_is_one_half(monkeypatch: pytest.MonkeyPatch) -> None:
    flips = combiners._coin_flips(np.random.default_rng(0), (333, 301))
    assert flips.shape == (333, 301)
    assert set(np.unique(flips)) == {0, 1}
    assert flips.mean() == pytest.approx(0.5, abs=0.01)
    # With everything dropped no gradient passes the hidden layer, in either direction; with nothing, it does.
    probs, labels = scored()
    fits = []
    for kept in (np.zeros, np.ones):
        monkeypatch.setattr(combiners, "_coin_flips", lambda _, shape, kept=kept: kept(shape, np.uint8))
        fits += [StackedEnsemble(16, epochs=epochs, lr=0.1).fit(probs, labels).state() for epochs in (0, 2)]
    untouched = {name: (fits[0][name] == fits[1][name]).all() for name in fits[0]}
    assert untouched == {"hidden_weight_": True, "hidden_bias_": True, "output_weight_": True, "output_bias_": False}
    assert not any((fits[2][name] == fits[3][name]).all() for name in fits[2])


def test_stacking_learns_what_no_average_can() -> None:
    """One member has two classes swapped: right for the stacker, poison for the mean."""
    probs, labels = scored(m=2, n=600, seed=1)
    probs[1] = probs[1][:, [1, 0, 3, 2]]
    fit, held = slice(0, 400), slice(400, 600)
    ensemble = StackedEnsemble(256, epochs=60, lr=1e-3).fit(probs[:, fit], labels[fit])
    stacked = (ensemble.predict(probs[:, held]) == labels[held]).mean()
    assert stacked > (MeanEnsemble().predict(probs[:, held]) == labels[held]).mean() + 0.1
    assert stacked >= (probs[:, held].argmax(-1) == labels[held]).mean(1).max()


def test_a_stacked_ensemble_that_cannot_learn_stays_at_chance() -> None:
    probs, labels = scored(n=300)
    shuffled = np.random.default_rng(0).permutation(labels)
    found = StackedEnsemble(64, epochs=3).fit(probs[:, :200], shuffled[:200]).predict(probs[:, 200:])
    assert abs((found == shuffled[200:]).mean() - 0.25) < 0.15


def test_a_long_input_is_answered_in_parts_without_a_seam() -> None:
    probs, labels = scored(n=50)
    ensemble = build("stacked").fit(probs, labels)
    found = ensemble.predict_proba(np.tile(probs, (1, 170, 1)))
    assert found[8150:8200] == pytest.approx(ensemble.predict_proba(probs), abs=1e-6)
