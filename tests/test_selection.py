"""The most accurate few of many members: chosen on fit rows only, and through the same grammar as any ensemble."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from threefold.combiners import MeanEnsemble
from threefold.ensemble import ENSEMBLES, cross_fit
from threefold.errors import RecipeError
from threefold.recipe import EnsembleSpec
from threefold.selection import SelectedEnsemble, build_ensemble, restore
from threefold.stacked import StackedEnsemble


def pool(n: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Six members; numbers 1, 3 and 4 know more than the others."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    skill = np.array([0.5, 3.0, 0.2, 2.5, 2.8, 0.1])
    logits = rng.normal(size=(6, n, 4)) + skill[:, None, None] * np.eye(4)[labels]
    probs = np.exp(logits)
    return (probs / probs.sum(-1, keepdims=True)).astype(np.float32), labels


def test_it_takes_the_most_accurate_and_combines_only_them() -> None:
    probs, labels = pool()
    chosen = SelectedEnsemble(MeanEnsemble(), 3).fit(probs, labels)
    np.testing.assert_array_equal(chosen.chosen_, [1, 3, 4])
    np.testing.assert_array_equal(
        chosen.predict_proba(probs), MeanEnsemble().predict_proba(probs[[1, 3, 4]])
    )


def test_a_member_that_is_good_on_its_own_rows_only_is_not_chosen_there() -> None:
    probs, labels = pool()
    folds = np.arange(len(labels)) % 2
    probs[0] = np.where(
        folds[:, None] == 0, np.eye(4)[labels], 0.25
    )  # a canary: knows the labels of part 0
    crossed = cross_fit(lambda: SelectedEnsemble(MeanEnsemble(), 1), probs, labels, folds)
    held = folds == 0
    assert (
        crossed[held].argmax(1) == labels[held]
    ).mean() < 0.99  # part 0 is answered by what part 1 chose
    best = int((probs.argmax(-1) == labels)[:, ~held].mean(1).argmax())
    assert best != 0
    np.testing.assert_allclose(crossed[held], probs[best][held], atol=1e-7)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n == "stacked-shrunk" else ()) for n in ENSEMBLES],
)
def test_every_method_goes_on_the_selection_and_comes_back(name: str) -> None:
    probs, labels = pool(200)
    spec = EnsembleSpec(top=3, methods=("mean",))
    ensemble = build_ensemble(name, spec, 0).fit(probs, labels)
    expected = ensemble.predict_proba(probs)
    again, names = restore(name, ensemble.state(), list("abcdef"))
    assert names == ["b", "d", "e"]
    np.testing.assert_allclose(again.predict_proba(probs[[1, 3, 4]]), expected, atol=1e-12)
    module = ensemble.to_module()
    answers = module(torch.tensor(probs).transpose(0, 1)).detach().numpy()
    np.testing.assert_allclose(answers, expected, atol=1e-5)


def test_the_recipe_sets_the_stacked_network() -> None:
    spec = EnsembleSpec.model_validate(
        {"stacked": {"hidden": 7, "epochs": 2, "lr": 1e-5, "batch_size": 120}}
    )
    made = build_ensemble("stacked", spec, 5)
    assert isinstance(made, StackedEnsemble)
    assert (made.hidden, made.epochs, made.lr, made.batch_size, made.seed) == (7, 2, 1e-5, 120, 5)
    assert build_ensemble("stacked", EnsembleSpec()).epochs is None  # type: ignore[attr-defined]


def test_no_member_is_no_selection() -> None:
    with pytest.raises(RecipeError, match="a selection has a member"):
        SelectedEnsemble(MeanEnsemble(), 0)
