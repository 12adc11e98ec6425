"""Simulated pairs of equally good classifiers, and pure noise, for tests and for bench/laws.py."""

from __future__ import annotations

import numpy as np
from scipy.stats import binom


def equals(rng: np.random.Generator, n: int, discordant: float) -> tuple[np.ndarray, np.ndarray]:
    """Hits of two equally good classifiers; only one is right on about this share of rows."""
    both, coin, differ = rng.random(n) < 0.8, rng.random(n) < 0.5, rng.random(n) < discordant
    return np.where(differ, coin, both), np.where(differ, ~coin, both)


def grouped_equals(
    rng: np.random.Generator, groups: int, size: int, discordant: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`equals`, where each of a few groups favours one of the two; also the group of each row.

    Nine discordant rows in ten go to the group's favourite. Groups have 1 to 2 * size - 1 rows.
    """
    part = np.repeat(np.arange(groups), rng.integers(1, 2 * size, groups))
    favourite = (rng.random(groups) < 0.5)[part]
    both, differ = rng.random(len(part)) < 0.8, rng.random(len(part)) < discordant
    winner = np.where(rng.random(len(part)) < 0.9, favourite, ~favourite)
    return np.where(differ, winner, both), np.where(differ, ~winner, both), part


def trained(
    rng: np.random.Generator, s: int, n: int, seeds: float, groups: np.ndarray | None = None
) -> np.ndarray:
    """Hits (2, s, n) of two equally good recipes that differ by seed and in their best images."""
    if groups is None:
        taste = rng.normal(0, 0.8, n)
    else:
        taste = rng.normal(0, 0.8, groups.max() + 1)[groups]
    easy, luck = rng.normal(1.6, 1.2, n), rng.normal(0, seeds, (2, s, 1))
    preference = np.array([0.5, -0.5])[:, None, None] * taste
    return np.asarray(easy + preference + luck + rng.normal(0, 1, (2, s, n)) > 0)


def softmaxes(
    rng: np.random.Generator, n: int, k: int = 5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities (n, k) of two equally good classifiers with shared errors, and labels (n,)."""
    labels = rng.integers(0, k, n)
    shared = 2.0 * np.eye(k)[labels] + rng.normal(size=(n, k))
    a = np.exp(shared + rng.normal(0, 0.7, (n, k)))
    b = np.exp(shared + rng.normal(0, 0.7, (n, k)))
    return a / a.sum(1, keepdims=True), b / b.sum(1, keepdims=True), labels


def noise(rng: np.random.Generator, m: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Members (m, n, k) float32 that know nothing of the labels (n,)."""
    labels, answers = rng.integers(0, k, n), rng.integers(0, k, (m, n))
    probs = np.full((m, n, k), 0.5 / k, np.float32)
    np.put_along_axis(probs, answers[..., None], 0.5 + 0.5 / k, -1)
    return probs, labels


def expected_best(m: int, n: int, k: int) -> float:
    """Expected best accuracy of m guessing members on n rows: the mean maximum of binomials / n."""
    return float((1 - binom.cdf(np.arange(n), n, 1 / k) ** m).sum() / n)
