"""Find flipped labels: the out-of-fold probabilities of an ensemble against those of its members.

    uv run python bench/label_audit.py [RUN | PREDS.npz] [--flips 0.05] [--seeds 3] [--rows 3000]
        [--folds 5] [--small] [--figure docs/label_flips.png]

Without a source, three members are trained out-of-fold on the packaged Fashion-MNIST images with
flipped labels, as would happen with real label errors: logistic regressions on the frozen features
of the three packaged pretrained networks (56 px), or, with --small, logistic regression, random
forest and a small perceptron on PCA of the pixels. With a run folder or an .npz, labels are flipped
afterwards: its members were trained on the unflipped labels, so the figures are optimistic.

Rows are ranked by 1 - the probability of the label, or by the margin to the likeliest other class.
Printed are AUROC, average precision, the share of the n flipped labels among the first n, 2 n and
3 n rows, precision and recall of `find_suspects`, and the mean's average precision minus each
member's (by 1 - p), with a bootstrap interval over images, averaged over the seeds.
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
from sklearn.preprocessing import StandardScaler

from threefold.data.load import load_data
from threefold.evaluation.label_errors import find_suspects
from threefold.predictions.predictions import Predictions
from threefold.recipe.schema import DataSpec
from threefold.training.provenance import commit, hardware

COLUMNS = (
    "AUROC",
    "av. precision",
    "found in n",
    "in 2 n",
    "in 3 n",
    "suspects",
    "precision",
    "recall",
)

NETWORKS = (
    "tf_efficientnet_lite0.in1k",
    "tf_efficientnet_lite1.in1k",
    "tf_efficientnet_lite2.in1k",
)

Case = tuple[Predictions, np.ndarray]
"""Out-of-fold predictions with flipped labels, and which labels were flipped (n,)."""


def flip(
    labels: np.ndarray, k: int, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of which a share has become another class at random, and which those are."""
    flipped = np.zeros(len(labels), bool)
    flipped[rng.choice(len(labels), round(share * len(labels)), replace=False)] = True
    moved = (labels + rng.integers(1, k, len(labels))) % k
    return np.where(flipped, moved, labels), flipped


def frozen_features(rows: int) -> list[np.ndarray]:
    """Pooled features (n, c) of the packaged images, from each packaged pretrained network."""
    import torch

    from threefold.models.member import build_member
    from threefold.models.resize import resize_square
    from threefold.recipe.schema import MemberSpec

    data = load_data(DataSpec(source="demo"), 0).train
    features = []
    pixels = torch.from_numpy(np.stack([data.pixels(row) for row in range(min(rows, len(data)))]))
    for name in NETWORKS:
        member = build_member(MemberSpec(name="m", backbone=name, img_size=56), 10).eval()
        batches = []
        with torch.inference_mode():
            for batch in pixels.split(100):
                images = (resize_square(batch, 56, "squash") - member.mean) / member.std
                feature_map = member.backbone.forward_features(images)
                batches.append(member.backbone.forward_head(feature_map, pre_logits=True))
        features.append(torch.cat(batches).numpy())
    return features


def trained_cases(share: float, seeds: int, rows: int, folds: int, small: bool) -> Iterator[Case]:
    """Out-of-fold predictions of three cheap members that were trained on flipped labels."""
    train = load_data(DataSpec(source="demo"), 0).train
    pixels = np.asarray(train.images).reshape(len(train), -1) / 255.0
    features = [] if small else frozen_features(len(train))
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        pick = np.sort(rng.permutation(len(train))[:rows])
        labels, flipped = flip(train.labels[pick], len(train.classes), share, rng)
        members = {
            "logistic": (pixels, LogisticRegression(C=0.1, max_iter=300)),
            "forest": (pixels, RandomForestClassifier(100, random_state=seed)),
            "perceptron": (pixels, MLPClassifier((100,), max_iter=20, random_state=seed)),
        }
        if not small:
            members = {
                f"lite{i}": (x, LogisticRegression(C=0.01, max_iter=200))
                for i, x in enumerate(features)
            }
        probs = np.zeros((len(members), len(pick), len(train.classes)))
        for fit, score in StratifiedKFold(folds, shuffle=True, random_state=seed).split(
            labels, labels
        ):
            for m, (x, model) in enumerate(members.values()):
                reduced = PCA(50 if small else 200, random_state=seed)
                steps = (reduced, model) if small else (StandardScaler(), reduced, model)
                fitted = make_pipeline(*steps).fit(x[pick][fit], labels[fit])
                probs[m, score] = fitted.predict_proba(x[pick][score])
        ids = tuple(train.ids[row] for row in pick)
        yield Predictions(probs, labels, ids, train.classes, tuple(members), kind="oof"), flipped


