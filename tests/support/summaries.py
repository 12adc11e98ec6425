"""Scores, comparisons and summaries of saved predictions, made of plausible numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import binomtest

from threefold.predictions.results_schema import PredictionSummary
from threefold.stats import paired_tests
from threefold.stats import scores as stats

FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
ENSEMBLES = (
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
)


def fake_tree(
    kind: str, members: int = 5, classes: tuple[str, ...] = FASHION, n: int = 1000, evil: str = ""
) -> dict[str, Any]:
    """What `threefold ensemble|evaluate|compare --json` prints."""
    names = [
        f"{name}{evil}"
        for name in ("efficientnet_b4 STD", *(f"member {i:02d}" for i in range(1, members)))
    ]
    scores = fake_scores(names, "foreign", n)
    if kind != "ensemble":
        scores = [s for s in scores if s["kind"] == "member"]
    matrix = np.abs(np.subtract.outer(np.arange(members), np.arange(members))) * 0.01 + 0.05 * (
        1 - np.eye(members)
    )
    gain = 0.88 + 0.03 * (1 - 1 / np.arange(1, members + 1))
    every = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    pairs = {
        "ensemble": [("mean", names[-1])],
        "evaluate": [(names[0], names[-1])],
        "compare": every,
    }[kind]
    return {
        "kind": kind,
        "source": [f"preds.npz{evil}"],
        "scores": scores,
        "chosen": "mean" if kind == "ensemble" else None,
        "chosen_reason": "the simplest of the best" if kind == "ensemble" else "",
        "comparisons": fake_comparisons(pairs, scores),
        "warnings": [f"no out-of-fold rows{evil}"],
        "per_class": [
            {
                "class": name,
                "n": n // len(classes),
                "recall": 0.7,
                "interval": [0.6, 0.8],
                "precision": None,
            }
            for name in classes
        ],
        "optimism": fake_optimism(evil),
        "diversity": {"members": names, "disagreement": matrix.tolist(), "duplicates": [names[:2]]},
        "size_curve": {
            "mean": gain.tolist(),
            "low": (gain - 0.01).tolist(),
            "high": (gain + 0.01).tolist(),
            "ordered": (gain + 0.005).tolist(),
            "order": names,
        },
    }


def fake_summary(kind: str, **options: Any) -> PredictionSummary:
    """A summary of saved predictions; see `fake_tree` for the options."""
    return PredictionSummary.parse(fake_tree(kind, **options), "fake tree")


def fake_comparisons(
    pairs: list[tuple[str, str]], scores: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """McNemar's tests that agree with the scores; on 5 rows in 100 only one of the two is right."""
    by_name = {s["name"]: s for s in scores}
    counts = []
    for a, b in pairs:
        n, gap = (
            by_name[a]["n"],
            round((by_name[a]["accuracy"] - by_name[b]["accuracy"]) * by_name[a]["n"]),
        )
        both = max(n // 20, abs(gap))
        counts.append(((both + gap) // 2, (both + gap) // 2 - gap))
    ps = paired_tests.holm([float(binomtest(a, a + b).pvalue) if a + b else 1.0 for a, b in counts])
    return [
        {
            "a": a,
            "b": b,
            "only_a": only_a,
            "only_b": only_b,
            "p": float(p),
            "rows": by_name[a]["rows"],
            "verdict": paired_tests.verdict(a, b, only_a, only_b, float(p)),
        }
        for (a, b), (only_a, only_b), p in zip(pairs, counts, ps, strict=True)
    ]


def fake_scores(members: list[str], rows: str, n: int) -> list[dict[str, Any]]:
    """Ensembles, then members, with costs: equal for all ensembles but `best` and `greedy`."""
    rng = np.random.default_rng(len(members))
    macs = [int(4e7 * (1 + 0.6 * i + 0.1 * rng.random())) for i in range(len(members))]
    costs = {"best": macs[-1], "greedy": sum(macs[: len(macs) // 2 + 1])}
    listed = [
        (
            "ensemble",
            name,
            (0.884 if name == "greedy" else 0.872 if name == "best" else 0.889)
            + 0.002 * rng.normal(),
            costs.get(name, sum(macs)),
        )
        for name in ENSEMBLES
    ]
    listed += [
        ("member", name, min(0.885, 0.855 + 0.007 * i) + 0.002 * rng.normal(), macs[i])
        for i, name in enumerate(members)
    ]
    scores = []
    for kind, name, share, cost in listed:
        right = round(share * n)
        fitted = kind == "ensemble" and name not in ("mean", "vote", "pruned", "top2")
        scores.append(
            {
                "name": name,
                "kind": kind,
                "rows": rows,
                "n": n,
                "accuracy": right / n,
                "level": 0.95,
                "interval": list(stats.wilson_interval(right, n)),
                "log_loss": 1.2 - share,
                "ece": 0.021,
                "protocol": "honest",
                "fitted_on": ("oof rows" if rows == "test" else "oof rows, cross-fitted")
                if fitted
                else "calibration only",
                "macs": cost,
                "parameters": cost // 12,
            }
        )
    return scores


def fake_optimism(evil: str = "") -> list[dict[str, Any]]:
    """One entry for every kind of choice."""
    descriptions = {
        "checkpoint": "the epoch with the best accuracy",
        "stage": "which stages are kept",
        "views": "how many views are averaged",
        "member": "the most accurate of three networks",
        "method": "the best of eleven ensembles",
        f"stacked{evil}": "weights of a small network",
    }
    figures = (
        (0.893, 0.874, 0.012),
        (0.881, 0.879, 0.008),
        (0.884, 0.884, 0.006),
        (0.879, 0.875, 0.009),
        (0.894, 0.889, 0.004),
        (0.921, 0.887, 0.007),
    )
    return [
        {
            "choice": choice,
            "description": words + evil,
            "apparent": a,
            "honest": h,
            "difference": a - h,
            "interval": [a - h - half, a - h + half],
            "n": 3000,
            "apparent_rows": "select rows",
            "honest_rows": "score rows",
        }
        for (choice, words), (a, h, half) in zip(descriptions.items(), figures, strict=True)
    ]


def fake_conformal(n: int) -> dict[str, Any]:
    """Sets without and with a threshold per class, and a threshold for unknown images."""
    one = {
        "n": n,
        "coverage": 0.903,
        "interval": [0.883, 0.92],
        "mean_size": 1.18,
        "single": 0.84,
        "rows": "test",
    }
    return {
        "alpha": 0.1,
        "sets": [
            {"by_class": False, "state": {}, **one},
            {"by_class": True, "state": {}, **one, "mean_size": 1.31},
        ],
        "unknown": {
            "state": {},
            "rate": 0.05,
            "measured": 0.047,
            "interval": [0.035, 0.062],
            "n": n,
            "rows": "test",
        },
    }


def fake_cascade(names: list[str], n: int) -> dict[str, Any]:
    """A cascade of three members, measured out-of-fold and on test rows."""
    one = {
        "n": n,
        "accuracy": 0.883,
        "full": 0.884,
        "difference": -0.001,
        "interval": [-0.0035, 0.0013],
        "only_fast": 2,
        "only_full": 3,
        "p": 1.0,
        "disagreement": 0.0062,
        "disagreement_interval": [0.0031, 0.0107],
        "bound": 0.0099,
        "shares": [0.6, 0.25, 0.15],
        "macs": 0.46,
        "rows": "test",
    }
    state = {
        "score": "margin",
        "stages": [[0], [1], [2]],
        "thresholds": [0.71, 2.0],
        "temperatures": [1.3, 1.0],
        "disagreement": 0.005,
        "level": 0.95,
        "n": 3000,
    }
    return {
        "state": state,
        "members": names,
        "costs": [58e6, 79e6, 91e6],
        "measured": [{**one, "n": 3000, "rows": "oof, cross-fitted"}, one],
        "caps": [{**one, "accuracy": 0.851}, {**one, "accuracy": 0.877}],
    }
