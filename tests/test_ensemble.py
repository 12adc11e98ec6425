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
from pools import draw_pool, scored
from scipy.special import softmax

from threefold import paired, stats
from threefold.combiners import MeanEnsemble
from threefold.ensemble import (
    CANDIDATES,
    ENSEMBLES,
    AutoEnsemble,
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


def test_every_method_of_a_recipe_exists_and_in_the_order_of_simplicity() -> None:
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
    keys = EnsembleSpec.model_json_schema()["properties"]
    assert keys["methods"]["items"]["enum"] == list(ENSEMBLES)
    for name in ("auto", *ENSEMBLES):
        assert EnsembleSpec(export=name).export == name
    assert make_ensemble("stacked", seed=5).seed == 5
    with pytest.raises(
        RecipeError, match=r"no such ensemble method: staked; expected one of stacked$"
    ):
        make_ensemble("staked")
    with pytest.raises(RecipeError, match="expected one of mean, best, vote"):
        make_ensemble("xyz")


def right(rows: int, n: int = 100) -> np.ndarray:
    """Probabilities (n, 2) that are right, for labels 0, on the first `rows`."""
    return np.where((np.arange(n) < rows)[:, None], [0.9, 0.1], [0.1, 0.9])


def test_the_simplest_within_one_standard_error_is_chosen() -> None:
    labels = np.zeros(100, int)
    name, reason = choose({"stacked": right(90), "mean": right(90)}, labels)
    assert name == "mean"
    assert (
        reason == "the best, log loss 0.3251, accuracy 0.9000 cross-fitted; and the simplest"
    )  # the entropy of 0.9
    name, reason = choose({"stacked": right(90), "mean": right(80)}, labels)
    assert name == "stacked"
    assert reason.endswith(
        "accuracy 0.9000 cross-fitted; no simpler method comes within one standard error"
    )
    scattered = right(89)[
        np.random.default_rng(0).permutation(100)
    ]  # one image fewer, but many differ
    name, reason = choose({"stacked": right(90), "vote": scattered, "pruned": right(89)}, labels)
    assert name == "vote"
    assert reason.startswith("log loss 0.346")
    assert "within one standard error (0.0" in reason
    assert reason.endswith("of stacked, 0.3251, and simpler")


def test_log_loss_decides_where_accuracy_is_equal() -> None:
    labels = np.arange(200) % 2
    sure = np.where(labels[:, None] == np.arange(2), 0.9, 0.1)
    sure[:20] = sure[:20, ::-1]
    blunt, sharp = sure.copy(), sure.copy()
    sharp[:20] = 0.5 + (sure[:20] - 0.5) * 0.1  # as often wrong, but unsure there
    assert choose({"mean": blunt, "logistic": sharp}, labels)[0] == "logistic"


def test_no_accuracy_is_paid_for_log_loss() -> None:
    labels = np.zeros(200, int)
    careful = np.where((np.arange(200) < 150)[:, None], [0.99, 0.01], [0.49, 0.51])
    mean = np.where((np.arange(200) < 151)[:, None], [0.9, 0.1], [0.1, 0.9])
    name, reason = choose({"mean": mean, "pool": careful}, labels)
    assert name == "mean"
    assert reason.endswith("and the simplest of those that classify no fewer rows correctly")
    careful[150] = [0.51, 0.49]
    assert choose({"mean": mean, "pool": careful}, labels)[0] == "pool"


@LAW
@given(heat=st.floats(0.2, 5), seed=st.integers(0, 99))
def test_the_choice_does_not_depend_on_calibration(heat: float, seed: int) -> None:
    probs, labels = scored(2, 150, seed=seed)
    table = {"mean": probs[0], "pool": probs[1]}
    warm = {"mean": probs[0], "pool": apply_temperature(probs[1], heat)}
    assert choose(table, labels)[0] == choose(warm, labels)[0]


def test_the_choice_does_not_depend_on_the_order_of_the_candidates() -> None:
    labels = np.zeros(100, int)
    table = {"weighted": right(90), "pruned": right(90), "greedy": right(90), "top2": right(40)}
    assert choose(table, labels)[0] == choose(dict(reversed(table.items())), labels)[0] == "pruned"


def test_a_choice_needs_known_candidates() -> None:
    with pytest.raises(DataError, match="no ensemble to choose from"):
        choose({}, [0])
    with pytest.raises(RecipeError, match="no such ensemble method: median"):
        choose({"median": right(1)}, np.zeros(100, int))


def test_auto_is_the_chosen_candidate_fitted_on_all_rows() -> None:
    probs, labels, new, _ = draw_pool("dominant", 0, n=400, test=200)
    auto = AutoEnsemble().fit(probs, labels)
    crossed = {
        name: cross_fit(lambda name=name: make_ensemble(name), probs, labels) for name in CANDIDATES
    }
    assert (auto.name_, auto.reason_) == choose(crossed, labels)
    assert auto.name_ != "mean"
    raw = make_ensemble(auto.name_).fit(probs, labels).predict_proba(new)
    assert (
        auto.predict_proba(new)
        == apply_temperature(raw, fit_temperature(crossed[auto.name_], labels))
    ).all()
    assert make_ensemble("auto", seed=3).seed == 3


def test_auto_never_chooses_with_rows_it_is_scored_on() -> None:
    """Nested: labels drawn at random cannot be learned, whatever is tried."""
    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet(np.ones(2), (12, 400)), rng.integers(0, 2, 400)
    fitted = (AutoEnsemble().fit(probs, labels).predict(probs) == labels).mean()
    assert abs((cross_fit(AutoEnsemble, probs, labels).argmax(1) == labels).mean() - 0.5) < 0.06
    assert fitted < 0.62


@pytest.mark.parametrize("kind", ["null", "few", "label-noise", "sure-misses", "experts", "copies"])
def test_auto_does_not_lose_to_the_mean(kind: str) -> None:
    """The law at a size that a test can bear; bench/ensembles.py has it at twenty draws."""
    gains = []
    for seed in range(4):
        probs, labels, new, truth = draw_pool(kind, seed, n=300, test=2000)
        right = [
            e.fit(probs, labels).predict(new) == truth for e in (AutoEnsemble(), MeanEnsemble())
        ]
        gains.append(100 * (right[0].mean() - right[1].mean()))
    error = np.std(gains, ddof=1) / 2
    assert np.mean(gains) > -2 * error - 0.3


def test_auto_takes_the_dominant_member_or_as_good() -> None:
    probs, labels, new, truth = draw_pool("dominant", 1, n=500, test=2000)
    auto, best = (
        e.fit(probs, labels).predict(new) == truth for e in (AutoEnsemble(), make_ensemble("best"))
    )
    assert auto.mean() > best.mean() - 0.01
    assert auto.mean() > (MeanEnsemble().predict(new) == truth).mean() + 0.05


def test_auto_says_when_it_chose_on_a_part_of_the_rows() -> None:
    probs, labels = scored(n=200)
    auto = AutoEnsemble(rows=90).fit(probs, labels)
    assert auto.reason_.endswith("; chosen on 67 of 200 rows")
    assert "chosen on" not in AutoEnsemble().fit(probs, labels).reason_
    one = AutoEnsemble().fit(probs[:, :1], labels[:1])
    assert (one.name_, one.reason_) == ("mean", "one row only")
    assert AutoEnsemble(["vote"]).fit(probs, labels).reason_ == "nothing to choose from"


def test_auto_refuses_what_it_cannot_choose_from() -> None:
    for wrong in ([], ["auto"], ["mean", "auto"]):
        with pytest.raises(RecipeError, match="auto cannot choose: candidates"):
            AutoEnsemble(wrong)
    with pytest.raises(RecipeError, match="no such ensemble method: median"):
        AutoEnsemble(["median"])
    with pytest.raises(RecipeError, match="auto cannot choose: rows"):
        AutoEnsemble(rows=1)
    for state in (
        {"method": np.frombuffer(b"median", np.uint8)},
        {"method": np.array([255], np.uint8)},
    ):
        with pytest.raises(DataError, match="not the state of an AutoEnsemble"):
            AutoEnsemble.from_state(state)


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
        assert TemperatureModule(temperature)(torch.tensor(probs)).numpy() == pytest.approx(
            found, abs=1e-6
        )


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
    exported = torch.export.export(
        TemperatureModule(2.0), (probs,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    assert torch.allclose(exported.module()(probs[:2]), probs[:2])


@pytest.mark.parametrize("temperature", [0, -1, np.nan])
def test_a_temperature_is_positive(temperature: float) -> None:
    for use in (
        lambda: apply_temperature(right(1), temperature),
        lambda: TemperatureModule(temperature),
    ):
        with pytest.raises(DataError, match="above 0"):
            use()


def test_the_array_half_starts_without_torch() -> None:
    code = (
        "import sys, numpy as np, threefold.predictions, threefold.stats, threefold.ensemble as e;"
        "p = np.full((2, 10, 2), .5); y = np.arange(10) % 2;"
        "[e.make_ensemble(n).fit(p, y).predict(p) for n in (*e.CANDIDATES, 'vote', 'top2', 'auto')];"
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
    ("method", "right"), [("mean", 9592), ("pruned", 9591), ("vote", 9590), ("top2", 9592)]
)
def test_the_papers_fashion_mnist_ensembles(authors: Predictions, method: str, right: int) -> None:
    """Table 4: AVG 0.9592, EXT 0.9591 from the authors' own three softmaxes."""
    mixed = authors.select([name for name in authors.members if "_Mixed_" in name])
    assert len(mixed.members) == 3
    assert (
        stats.correct(make_ensemble(method).predict_proba(mixed.probs), mixed.labels).sum() == right
    )


def test_the_papers_ensemble_beats_its_best_member_and_its_heads_do_not_differ(
    authors: Predictions,
) -> None:
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
    assert found == pytest.approx((141, 140, 1.0))
    sentence = paired.verdict("LRG299", "GRU", *found)
    assert sentence == "no evidence of a difference: 141 against 140 images, p = 1.00"
