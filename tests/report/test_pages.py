"""The page about saved predictions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_runs import answers
from support.html_page import Page
from support.summaries import FASHION, fake_summary, fake_tree

from threefold.errors import DataError, RunError
from threefold.predictions.results_schema import PredictionSummary
from threefold.report.pages import write_page
from threefold.stats.paired_differences import paired_bootstrap
from threefold.stats.scores import paired_interval

KINDS = ("ensemble", "evaluate", "compare")
HOSTILE = " <script>alert(1)</script> 木漏れ日" + "w" * 90


def arrays(n: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    return answers(np.random.default_rng(1), n, len(FASHION))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_one_sound_file(tmp_path: Path, kind: str) -> None:
    probs, labels = arrays()
    target = tmp_path / "new" / "page.html"

    assert write_page(target, "preds.npz", fake_summary(kind), probs, labels) == target
    page = Page(target)
    page.needs_nothing_else()
    page.is_sound()
    assert target.stat().st_size < 500_000
    assert ("Confusion matrix" in page.source) == (kind != "compare")
    for words in (
        "How members differ",
        "How many members are enough?",
        "How optimistic the choices are",
        "no out-of-fold rows",
    ):
        assert words in page.text


@pytest.mark.usefixtures("no_charts")
def test_ensemble_begins_with_the_chosen(tmp_path: Path) -> None:
    page = Page(write_page(tmp_path / "page.html", "preds.npz", fake_summary("ensemble")))

    assert re.search(
        r"Expect 8\d\.\d % of new images to be right about \d\d of 100 , between", page.text
    )
    assert "It is not known whether the members saw these rows in training" in page.text
    assert "Chosen ensemble mean : the simplest of the best" in page.text
    assert "on these rows" not in page.text


@pytest.mark.usefixtures("no_charts")
def test_evaluate_says_that_the_best_of_several_is_lucky(tmp_path: Path) -> None:
    summary = fake_summary("evaluate")
    page = Page(write_page(tmp_path / "page.html", "preds.npz", summary))
    best = max(summary.scores, key=lambda s: s.accuracy).name

    assert f"This is {best} , the most accurate of 5 on these rows" in page.text
    alone = Page(
        write_page(
            tmp_path / "alone.html",
            "preds.npz",
            PredictionSummary(kind="evaluate", scores=summary.scores[:1]),
        )
    )
    assert "a little luck" not in alone.text
    assert "How members differ" not in alone.text


@pytest.mark.usefixtures("no_charts")
def test_compare_of_two_is_a_verdict(tmp_path: Path) -> None:
    summary = fake_summary("compare", members=2)
    page = Page(write_page(tmp_path / "page.html", "a.npz, b.npz", summary))
    (c,) = summary.comparisons

    assert page.text.count(c.verdict) == 2
    assert f"{c.a} against {c.b}: {c.verdict} The most accurate is" in page.text
    cells = re.search(r'class="paired">.*?<tbody><tr>(.*?)</tr>', page.source, re.S)
    assert cells is not None
    a, b = summary.scores
    row = " ".join(re.sub(r"<[^>]+>", " ", cells[1]).replace("\u00a0", " ").split())
    low, high = paired_interval(c.only_a, c.only_b, 1000, 0.95)
    figures = f"{a.accuracy:.1%} {b.accuracy:.1%}".replace("%", " %")
    gap = f"{100 * (a.accuracy - b.accuracy):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})".replace(
        "-", "−"
    )
    assert figures in row
    assert gap in row
    assert f" {c.only_a} {c.only_b} " in row


@pytest.mark.slow
def test_many_members_stay_readable(tmp_path: Path) -> None:
    target = write_page(
        tmp_path / "page.html", "pool.npz", fake_summary("compare", members=55, n=26000)
    )
    page = Page(target)
    page.is_sound()

    assert target.stat().st_size < 1_000_000
    assert "The chart shows the 40 of 1,485 pairs" in page.text
    assert "The table lists the 300 of 1,485 pairs" in page.text
    assert re.search(r"\d+ of 1,485 pairs differ by more than chance explains", page.text)
    dense = page.source[page.source.index('class="matrix dense"') :]
    assert dense.count('class="wrong"') == 55 * 54


@pytest.mark.usefixtures("no_charts")
def test_given_differences_come_before_those_from_counts(tmp_path: Path) -> None:
    summary = fake_summary("compare", members=2)
    (comparison,) = summary.comparisons
    changed = comparison.replace(difference=0.0123, interval=(-0.2, 0.3), n=77)
    summary = summary.replace(comparisons=(changed,))

    page = Page(write_page(tmp_path / "page.html", "x", summary))

    assert "+1.2 (−20.0 to +30.0)" in page.text


@pytest.mark.parametrize(
    ("only_a", "only_b", "n"), [(41, 24, 1000), (5, 30, 300), (141, 140, 10000), (0, 12, 500)]
)
def test_interval_from_counts_is_that_of_the_bootstrap(only_a: int, only_b: int, n: int) -> None:
    first, second = np.zeros(n, bool), np.zeros(n, bool)
    first[:only_a], second[only_a : only_a + only_b] = True, True

    interval = paired_interval(only_a, only_b, n, 0.95)
    drawn = paired_bootstrap(first, second, resamples=4000)

    width = drawn.high - drawn.low
    np.testing.assert_allclose(interval, drawn[1:], atol=0.12 * width)


def test_interval_from_counts_covers() -> None:
    """95 % of the intervals of 500 draws hold the true difference, within three standard errors."""
    rng = np.random.default_rng(0)
    draws = rng.multinomial(200, (0.1, 0.05, 0.85), 500)
    covered = sum(
        low <= 0.05 <= high
        for low, high in (paired_interval(a, b, 200, 0.95) for a, b, _ in draws.tolist())
    )

    assert abs(covered / 500 - 0.95) < 0.03


@pytest.mark.usefixtures("no_charts")
def test_hostile_names(tmp_path: Path) -> None:
    for kind in KINDS:
        summary = fake_summary(kind, members=3, evil=HOSTILE)
        target = tmp_path / f"{kind}.html"
        page = Page(write_page(target, f"<b>title{HOSTILE}", summary, *arrays()))
        page.needs_nothing_else()
        page.is_sound()
        assert "&lt;script&gt;" in page.source


@pytest.mark.parametrize(
    "drop",
    [
        "comparisons",
        "warnings",
        "per_class",
        "optimism",
        "diversity",
        "size_curve",
        "source",
        "chosen_reason",
    ],
)
@pytest.mark.usefixtures("no_charts")
def test_everything_but_kind_and_scores_may_be_missing(tmp_path: Path, drop: str) -> None:
    for kind in KINDS:
        tree = fake_tree(kind, members=3)
        del tree[drop]
        summary = PredictionSummary.parse(tree, "x")
        Page(write_page(tmp_path / f"{kind}.html", "x", summary)).is_sound()


@pytest.mark.usefixtures("no_charts")
def test_without_class_names_numbers_take_their_place(tmp_path: Path) -> None:
    summary = fake_summary("ensemble", members=3).replace(per_class=())

    assert "class 9" in Page(write_page(tmp_path / "x.html", "x", summary, *arrays())).text


@pytest.mark.usefixtures("no_charts")
def test_paper_protocol_is_stamped(tmp_path: Path) -> None:
    summary = fake_summary("ensemble", members=3)
    scores = tuple(score.replace(protocol="paper") for score in summary.scores)
    page = Page(write_page(tmp_path / "x.html", "x", summary.replace(scores=scores)))

    assert "selected on the scored rows" in page.text
    assert "Expect less on new images." in page.text
    assert "of new images to be right" not in page.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "other"}, "expected kind: 'ensemble', 'evaluate' or 'compare', got 'other'"),
        ({"scores": []}, "there is no score to show"),
        (
            {"scores": [{"name": "x", "kind": "member", "rows": "oof", "n": 3, "accuracy": 1.0}]},
            "lacks a key",
        ),
    ],
)
def test_bad_trees_are_one_line(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    tree = {**fake_tree("ensemble", members=2), **change}

    def write() -> None:
        write_page(tmp_path / "x.html", "x", PredictionSummary.parse(tree, "x"))

    with pytest.raises(RunError, match=words) as caught:
        write()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.html").exists()


def test_probabilities_of_other_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="do not belong together"):
        write_page(tmp_path / "x.html", "x", fake_summary("ensemble", members=2), *arrays(900))
    probs, labels = arrays()

    with pytest.raises(DataError):
        write_page(tmp_path / "x.html", "x", fake_summary("ensemble", members=2), probs * 2, labels)
