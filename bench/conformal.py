"""Do prediction sets and the unknown threshold keep their promise? 200 resplits of one pool.

    uv run python bench/conformal.py PREDS.npz [--keep Mixed] [--times 200] [--alphas 0.1,0.05,0.02]

PREDS.npz: probs (m, n, k) and labels (n,); the mean over the members whose name contains --keep is
scored. Each resplit fits on one random half and counts hits on the other. Hits follow a
beta-binomial law (Vovk 2012); its central 95 % is the band of that resplit, by class for each class
separately. The law is that of exact sets, which may be empty; sets that are never empty, the
default, cover more if the model is right more often than the level. Last: the cross-fitted figures
of `fit_uncertainty` minus those of the other half.
"""

from __future__ import annotations

import argparse
import math
import sys
from datetime import date
from pathlib import Path

import numpy as np
from scipy.stats import betabinom

from threefold.ensembles.conformal import ConformalSets, UnknownThreshold
from threefold.evaluation.uncertainty import fit_uncertainty
from threefold.predictions.predictions import Predictions
from threefold.training.provenance import commit, hardware


def band(n: int, fresh: int, alpha: float) -> tuple[float, float, float]:
    """Central 95 % and mean of the hits among `fresh` rows with a threshold from n rows."""
    rank = math.ceil((n + 1) * (1 - alpha) - 1e-9)
    if rank > n:
        return fresh, fresh, fresh
    law = betabinom(fresh, rank, n + 1 - rank)
    return (*law.ppf([0.025, 0.975]), law.mean())


def resplit_sets(
    probs: np.ndarray,
    labels: np.ndarray,
    alpha: float,
    times: int,
    by_class: bool,
    never_empty: bool,
) -> dict[str, float]:
    """Mean figures of the sets, and how often the hits lie within, or not below, their band."""
    rng, rows = np.random.default_rng(0), []
    half, k = len(labels) // 2, probs.shape[1]
    for _ in range(times):
        order = rng.permutation(len(labels))
        used, fresh = order[:half], order[half:]
        sets = ConformalSets(by_class=by_class, never_empty=never_empty).fit(
            probs[used], labels[used], alpha
        )
        inside = sets.predict_sets(probs[fresh])
        hits = inside[np.arange(len(fresh)), labels[fresh]]
        parts = [labels == c for c in range(k)] if by_class else [np.ones(len(labels), bool)]
        hits_and_bands = [
            (hits[part[fresh]].sum(), *band(int(part[used].sum()), int(part[fresh].sum()), alpha))
            for part in parts
        ]
        within = np.mean([low <= hit <= high for hit, low, high, _ in hits_and_bands])
        above = np.mean([low <= hit for hit, low, _, _ in hits_and_bands])
        expected = sum(mean for *_, mean in hits_and_bands) / len(fresh)
        rows.append(
            (
                hits.mean(),
                expected,
                within,
                above,
                inside.sum(1).mean(),
                (inside.sum(1) == 1).mean(),
            )
        )
    return dict(
        zip(("coverage", "law", "within", "above", "size", "single"), np.mean(rows, 0), strict=True)
    )


def resplit_unknown(probs: np.ndarray, rate: float, times: int) -> tuple[float, float, float]:
    """Mean share of false rejections, the law's mean, and how often it lies within its band."""
    rng, rows, half = np.random.default_rng(0), [], len(probs) // 2
    for _ in range(times):
        order = rng.permutation(len(probs))
        fresh = probs[order[half:]]
        known = int((~UnknownThreshold().fit(probs[order[:half]], rate).is_unknown(fresh)).sum())
        low, high, mean = band(half, len(fresh), rate)
        rows.append((1 - known / len(fresh), 1 - mean / len(fresh), low <= known <= high))
    rejected, expected, within = np.mean(rows, 0)
    return float(rejected), float(expected), float(within)


def cross_fitted_error(
    probs: np.ndarray, labels: np.ndarray, alpha: float, times: int
) -> np.ndarray:
    """Mean and standard deviation of the cross-fitted figures minus those of the other half.

    The figures (3,) are coverage, coverage of the sets by class, and rejections.
    """
    rng, rows, half = np.random.default_rng(0), [], len(labels) // 2
    for _ in range(times):
        order = rng.permutation(len(labels))
        fitted = fit_uncertainty(probs[order[:half]], labels[order[:half]], alpha=alpha)
        seen = fitted.measure(probs[order[half:]], labels[order[half:]])
        sets = [
            a.coverage - b.coverage for a, b in zip(fitted.coverage, seen.coverage, strict=True)
        ]
        rows.append([*sets, fitted.rejection.rate - seen.rejection.rate])
    return np.stack([np.mean(rows, 0), np.std(rows, 0)])


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("predictions", type=Path)
    parser.add_argument("--keep", default="")
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument(
        "--alphas", type=lambda text: [float(a) for a in text.split(",")], default=[0.1, 0.05, 0.02]
    )
    args = parser.parse_args()
    rows = Predictions.load(args.predictions)
    names = [name for name in rows.members if args.keep in name]
    probs = rows.select(names).probs.mean(0, dtype=np.float64)
    labels, times = rows.labels, args.times
    right = (probs.argmax(1) == labels).mean()
    print(f"mean of {len(names)} members, right on {right:.4f} of {len(labels):,} rows")
    print(f"{times} resplits in halves")
    print(f"{hardware()}, {date.today()}, commit {commit()}")
    head = ("coverage", "law", "in band", "not below", "mean size", "single")
    print(f"{'lac sets':28}{'alpha':>6}" + "".join(f"{name:>11}" for name in head), flush=True)
    for by_class in (False, True):
        for never_empty in (False, True):
            kind = "never empty" if never_empty else "exact"
            name = f"{'by class' if by_class else 'marginal'}, {kind}"
            for alpha in args.alphas:
                figures = resplit_sets(probs, labels, alpha, times, by_class, never_empty)
                print(
                    f"{name:28}{alpha:6}" + "".join(f"{value:11.4f}" for value in figures.values()),
                    flush=True,
                )
    for rate in args.alphas:
        rejected, expected, within = resplit_unknown(probs, rate, times)
        print(
            f"unknown at rate {rate}: {rejected:.4f} of known rows rejected, "
            f"law {expected:.4f}, in band {within:.3f}"
        )
    for alpha in args.alphas:
        mean, spread = cross_fitted_error(probs, labels, alpha, times)
        gaps = ", ".join(f"{m:+.4f} ({s:.4f})" for m, s in zip(mean, spread, strict=True))
        print(f"cross-fitted minus the other half, alpha {alpha}:")
        print(f"  marginal, by class, rejections at 0.05: {gaps}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
