"""Finding wrong labels: an ensemble's out-of-fold probabilities against a single model's, on labels flipped on purpose.

    uv run --group dev python bench/label_audit.py [RUN | PREDS.npz] [--flips 0.05] [--seeds 3] [--rows 3000] [--folds 5]

Without a source: logistic regression, random forest and a small perceptron on the packaged Fashion-MNIST images (PCA of the
pixels), trained out-of-fold on the flipped labels, as it would happen. With a run folder or an .npz, its labels are
flipped afterwards: its members were trained on the unflipped labels, so the figures are optimistic; nothing is trained.

Prints how well each ranks the flipped labels (AUROC, average precision, precision among as many as were flipped), by 1 - its
probability of the label, or its margin to the likeliest other class; and precision and recall of `find_suspects`.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline

from threefold.audit import find_suspects
from threefold.datasets import load_data
from threefold.predictions import Predictions
from threefold.recipe import DataSpec

COLUMNS = ("AUROC", "av. precision", "precision at n", "suspects", "precision", "recall")


def flip(labels: np.ndarray, k: int, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which a share has become another class at random, and which those are."""
    flipped = np.zeros(len(labels), bool)
    flipped[rng.choice(len(labels), round(share * len(labels)), replace=False)] = True
    moved = (labels + rng.integers(1, k, len(labels))) % k
    return np.where(flipped, moved, labels), flipped


def trained(share: float, seeds: int, rows: int, folds: int) -> Iterator[tuple[Predictions, np.ndarray]]:
    """Out-of-fold predictions of three small models that were trained on flipped labels."""
    train = load_data(DataSpec(source="demo"), 0).train
    pixels = np.asarray(train.images).reshape(len(train), -1) / 255.0
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        pick = np.sort(rng.permutation(len(train))[:rows])
        x, (labels, flipped) = pixels[pick], flip(train.labels[pick], len(train.classes), share, rng)
        models = {
            "logistic": LogisticRegression(C=0.1, max_iter=300),
            "forest": RandomForestClassifier(100, random_state=seed),
            "perceptron": MLPClassifier((100,), max_iter=20, random_state=seed),
        }
        probs = np.zeros((len(models), len(x), len(train.classes)))
        for fit, score in StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, labels):
            for m, model in enumerate(models.values()):
                fitted = make_pipeline(PCA(50, random_state=seed), model).fit(x[fit], labels[fit])
                probs[m, score] = fitted.predict_proba(x[score])
        ids = tuple(train.ids[row] for row in pick)
        yield Predictions(probs, labels, ids, train.classes, tuple(models), kind="oof"), flipped


def given(source: Path, share: float, seeds: int) -> Iterator[tuple[Predictions, np.ndarray]]:
    """Saved predictions, with labels flipped afterwards."""
    saved = Predictions.load(source / "oof.npz" if source.is_dir() else source)
    for seed in range(seeds):
        labels, flipped = flip(saved.labels, len(saved.classes), share, np.random.default_rng(seed))
        yield replace(saved, labels=labels), flipped


def judge(predictions: Predictions, score: np.ndarray, flipped: np.ndarray, probs: np.ndarray) -> list[float]:
    """One row of the table; a large score is suspect."""
    first = np.argsort(-score, kind="stable")[: flipped.sum()]
    found = [predictions.ids.index(s.id) for s in find_suspects(predictions, probs=probs)]
    hits = flipped[found].sum()
    return [
        roc_auc_score(flipped, score),
        average_precision_score(flipped, score),
        flipped[first].mean(),
        len(found),
        hits / max(1, len(found)),
        hits / flipped.sum(),
    ]


def scores(probs: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """How suspect each row is (n,): 1 - the probability of the label, and the margin."""
    mine = probs[np.arange(len(labels)), labels]
    others = np.where(np.arange(probs.shape[1]) == labels[:, None], -1, probs).max(1)
    return {"1 - p": 1 - mine, "margin": others - mine}


def main() -> None:
    """Print the table, averaged over seeds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", nargs="?", type=Path)
    parser.add_argument("--flips", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--folds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # models that have not converged
    cases = (
        given(args.source, args.flips, args.seeds)
        if args.source
        else trained(args.flips, args.seeds, args.rows, args.folds)
    )
    table: dict[str, list[list[float]]] = {}
    for predictions, flipped in cases:
        candidates = dict(zip(predictions.members, predictions.probs, strict=True))
        for name, probs in {**candidates, "mean of all": predictions.probs.mean(0)}.items():
            for how, score in scores(probs, predictions.labels).items():
                table.setdefault(f"{name}, {how}", []).append(judge(predictions, score, flipped, probs))
    how = "flipped after training (optimistic)" if args.source else "flipped before training"
    print(f"{len(flipped)} rows, {flipped.sum()} labels {how}, {args.seeds} seeds")
    width = max(map(len, table))
    print(" " * width + "".join(f"{name:>16}" for name in COLUMNS))
    for name, runs in table.items():
        mean = np.mean(runs, 0)
        print(
            f"{name:{width}}"
            + "".join(f"{v:16.1f}" if c == "suspects" else f"{v:16.3f}" for c, v in zip(COLUMNS, mean, strict=True))
        )


if __name__ == "__main__":
    main()
