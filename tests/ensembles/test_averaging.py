"""Weights on the simplex, greedy picks with replacement, the best member."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from support.pools import scored

from threefold.ensembles.averaging import BestEnsemble, GreedyEnsemble, WeightedEnsemble
from threefold.errors import RecipeError

LAW = settings(max_examples=60, deadline=None)


def test_weights_minimise_the_penalised_log_loss() -> None:
    probs, labels = scored(m=2, n=200)
    hits = probs[:, np.arange(200), labels].astype(float)
    grid = np.linspace(0, 1, 2001)
    loss = [-np.log(w * hits[0] + (1 - w) * hits[1]).sum() + 10 * 2 * (w - 0.5) ** 2 for w in grid]

    weights = WeightedEnsemble(ridge=10).fit(probs, labels).weights_

    assert weights[0] == pytest.approx(grid[np.argmin(loss)], abs=2e-3)


def test_weights_stay_near_equal_for_few_rows_and_leave_for_many() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 4000)
    good = softmax(rng.normal(size=(4000, 4)) + 4 * np.eye(4)[labels], -1)
    probs = np.stack([good, rng.dirichlet(np.ones(4), 4000)])  # the second member guesses

    few = WeightedEnsemble().fit(probs[:, :5], labels[:5]).weights_
    many = WeightedEnsemble().fit(probs, labels).weights_
    equal = WeightedEnsemble(ridge=1e6).fit(probs, labels).weights_

    assert few[1] > 0.3
    assert many[1] < 0.03
    assert equal == pytest.approx(0.5, abs=0.01)


@LAW
@given(seed=st.integers(0, 10_000), m=st.integers(1, 6), n=st.integers(1, 60))
def test_weights_are_on_the_simplex_and_beat_equal_ones(seed: int, m: int, n: int) -> None:
    probs, labels = scored(m, n, seed=seed)
    hits = probs[:, np.arange(n), labels].astype(float)

    weights = WeightedEnsemble().fit(probs, labels).weights_

    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    assert np.log(weights @ hits).sum() >= np.log(hits.mean(0)).sum() - 1e-6


def test_greedy_takes_the_best_member_first_then_what_helps_it() -> None:
    labels = np.array([0] * 6 + [1] * 4)
    # The rows that each member misses: the first is best, the others cover the second's misses.
    wrong = [[9], [6, 7], [0, 1]]
    sure = np.where(labels[:, None] == np.arange(2), 0.9, 0.1)
    members = []
    for rows in wrong:
        member = sure.copy()
        member[rows] = member[rows][:, ::-1] * [0.75, 1.25] + [[0.125, -0.125]]
        members.append(member / member.sum(1, keepdims=True))
    probs = np.stack(members)

    single = GreedyEnsemble(max_members=1).fit(probs, labels)
    three = GreedyEnsemble(3).fit(probs, labels)

    assert single.weights_.tolist() == [1, 0, 0]
    assert (three.predict(probs) == labels).all()
    assert three.weights_[0] > 0
    with pytest.raises(RecipeError, match="max_members"):
        GreedyEnsemble(0)


@LAW
@given(seed=st.integers(0, 10_000), size=st.integers(1, 5))
def test_greedy_is_no_worse_than_the_best_member_in_sample(seed: int, size: int) -> None:
    probs, labels = scored(4, 40, seed=seed)

    ensemble = GreedyEnsemble(size).fit(probs, labels)

    assert (ensemble.predict(probs) == labels).mean() >= (probs.argmax(-1) == labels).mean(1).max()
    assert ensemble.weights_.sum() == pytest.approx(1)
    assert (ensemble.weights_ > 0).sum() <= size


@pytest.mark.parametrize("seed", range(10))
def test_more_greedy_picks_are_no_worse_in_sample(seed: int) -> None:
    probs, labels = scored(6, 40, seed=seed)

    accuracies = [
        (GreedyEnsemble(size).fit(probs, labels).predict(probs) == labels).mean()
        for size in range(1, 9)
    ]

    assert accuracies == sorted(accuracies)


def test_greedy_breaks_ties_in_accuracy_by_log_loss() -> None:
    labels = np.array([0, 1, 0, 1])
    unsure = np.where(labels[:, None] == np.arange(2), 0.6, 0.4)
    sure = np.where(labels[:, None] == np.arange(2), 0.9, 0.1)

    ensemble = GreedyEnsemble(3).fit(np.stack([unsure, sure]), labels)

    assert ensemble.weights_.tolist() == [0, 1]


def plain_greedy(probs: np.ndarray, labels: np.ndarray, picks: int) -> np.ndarray:
    """Return the weights of Caruana's plain algorithm, which tries every member on every row."""
    rows = np.arange(len(labels))

    def rank(chosen: list[int]) -> tuple[float, float]:
        mean = probs[chosen].mean(0, dtype=np.float64)
        return float((mean.argmax(-1) == labels).mean()), round(
            float(np.log(mean[rows, labels]).mean()), 12
        )

    chosen: list[int] = []
    best_rank, best = (-1.0, 0.0), chosen
    for _ in range(picks):
        chosen = max(([*chosen, i] for i in range(len(probs))), key=rank)
        if rank(chosen) > best_rank:
            best_rank, best = rank(chosen), chosen
    return np.bincount(best, minlength=len(probs)) / len(best)


