"""Made-up predictions of several labels per image."""

from __future__ import annotations

import numpy as np

from threefold.predictions import MultilabelPredictions
from threefold.predictions.ledger import FIT, SCORE

LABELS = ("cat", "dog", "tree")


def make_multilabel(
    n: int = 60,
    *,
    signal: tuple[float, ...] = (2.0, 1.0),
    rates: tuple[float, ...] = (0.5, 0.3, 0.2),
    folds: int = 3,
    groups: bool = False,
    seed: int = 0,
    kind: str = "oof",
) -> MultilabelPredictions:
    """Return predictions of one member for each strength of signal: logits of target and noise."""
    random = np.random.default_rng(seed)
    k = len(rates)
    targets = (random.random((n, k)) < rates).astype(np.uint8)
    targets[0], targets[1] = 1, 0  # every label has images with and without it
    noise = random.normal(size=(len(signal), n, k))
    logits = np.array(signal)[:, None, None] * (2.0 * targets - 1) + noise
    fold_of = np.arange(n) % folds
    roles = np.where(fold_of == np.arange(folds)[:, None], SCORE, FIT)
    has_folds = kind == "oof"
    return MultilabelPredictions(
        probs=1 / (1 + np.exp(-logits)),
        targets=targets,
        ids=tuple(f"{kind}/image{i:04d}.png" for i in range(n)),
        classes=LABELS[:k] if k <= len(LABELS) else tuple(f"label{i}" for i in range(k)),
        members=tuple("abcdefgh"[: len(signal)]),
        groups=tuple(f"scene{i // 2}" for i in range(n)) if groups else None,
        kind=kind,
        folds=fold_of if has_folds else None,
        roles=roles if has_folds else None,
    )
