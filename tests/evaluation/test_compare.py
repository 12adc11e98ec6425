"""Runs, members and files side by side: the same rows, exact counts, Holm's correction, seeds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.paths import AUTHORS_PREDICTIONS
from support.saved_models import model, save

from threefold.errors import DataError, ThreefoldError
from threefold.evaluation.compare import compare_saved
from threefold.predictions.predictions import Predictions
from threefold.stats.paired_tests import holm, mcnemar_exact
from threefold.training.run import Run


def test_every_pair_with_counts_interval_and_holm(tmp_path: Path) -> None:
    parts = {
        "a": model(right=0.9, seed=1),
        "b": model(right=0.7, seed=2),
        "c": model(right=0.71, seed=3),
    }
    hits = [part.probs[0].argmax(1) == part.labels for part in parts.values()]

    tests = [mcnemar_exact(hits[i], hits[j]) for i, j in ((0, 1), (0, 2), (1, 2))]

    summary, rows = compare_saved(save(tmp_path, **parts))

    assert [(p.a, p.b) for p in summary.comparisons] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [(p.only_a, p.only_b) for p in summary.comparisons] == [
        (t.only_a, t.only_b) for t in tests
    ]
    np.testing.assert_allclose([p.p for p in summary.comparisons], holm([t.p for t in tests]))
    for pair, (i, j) in zip(summary.comparisons, ((0, 1), (0, 2), (1, 2)), strict=True):
        assert pair.difference == pytest.approx(hits[i].mean() - hits[j].mean())
        assert pair.interval[0] <= pair.difference <= pair.interval[1]
    assert summary.comparisons[0].verdict.startswith("a is better than b: ")
    assert summary.comparisons[2].verdict.startswith("no evidence of a difference: ")
    assert summary.cochran_q["df"] == 2
    assert rows.members == ("a/net", "b/net", "c/net")


def test_rows_are_matched_by_id_and_missing_ones_are_an_error(tmp_path: Path) -> None:
    a, b = model(seed=1), model(seed=2)
    order = np.random.default_rng(0).permutation(300)

    straight, _ = compare_saved(save(tmp_path, a=a, b=b))
    mixed, _ = compare_saved(save(tmp_path, a=a, b=b.rows(order)))

    assert mixed.comparisons == straight.comparisons

    files = save(tmp_path, a=a, b=b.rows(np.arange(290)))
    with pytest.raises(DataError, match="10"):
        compare_saved(files)

    shared, _ = compare_saved(files, shared=True)
    assert shared.n == 290
    assert any("10 rows" in line for line in shared.warnings)


def test_seeds_of_one_recipe_are_one_contender(tmp_path: Path) -> None:
    seeds_x = {f"x{s}": model(right=0.9, seed=10 * s) for s in range(3)}
    seeds_y = {f"y{s}": model(right=0.7, seed=10 * s + 1) for s in range(3)}
    x, y = ",".join(save(tmp_path, **seeds_x)), ",".join(save(tmp_path, **seeds_y))

    summary, _ = compare_saved([x, y])

    pair = summary.comparisons[0]
    assert len(pair.seeds) == 3
    assert pair.difference == pytest.approx(np.mean(pair.seeds))
    assert "x0 (3 seeds) is better than y0 (3 seeds)" in pair.verdict
    assert len(summary.scores[0].seeds) == 3
    with pytest.raises(DataError, match="seeds are paired"):
        compare_saved([x, y.rsplit(",", 1)[0]])


def test_groups_make_the_test_one_of_groups(tmp_path: Path) -> None:
    groups = tuple(f"g{i % 4}" for i in range(300))

    summary, _ = compare_saved(
        save(
            tmp_path,
            a=model(right=0.9, seed=1, groups=groups),
            b=model(right=0.6, seed=2, groups=groups),
        )
    )

    assert summary.comparisons[0].p == pytest.approx(0.125)  # four groups cannot give less
    assert "groups" in summary.comparisons[0].verdict


def test_a_file_stands_for_its_members(tmp_path: Path) -> None:
    first = model(seed=1)
    probs = np.concatenate([first.probs, model(seed=2).probs])
    replace(first, probs=probs, members=("one", "two")).save(tmp_path / "both.npz")
    path = str(tmp_path / "both.npz")

    everyone, _ = compare_saved([path])
    named, _ = compare_saved([f"{path}:two", f"{path}:one"])

    assert [s.name for s in everyone.scores] == ["one", "two"]
    assert [s.name for s in named.scores] == ["both:two", "both:one"]
    with pytest.raises(
        DataError,
        match=r"has several members: .*both.npz; expected one, for example .*both.npz:one",
    ):
        compare_saved([path, path])


def test_a_run_stands_for_its_ensemble(finished: Run) -> None:
    single, rows = compare_saved([str(finished.dir)])
    pair, _ = compare_saved([str(finished.dir), f"{finished.dir}:plain"])

    assert [s.name for s in single.scores][1:] == ["plain", "gated"]
    assert rows.kind == "test"
    assert pair.scores[0].accuracy == finished.results.expected.accuracy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: [str(f / "none.npz"), str(f / "a.npz")], "none.npz"),
        (lambda f: [str(f / "a.npz")], "expected 2 to 20 contenders, got 1"),
        (lambda f: [str(f / "a.npz"), str(f / "a.npz")], "two contenders have the same name"),
        (
            lambda f: [str(f / "a.npz"), f"{f / 'b.npz'}:nett"],
            "no such member: nett; expected one of net",
        ),
        (lambda f: [",", str(f / "a.npz")], "a contender has no path"),
        (lambda f: [str(f / "a.npz"), str(f / "other.npz")], "class"),
        (lambda f: [str(f / "a.npz"), str(f)], "results.json"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line(
    tmp_path: Path, make: object, message: str
) -> None:
    save(tmp_path, a=model(seed=1), b=model(seed=2), other=model(seed=3, classes=("a", "b", "x")))

    with pytest.raises(ThreefoldError, match=message) as error:
        compare_saved(make(tmp_path))  # type: ignore[operator]

    assert "\n" not in str(error.value)


def test_the_mean_of_members_is_a_contender(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), (3, 60))
    rows = Predictions(
        probs=probs,
        labels=rng.integers(0, 4, 60),
        ids=tuple(map(str, range(60))),
        classes=tuple("abcd"),
        members=("x", "y", "p+q"),
        kind="foreign",
    )
    rows.save(tmp_path / "all.npz")

    summary, compared = compare_saved([f"{tmp_path}/all.npz:x+y", f"{tmp_path}/all.npz:p+q"])

    np.testing.assert_allclose(compared.probs, [rows.probs[:2].mean(0), rows.probs[2]], atol=1e-7)
    assert [score.name for score in summary.scores] == ["all:x+y", "all:p+q"]
    with pytest.raises(DataError, match="no such member"):
        compare_saved([f"{tmp_path}/all.npz:x+z", f"{tmp_path}/all.npz:x"])


@pytest.mark.skipif(
    not AUTHORS_PREDICTIONS.exists(), reason="the authors' predictions are not at hand"
)
def test_the_authors_heads_do_not_differ() -> None:
    names = [str(n) for n in np.load(AUTHORS_PREDICTIONS, allow_pickle=False)["members"]]
    gru = next(n for n in names if "GRU" in n)
    std = next(n for n in names if "LRG299" in n and "SERes" in n and "GRU" not in n)

    summary, _ = compare_saved([f"{AUTHORS_PREDICTIONS}:{std}", f"{AUTHORS_PREDICTIONS}:{gru}"])

    pair = summary.comparisons[0]
    assert {pair.only_a, pair.only_b} == {141, 140}
    assert "no evidence of a difference: 141 against 140 images" in pair.verdict
