"""Simulated pools of members with known faults, for tests and bench/ensembles.py."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax

KINDS = (
    "equal",
    "dominant",
    "guessers",
    "varied",
    "copies",
    "few",
    "many-classes",
    "miscalibrated",
    "label-noise",
    "experts",
    "swapped",
    "sure-misses",
    "null",
)


def draw_pool(
    kind: str, seed: int, n: int = 1000, test: int = 4000, m: int = 8, k: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Draw rows to fit on and rows to score on.

    Logits are evidence for the right class, less of it on hard rows, plus noise that members share
    and noise of their own.

    Returns:
        probs (m, n, k) float32 and labels (n,) to fit on; probs and labels to score on.
    """
    rng = np.random.default_rng(seed)
    n, k = (100 if kind == "few" else n), (100 if kind == "many-classes" else k)
    rows = n + test
    labels = rng.integers(0, k, rows)
    evidence = np.full(m, 3.8 if k == 100 else 2.6)
    if kind == "dominant":
        evidence[0] = 5
    if kind == "guessers":
        evidence[:2] = 0.3
    if kind == "varied":
        evidence = np.linspace(1.2, 3.4, m)
    hard, shared = rng.normal(0, 1.2, (rows, 1)), 0.8 * rng.normal(size=(rows, k))
    own = rng.normal(size=(m, rows, k))
    if kind == "copies":  # member 1 and its near copies, all weaker than member 0
        own[2:], evidence[1:] = own[1] + 0.05 * own[2:], 2.2
    if kind == "null":  # one member, seen through noise too small to matter: nothing can be gained
        own[1:] = own[0] + 0.05 * own[1:]
    sure = np.eye(k)[labels]
    logits = sure * np.maximum(evidence[:, None, None] + hard, 0) + shared + own
    if kind == "experts":  # each member knows half of the classes better
        for member in logits:
            known = np.isin(labels, rng.permutation(k)[: k // 2])
            member[known] += 1.5 * sure[known]
    temperature = np.exp(rng.normal(0, 0.8, m)) if kind == "miscalibrated" else np.ones(m)
    probs = softmax(1.6 * logits / temperature[:, None, None], -1)
    if kind == "sure-misses":  # one row in twenty of each member is a random class at 0.999
        wild = rng.random((m, rows)) < 0.05
        probs[wild] = 0.999 * np.eye(k)[rng.integers(0, k, int(wild.sum()))] + 0.001 / k
    if kind == "swapped":
        probs[0] = probs[0][:, np.r_[1, 0, 2:k]]
    probs = (probs / probs.sum(-1, keepdims=True)).astype(np.float32)
    noisy_labels = labels.copy()
    if kind == "label-noise":
        flipped = (rng.random(rows) < 0.15) & (np.arange(rows) < n)
        noisy_labels[flipped] = rng.integers(0, k, int(flipped.sum()))
    return probs[:, :n], noisy_labels[:n], probs[:, n:], labels[n:]


def scored(m: int = 3, n: int = 90, k: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Members of different quality: probabilities (m, n, k) float32 and labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = rng.normal(0, 1.5, (m, n, k)) + np.eye(k)[labels] * np.linspace(2, 3, m)[:, None, None]
    return softmax(logits, -1).astype(np.float32), labels


def draw_labels(probs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels (n,) drawn from probabilities (n, k)."""
    above = rng.random((len(probs), 1)) > probs.cumsum(1)
    return np.asarray(above.sum(1).clip(max=probs.shape[1] - 1))


def biased_probs(
    seed: int, n: int, bias: tuple[float, ...] = (1.5, 0.0, -1.5)
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, k) that are off by a bias of each class, and labels (n,)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, len(bias)))
    return softmax(logits + np.array(bias), -1), draw_labels(softmax(logits, -1), rng)