@LAW
@given(seed=st.integers(0, 10_000), picks=st.integers(1, 12), m=st.integers(1, 6))
def test_greedy_equals_the_plain_algorithm(seed: int, picks: int, m: int) -> None:
    probs, labels = scored(m, 60, seed=seed)
    sharp = softmax(np.log(probs) * 4, -1).astype(np.float32)  # many rows settled

    ensemble = GreedyEnsemble(picks).fit(sharp, labels)

    assert ensemble.weights_ == pytest.approx(plain_greedy(sharp, labels, picks))


def test_ties_between_classes_go_to_the_first_while_picking() -> None:
    labels = np.array([1, 1, 1, 0])
    unsure, right = np.full((4, 2), 0.5), np.eye(2)[labels] * 0.2 + 0.4
    ones = np.ones(3, int)
    first = [[0.25, 0.75], [0.25, 0.75], [0.75, 0.25]]
    # With the first: right twice, and a tie, which counts as class 0.
    second = [[0.7, 0.3], [0.7, 0.3], [0.25, 0.75]]

    best = BestEnsemble().fit(np.stack([unsure, right]), labels)
    greedy = GreedyEnsemble(2).fit(np.array([first, second]), ones)

    assert best.weights_.tolist() == [0, 1]
    assert greedy.weights_.tolist() == [1, 0]


@LAW
@given(seed=st.integers(0, 10_000), start=st.integers(1, 6))
def test_a_sorted_start_is_no_worse_than_its_best_member(seed: int, start: int) -> None:
    probs, labels = scored(5, 40, seed=seed)

    ensemble = GreedyEnsemble(8, start=start).fit(probs, labels)

    assert (ensemble.predict(probs) == labels).mean() >= (probs.argmax(-1) == labels).mean(1).max()
    assert ensemble.weights_.sum() == pytest.approx(1)


def test_bags_average_picks_from_halves_of_the_members() -> None:
    probs, labels = scored(6, 200)

    single, many = (
        GreedyEnsemble(5, bags=bags, seed=2).fit(probs, labels).weights_ for bags in (1, 30)
    )

    assert (single > 0).sum() <= 3
    assert (many > 0).sum() > 3
    assert many.sum() == pytest.approx(1)
    assert (GreedyEnsemble(5, bags=30, seed=2).fit(probs, labels).weights_ == many).all()
    assert (GreedyEnsemble(5, bags=30, seed=3).fit(probs, labels).weights_ != many).any()


@pytest.mark.parametrize("wrong", [{"max_members": 0}, {"start": 0}, {"bags": -1}])
def test_wrong_options_of_a_greedy_ensemble_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(
        RecipeError,
        match=rf"greedy ensemble cannot be made: {next(iter(wrong))}; expected \d or more",
    ):
        GreedyEnsemble(**wrong)


def test_the_best_member_is_by_accuracy_then_log_loss() -> None:
    labels = np.array([0, 1, 0, 1])
    right, wrong = np.eye(2)[labels], np.eye(2)[1 - labels]
    sharp, soft = 0.9 * right + 0.1 * wrong, 0.6 * right + 0.4 * wrong

    assert BestEnsemble().fit(np.stack([soft, sharp]), labels).weights_.tolist() == [0, 1]

    sharp[0] = sharp[0, ::-1]
    assert BestEnsemble().fit(np.stack([soft, sharp]), labels).weights_.tolist() == [1, 0]
