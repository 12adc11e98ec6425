"""Check level and power of the tests, and what a choice among pure noise looks like.

    uv run python bench/laws.py null  [--pairs 1000] [--rows 300]
    uv run python bench/laws.py power [--pairs 2000]
    uv run python bench/laws.py noise [--pairs 50] [--rows 500]
    uv run python bench/laws.py cascade [--pairs 200] [--rows 1000]

null: how often each test at the 5 % level rejects for two equally good classifiers, with Wilson's
95 % interval of that rate. Tests that ignore groups, or see one seed only, are included to show how
they fail.
power: how often the exact McNemar test detects a true difference, at multiples of `required_rows`.
noise: accuracy of the best of M guessing members, chosen on the scored rows and cross-fitted.
cascade: how often three members that stop early disagree with all three more often than allowed, on
40,000 rows of 4,000 groups, with thresholds from rows of whole groups. At most 5 % of draws may.
The cost is the share of the members that run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.nulls import equals, expected_best, grouped_equals, noise, softmaxes, trained

from threefold.ensembles.cascade import Cascade
from threefold.ensembles.cross_fit import cross_fit
from threefold.ensembles.registry import make_ensemble
from threefold.stats.paired_differences import Difference, paired_bootstrap, score_difference
from threefold.stats.paired_tests import (
    SeedsDifference,
    cochran_q,
    mcnemar_exact,
    seeds_difference,
)
from threefold.stats.sample_size import required_rows
from threefold.stats.scores import wilson_interval
from threefold.training.provenance import commit, hardware

Rng = np.random.Generator


def excludes(difference: Difference | SeedsDifference) -> bool:
    """Whether the interval excludes a difference of 0."""
    return not difference.low <= 0 <= difference.high


def null_tests(rows: int) -> dict[tuple[str, ...], Callable[[Rng], list[bool]]]:
    """Map names of tests to a function that draws two equals and returns each test's rejection."""

    def by_row(rng: Rng) -> list[bool]:
        a, b = equals(rng, rows, 0.2)
        return [
            mcnemar_exact(a, b).p <= 0.05,
            mcnemar_exact(a, b, mid_p=True).p <= 0.05,
            excludes(paired_bootstrap(a, b)),
        ]

    def by_group(rng: Rng) -> list[bool]:
        a, b, part = grouped_equals(rng, max(2, rows // 8), 8, 0.2)
        return [
            mcnemar_exact(a, b, part).p <= 0.05,
            mcnemar_exact(a, b, part, mid_p=True).p <= 0.05,
            excludes(paired_bootstrap(a, b, part)),
            mcnemar_exact(a, b).p <= 0.05,
        ]

    def by_seed(rng: Rng) -> list[bool]:
        a, b = trained(rng, 4, rows, 0.3)
        return [seeds_difference(a, b).p <= 0.05, mcnemar_exact(a[0], b[0]).p <= 0.05]

    def of_loss(rng: Rng) -> list[bool]:
        a, b, labels = softmaxes(rng, rows)
        return [excludes(score_difference("log_loss", a, b, labels))]

    def several(rng: Rng) -> list[bool]:
        easy = rng.random(rows) < 0.7
        return [cochran_q(np.where(easy, True, rng.random((5, rows)) < 0.5)).p <= 0.05]

    return {
        ("McNemar, exact", "McNemar, mid-p", "paired bootstrap, accuracy"): by_row,
        (
            "McNemar by groups, exact",
            "McNemar by groups, mid-p",
            "paired bootstrap by groups",
            "  McNemar, groups ignored",
        ): by_group,
        ("four seeds, crossed", "  McNemar of the first seeds"): by_seed,
        ("paired bootstrap, log loss",): of_loss,
        ("Cochran's Q, five classifiers",): several,
    }


def null(args: argparse.Namespace) -> None:
    """Print how often each test rejects for two equals."""
    print(
        f"{args.pairs} pairs of equals, {args.rows} rows each "
        f"(groups of 1 to 15, {args.rows // 8} of them)"
    )
    print(f"{'test at 5 %':34}{'false alarms':>13}{'95 % interval':>20}")
    for number, (names, draw) in enumerate(null_tests(args.rows).items()):
        rng = np.random.default_rng(number)
        rejections = np.array([draw(rng) for _ in range(args.pairs)])
        for name, alarms in zip(names, rejections.T, strict=True):
            low, high = wilson_interval(int(alarms.sum()), args.pairs)
            print(f"{name:34}{alarms.mean():13.1%}{f'[{low:.1%}, {high:.1%}]':>20}", flush=True)


def power(args: argparse.Namespace) -> None:
    """Print the power of the exact McNemar test against the number of rows."""
    print(
        "exact McNemar, 5 % level; required_rows is for 80 % power of the test in its normal form"
    )
    for discordant, difference in ((0.1, 0.02), (0.05, 0.01), (0.02, 0.01)):
        needed = required_rows(discordant, difference)
        print(f"\n{discordant:.0%} discordant, {difference:.0%} better: required_rows {needed:,}")
        print(f"{'rows':>8}{'power':>8}{'95 % interval':>20}")
        shares = [(discordant + difference) / 2, (discordant - difference) / 2]
        for multiple in (0.25, 0.5, 1, 1.5, 2):
            n, rng = round(needed * multiple), np.random.default_rng(0)
            detected = 0
            for only_a, only_b in rng.multinomial(n, [*shares, 1 - discordant], args.pairs)[:, :2]:
                # Rows on which both agree do not enter the test.
                a = np.arange(only_a + only_b) < only_a
                if len(a) and mcnemar_exact(a, ~a).p <= 0.05:
                    detected += 1
            low, high = wilson_interval(detected, args.pairs)
            print(f"{n:8,}{detected / args.pairs:8.1%}{f'[{low:.1%}, {high:.1%}]':>20}", flush=True)


def choice(args: argparse.Namespace) -> None:
    """Print the accuracy of the best of several guessing members."""
    k = 10
    print(
        f"{args.pairs} pools of guessing members, {args.rows} rows, {k} classes: "
        f"chance is {1 / k:.4f} (s.e. in brackets)"
    )
    print(f"{'members':>8}{'theory':>9}{'best, scored rows':>20}{'best, cross-fitted':>20}", end="")
    print(f"{'greedy, scored rows':>21}{'greedy, cross-fitted':>22}")
    for m in (1, 4, 16, 64, 256):
        rng, accuracies = np.random.default_rng(m), []
        for _ in range(args.pairs):
            probs, labels = noise(rng, m, args.rows, k)
            row = []
            for name in ("best", "greedy") if m <= 16 else ("best",):  # greedy takes minutes beyond
                apparent = make_ensemble(name).fit(probs, labels).predict_proba(probs)
                crossed = cross_fit(lambda name=name: make_ensemble(name), probs, labels)
                row += [(apparent.argmax(1) == labels).mean(), (crossed.argmax(1) == labels).mean()]
            accuracies.append(row)
        middle, error = np.mean(accuracies, 0), np.std(accuracies, 0, ddof=1) / args.pairs**0.5
        cells = [f"{a:.4f} ({e:.4f})" for a, e in zip(middle, error, strict=True)]
        cells += [""] * (4 - len(cells))
        theory = expected_best(m, args.rows, k)
        print(
            f"{m:8}{theory:9.4f}{cells[0]:>20}{cells[1]:>20}{cells[2]:>21}{cells[3]:>22}",
            flush=True,
        )


def grouped_members(
    rng: Rng, groups: int, alike: float, size: int = 10, m: int = 3, k: int = 5
) -> np.ndarray:
    """Members (m, groups * size, k) with shared evidence and own noise, partly equal in a group."""

    def drawn(*lead: int) -> np.ndarray:
        parts = rng.normal(size=(*lead, groups, 1, k)), rng.normal(size=(*lead, groups, size, k))
        return np.asarray(alike**0.5 * parts[0] + (1 - alike) ** 0.5 * parts[1]).reshape(
            *lead, groups * size, k
        )

    probs = np.exp(2 * drawn() + 1.2 * drawn(m))
    return np.asarray(probs / probs.sum(-1, keepdims=True))


def cascade(args: argparse.Namespace) -> None:
    """Print how often a cascade breaks its bound, with groups and without."""
    print(f"{args.pairs} draws of {args.rows} rows, groups of 10, three members")
    print(f"{'alike':>6}{'allowed':>9}{'groups':>9}{'broken':>8}{'95 % interval':>18}{'cost':>8}")
    for alike in (0.0, 0.3, 0.7, 0.95):
        world = grouped_members(np.random.default_rng(0), 4000, alike)
        full = world.mean(0)
        for allowed in (0.01, 0.02):
            for with_groups in (False, True):
                rng, broken, cost = np.random.default_rng(1), 0, 0.0
                for _ in range(args.pairs):
                    picked = rng.choice(4000, args.rows // 10, replace=False)
                    rows = (10 * picked[:, None] + np.arange(10)).ravel()
                    groups = rows // 10 if with_groups else None
                    labels = full[rows].argmax(1)  # labels fit temperatures, which change no class
                    fitted = Cascade([[0], [1], [2]]).fit(
                        world[:, rows], labels, full[rows], allowed, groups
                    )
                    answer = fitted.predict(world, full)
                    broken += bool((answer.probs.argmax(1) != full.argmax(1)).mean() > allowed)
                    cost += answer.stages.mean() / 3 / args.pairs
                low, high = wilson_interval(broken, args.pairs)
                share, span = broken / args.pairs, f"[{low:.1%}, {high:.1%}]"
                print(
                    f"{alike:6}{allowed:9.0%}{'used' if with_groups else 'ignored':>9}"
                    f"{share:8.1%}{span:>18}{cost:8.1%}",
                    flush=True,
                )


def main() -> None:
    """Print one of the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("table", choices=["null", "power", "noise", "cascade"])
    parser.add_argument("--pairs", type=int, default=None)
    parser.add_argument("--rows", type=int, default=None)
    args = parser.parse_args()
    pairs, rows = {
        "null": (1000, 300),
        "power": (2000, 0),
        "noise": (50, 500),
        "cascade": (200, 1000),
    }[args.table]
    args.pairs, args.rows = args.pairs or pairs, args.rows or rows
    print(f"{hardware()}, commit {commit()}")
    {"null": null, "power": power, "noise": choice, "cascade": cascade}[args.table](args)


if __name__ == "__main__":
    main()
