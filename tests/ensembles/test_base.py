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
from support.pools import scored

from threefold.ensembles.averaging import MeanEnsemble, PrunedEnsemble, VoteEnsemble
from threefold.ensembles.base import Ensemble
from threefold.ensembles.registry import ENSEMBLES, make_ensemble
from threefold.ensembles.stacked import ShrunkStackedEnsemble, StackedEnsemble
from threefold.errors import DataError, RecipeError, RunError
from threefold.models.tracing import trace

NAMES = list(ENSEMBLES)
NETWORKS = {"stacked": StackedEnsemble, "stacked-shrunk": ShrunkStackedEnsemble}
METHODS = pytest.mark.parametrize("method", NAMES)
FITTED = pytest.mark.parametrize(
    "method", [name for name in NAMES if make_ensemble(name).needs_fit]
)
LAW = settings(max_examples=60, deadline=None)


def build(method: str, seed: int = 0) -> Ensemble:
    """Build an ensemble by method, with a small network where it has one."""
    if method in NETWORKS:
        return NETWORKS[method](64, epochs=30, lr=1e-2, seed=seed)
    return make_ensemble(method, seed)


def answer(module: torch.nn.Module, probs: np.ndarray) -> np.ndarray:
    """Return a module's probabilities (n, k) for those of the members (m, n, k)."""
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

    fitted = ensemble.fit(probs, labels)
    answers = ensemble.predict_proba(probs)

    assert fitted is ensemble
    assert answers.shape == (90, 4)
    assert answers.dtype == np.float64
    assert answers.min() >= 0
    assert answers.sum(1) == pytest.approx(1, abs=1e-6)
    assert (ensemble.predict(probs) == answers.argmax(1)).all()
    assert (answers.argmax(1) == labels).mean() > 0.8


@METHODS
def test_the_module_answers_as_the_ensemble_and_survives_export(method: str) -> None:
    probs, labels = scored(n=40)
    ensemble = build(method).fit(probs, labels)
    before = torch.random.get_rng_state()

    module = ensemble.to_module()

    assert (torch.random.get_rng_state() == before).all()

    expected = ensemble.predict_proba(probs)
    assert answer(module, probs) == pytest.approx(expected, abs=1e-6)

    examples = torch.tensor(probs[:, :5].swapaxes(0, 1))
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(module, (examples[:2],), dynamic_shapes=shapes)
    assert answer(exported.module(), probs) == pytest.approx(expected, abs=1e-6)
    # Tracing compares the graph with the module.
    trace(module, examples[:2].float(), examples[2:].float(), ("member_probs", "probs"))


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
    with pytest.raises(DataError, match=r"not the state of an?"):
        ensemble.from_state({})


@METHODS
def test_methods_that_learn_nothing_work_at_once(method: str) -> None:
    probs, labels = scored()
    ensemble = build(method)

    if not ensemble.needs_fit:
        fitted = build(method).fit(probs, labels)
        assert (ensemble.predict_proba(probs) == fitted.predict_proba(probs)).all()


@METHODS
def test_one_member_alone_works(method: str) -> None:
    probs, labels = scored(m=1)

    answers = build(method).fit(probs, labels).predict_proba(probs)

    assert answers.sum(1) == pytest.approx(1, abs=1e-6)
    if method in ("mean", "best", "weighted", "greedy"):
        assert answers == pytest.approx(probs[0], abs=1e-7)


@METHODS
def test_the_seed_decides_and_global_generators_are_untouched(method: str) -> None:
    probs, labels = scored()
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()

    first = build(method, seed=3).fit(probs, labels).predict_proba(probs)

    assert (torch.random.get_rng_state() == torch_state).all()
    assert (np.random.get_state()[1] == numpy_state).all()

    torch.rand(7)
    assert (build(method, seed=3).fit(probs, labels).predict_proba(probs) == first).all()
    if method in NETWORKS:
        assert (build(method, seed=4).fit(probs, labels).predict_proba(probs) != first).any()


@pytest.mark.parametrize("method", [name for name in NAMES if name not in NETWORKS])
def test_the_order_of_the_members_does_not_matter(method: str) -> None:
    probs, labels = scored()

    expected = build(method).fit(probs, labels).predict_proba(probs)

    for order in itertools.permutations(range(3)):
        permuted = probs[list(order)]
        answers = build(method).fit(permuted, labels).predict_proba(permuted)
        assert answers == pytest.approx(expected, abs=1e-4)


@METHODS
def test_inputs_are_never_changed(method: str) -> None:
    probs, labels = scored()
    before = probs.copy()

    build(method).fit(probs, labels).predict_proba(probs)

    assert (probs == before).all()


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
        with pytest.raises(DataError, match=r"logarithms of probabilities.*apply exp"):
            call(np.log(probs))
    with pytest.raises(DataError, match="labels have the wrong shape"):
        ensemble.fit(probs, labels[1:])


@FITTED
def test_other_members_than_in_fit_are_refused(method: str) -> None:
    ensemble = build(method).fit(*scored())

    with pytest.raises(DataError, match="fitted on other members"):
        ensemble.predict_proba(scored(m=2)[0])


def test_pruning_by_hand() -> None:
    # The last row is a tie, which the first class wins.
    probs = np.array([[[0.6, 0.3, 0.1]], [[0.1, 0.5, 0.4]], [[0.2, 0.4, 0.4]]])

    assert PrunedEnsemble().predict_proba(probs) == pytest.approx(np.array([[0.6, 0.9, 0.0]]) / 1.5)
    assert PrunedEnsemble(2).predict_proba(probs) == pytest.approx(
        np.array([[0.6, 1.2, 0.8]]) / 2.6
    )
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
        assert answer(ensemble.to_module(), probs) == pytest.approx(
            ensemble.predict_proba(probs), abs=1e-6
        )


@LAW
@given(probs=tied)
def test_a_pruned_member_keeps_only_its_first_largest_value(probs: np.ndarray) -> None:
    first = probs[:1]

    answers = PrunedEnsemble().predict_proba(first)

    assert (answers == np.eye(probs.shape[-1])[first[0].argmax(-1)]).all()
    assert (VoteEnsemble().predict_proba(first) == answers).all()


def test_axes_in_another_order_are_refused_with_advice() -> None:
    probs, labels = scored()

    with pytest.raises(DataError, match=r"axes .* another order; .*transpose\(1, 0, 2\)"):
        MeanEnsemble().fit(probs.transpose(1, 0, 2), labels)