def saved_cases(source: Path, share: float, seeds: int) -> Iterator[Case]:
    """Saved predictions, with labels flipped afterwards."""
    saved = Predictions.load(source / "oof.npz" if source.is_dir() else source)
    for seed in range(seeds):
        labels, flipped = flip(saved.labels, len(saved.classes), share, np.random.default_rng(seed))
        yield replace(saved, labels=labels), flipped


def judge(
    predictions: Predictions, score: np.ndarray, flipped: np.ndarray, probs: np.ndarray
) -> list[float]:
    """One row of the table; a large score is suspect."""
    n = int(flipped.sum())
    caught = np.cumsum(flipped[np.argsort(-score, kind="stable")]) / n
    suspects = [predictions.ids.index(s.id) for s in find_suspects(predictions, probs=probs)]
    hits = flipped[suspects].sum()
    return [
        roc_auc_score(flipped, score),
        average_precision_score(flipped, score),
        *(caught[times * n - 1] for times in (1, 2, 3)),
        len(suspects),
        hits / max(1, len(suspects)),
        hits / flipped.sum(),
    ]


def scores(probs: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """How suspect each row is (n,): 1 - the probability of the label, and the margin."""
    own = probs[np.arange(len(labels)), labels]
    others = np.where(np.arange(probs.shape[1]) == labels[:, None], -1, probs).max(1)
    return {"1 - p": 1 - own, "margin": others - own}


def gains(cases: list[Case], draws: int = 300) -> dict[str, np.ndarray]:
    """Average precision of the mean minus each member's, by 1 - p, averaged over the seeds.

    Returns:
        Arrays (1 + draws,) by member: the estimate, then the bootstrap draws.
    """
    differences: dict[str, list[np.ndarray]] = {}
    for seed, (predictions, flipped) in enumerate(cases):
        labels, rng = predictions.labels, np.random.default_rng(seed)
        n = len(labels)
        picks = [np.arange(n), *(rng.integers(0, n, n) for _ in range(draws))]
        of_mean = scores(predictions.probs.mean(0), labels)["1 - p"]
        areas = [average_precision_score(flipped[pick], of_mean[pick]) for pick in picks]
        for name, probs in zip(predictions.members, predictions.probs, strict=True):
            of_member = scores(probs, labels)["1 - p"]
            other_areas = [average_precision_score(flipped[p], of_member[p]) for p in picks]
            differences.setdefault(name, []).append(np.array(areas) - other_areas)
    return {name: np.mean(runs, 0) for name, runs in differences.items()}


def figure(cases: list[Case], target: Path) -> None:
    """Draw the share of flipped labels found against the images inspected, most suspect first."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    curves: dict[str, list[np.ndarray]] = {}
    for predictions, flipped in cases:
        table = dict(zip(predictions.members, predictions.probs, strict=True)) | {
            "mean": predictions.probs.mean(0)
        }
        for name, probs in table.items():
            order = np.argsort(-scores(probs, predictions.labels)["1 - p"], kind="stable")
            curves.setdefault(name, []).append(np.cumsum(flipped[order]) / flipped.sum())
    n, rows = int(flipped.sum()), len(flipped)
    middle = {name: 100 * np.mean(runs, 0)[: 2 * n] for name, runs in curves.items()}
    worst = min(middle, key=lambda name: middle[name].mean())
    plot, axes = plt.subplots(figsize=(7.5, 4.6), dpi=130, layout="constrained")
    inspected = np.arange(1, 2 * n + 1)
    for name, curve in middle.items():
        style = (
            {"color": "#1f5fa8", "lw": 2.4} if name == "mean" else {"color": "#b0622b", "lw": 1.2}
        )
        axes.plot(inspected, curve, **style, zorder=3 if name == "mean" else 2)
    axes.plot([0, n, 2 * n], [0, 100, 100], color="#999999", lw=1, ls="--")
    axes.plot([0, 2 * n], [0, 200 * n / rows], color="#999999", lw=1, ls=":")
    at = int(0.8 * n)
    axes.annotate(
        "every image looked at is wrong",
        (0.88 * n, 88),
        (0.06 * n, 88),
        color="#666666",
        fontsize=9,
    )
    axes.text(
        1.45 * n, 200 * n / rows * 0.725 + 2.5, "looking at random", color="#666666", fontsize=9
    )
    arrow = {"arrowstyle": "-", "lw": 0.8}
    axes.annotate(
        "mean of the three members",
        (at, middle["mean"][at - 1]),
        (0.97 * n, 66),
        color="#1f5fa8",
        fontsize=10,
        weight="bold",
        arrowprops=arrow | {"color": "#1f5fa8"},
    )
    axes.annotate(
        "each member alone",
        (at, middle[worst][at - 1]),
        (0.97 * n, 50),
        color="#b0622b",
        fontsize=10,
        arrowprops=arrow | {"color": "#b0622b"},
    )
    axes.set(
        xlim=(0, 2 * n),
        ylim=(0, 103),
        xlabel=f"images looked at, the most suspect first ({rows:,} in all)",
    )
    axes.set_ylabel(f"found of the {n} flipped labels, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eeeeee", zorder=0)
    plot.savefig(target, facecolor="white")
    plt.close(plot)


def main() -> None:
    """Print the table, averaged over seeds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", nargs="?", type=Path)
    parser.add_argument("--flips", type=float, default=0.05)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument(
        "--small", action="store_true", help="members on pixels, without the pretrained networks"
    )
    parser.add_argument(
        "--figure", type=Path, help="where to draw the share found against the images looked at"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # models that have not converged
    cases = list(
        saved_cases(args.source, args.flips, args.seeds)
        if args.source
        else trained_cases(args.flips, args.seeds, args.rows, args.folds, args.small)
    )
    print(f"{hardware()}, commit {commit()}")
    accuracy = np.mean(
        [(p.probs.argmax(-1) == np.where(f, -1, p.labels))[:, ~f].mean(1) for p, f in cases], 0
    )
    named = zip(cases[0][0].members, accuracy, strict=True)
    print(
        "out-of-fold accuracy on labels not flipped: "
        + ", ".join(f"{name} {value:.3f}" for name, value in named)
    )
    table: dict[str, list[list[float]]] = {}
    for predictions, flipped in cases:
        candidates = dict(zip(predictions.members, predictions.probs, strict=True))
        for name, probs in {**candidates, "mean of all": predictions.probs.mean(0)}.items():
            for how, score in scores(probs, predictions.labels).items():
                table.setdefault(f"{name}, {how}", []).append(
                    judge(predictions, score, flipped, probs)
                )
    how = "flipped after training (optimistic)" if args.source else "flipped before training"
    print(f"{len(flipped)} rows, {flipped.sum()} labels {how}, {args.seeds} seeds")
    width = max(map(len, table))
    print(" " * width + "".join(f"{name:>16}" for name in COLUMNS))
    for name, runs in table.items():
        mean = np.mean(runs, 0)
        print(
            f"{name:{width}}"
            + "".join(
                f"{v:16.1f}" if c == "suspects" else f"{v:16.3f}"
                for c, v in zip(COLUMNS, mean, strict=True)
            )
        )
    print(
        "\naverage precision by 1 - p, the mean's minus each member's, "
        "95 % bootstrap interval over images:"
    )
    for name, values in gains(cases).items():
        low, high = np.quantile(values[1:], [0.025, 0.975])
        print(f"{name:{width}}{values[0]:+8.3f} [{low:+.3f}, {high:+.3f}]")
    if args.figure:
        figure(cases, args.figure)


if __name__ == "__main__":
    main()
