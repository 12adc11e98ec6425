"""Run folders as the report reads them, made of plausible numbers; nothing is trained."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from support.summaries import (
    ENSEMBLES,
    FASHION,
    fake_cascade,
    fake_comparisons,
    fake_conformal,
    fake_optimism,
    fake_scores,
)
from threefold.json_files import write_json
from threefold.npz_files import write_arrays
from threefold.predictions.export_schema import ExportReport, Latency
from threefold.predictions.records import VERSION
from threefold.recipe.recipe import Recipe
from threefold.stats import scores as stats

LOOKALIKE = (6, 3, 4, 1, 2, 7, 0, 9, 5, 7)
"""For every garment the one that it is most often taken for."""


def fake_run(
    folder: Path,
    classes: tuple[str, ...] = FASHION,
    *,
    n: int = 1000,
    rows: str = "test",
    protocol: str = "honest",
    export: str = "auto",
    images: bool = True,
    curves: bool = False,
    notes: tuple[str, ...] = (),
) -> Path:
    """Write a run folder without optional sections: three members, folds and stages."""
    rng = np.random.default_rng(0)
    recipe = fake_recipe(folder.name, protocol, export)
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe.dump("made by a test"), encoding="utf-8")
    write_json(
        folder / "run.json",
        {
            "version": VERSION,
            "digest": recipe.digest(),
            "data": "0" * 64,
            "created": "2026-11-20T09:30:00+00:00",
            "versions": {"threefold": "0.1.0", "torch": "2.15.0"},
            "hardware": "AMD EPYC, 2 cores",
            "threads": 2,
            "commit": "abc1234",
            "notes": [],
            "classes": classes,
            "n_train": 3000,
            "n_test": n if rows == "test" else 0,
            "folds": 3,
            "skipped": ["a/broken.png: truncated"],
            "roles": {f"fold{f}": {"fit": 1700, "select": 300, "score": 1000} for f in range(3)},
        },
    )
    for member, top in zip(recipe.members, (0.85, 0.86, 0.875), strict=True):
        for fold in range(3 * curves):
            _write_histories(folder / "jobs" / member.name / f"fold{fold}", recipe, top, rng)
    probs, labels = answers(rng, n, len(classes))
    ids = np.array([f"{rows}/{row:05d}" for row in range(n)])
    write_arrays(folder / "chosen.npz", probs=probs, labels=labels, ids=ids)
    if images:
        pixels = rng.integers(0, 255, (n, 8, 8, 3), dtype=np.uint8)
        write_arrays(folder / "thumbs.npz", images=pixels, ids=ids, preview=pixels[:8])
    write_json(folder / "results.json", _results(recipe, classes, n, rows, notes))
    return folder


def full_run(
    folder: Path,
    classes: tuple[str, ...] = FASHION,
    *,
    n: int = 1000,
    members: int = 3,
    evil: str = "",
) -> Path:
    """Write a run folder with every section; `evil` is added to every text but class names."""
    fake_run(
        folder, classes, n=n, curves=True, images=False, notes=(f"12 images are very dark{evil}",)
    )
    truth = garments()[1] if classes == FASHION and n == 1000 else None
    probs, labels = answers(np.random.default_rng(0), n, len(classes), truth)
    ids = np.array([f"test/{row:05d}.png{evil}" for row in range(n)])
    write_arrays(folder / "chosen.npz", probs=probs, labels=labels, ids=ids)
    write_arrays(folder / "thumbs.npz", **_thumbs(probs, labels, ids))
    tree = _results(fake_recipe(folder.name, "honest", "auto"), classes, n, "test", ())
    names = [
        f"{name}{evil}"
        for name in ("lite0", "lite1", "lite2", *(f"member {i:02d}" for i in range(3, members)))
    ]
    tree["scores"] = [
        s for rows, count in (("test", n), ("oof", 3000)) for s in fake_scores(names, rows, count)
    ]
    figures = stats.per_class(probs, labels, classes)
    tree |= {
        "per_class": [
            {k: c[k] for k in ("class", "n", "recall", "interval", "precision")} for c in figures
        ],
        "chosen_reason": f"the simplest within one standard error of the best (stacked){evil}",
        "comparisons": fake_comparisons(
            [(name, names[2]) for name in ENSEMBLES], tree["scores"][: len(names) + len(ENSEMBLES)]
        ),
        "optimism": fake_optimism(evil),
        "conformal": fake_conformal(n),
        "cascade": fake_cascade(names[:3], n),
        "export": fake_export().as_json(),
        "audit": _audit(classes, evil),
        "ledger": _ledger(evil),
        "test_opened": {"at": "2026-11-24T06:15:30+00:00", "by": "train", "rows": n, "times": 1},
        "calibration": {
            "name": "temperature",
            "reason": f"the least log loss out of fold{evil}",
            "temperature": 1.21,
        },
    }
    write_json(folder / "results.json", tree)
    return folder


def _audit(classes: tuple[str, ...], evil: str) -> dict[str, Any]:
    """Return 40 suspect labels and 25 of 31 pairs of copies."""
    suspects = [
        {
            "id": f"train/{i:05d}.png{evil}",
            "label": classes[i % len(classes)],
            "suggested": classes[(i + 3) % len(classes)],
            "score": 0.002 * (i + 1),
            "reason": f"labelled so; the ensemble that never saw it says otherwise{evil}",
        }
        for i in range(40)
    ]
    pairs = [
        {
            "a": f"train/{i:05d}.png{evil}",
            "b": f"test/{i:05d}.png",
            "distance": 0.001 * i,
            "same_label": i % 4 > 0,
            "same_part": (True, False, None)[i % 3],
        }
        for i in range(25)
    ]
    return {
        "suspects": suspects,
        "n_suspects": 57,
        "file": "suspects.csv",
        "duplicates": {"total": 31, "pairs": pairs},
        "warnings": [f"8 of these pairs are in two folds or splits{evil}"],
        "missing": "",
    }


def _ledger(evil: str) -> list[dict[str, Any]]:
    return [
        {
            "step": f"temperature{evil}",
            "fitted_on": "out-of-fold rows of the other folds",
            "scored": "out-of-fold rows",
            "overlap": 0,
        },
        {
            "step": "choice of the ensemble",
            "fitted_on": "out-of-fold rows",
            "scored": "out-of-fold rows",
            "overlap": 3000,
        },
    ]


def fake_export() -> ExportReport:
    """The report of an exported cascade of three members."""
    latency = Latency(full=17.3, fast=7.1, stages=(4.4, 10.4, 17.3), n=16, threads=0)
    return ExportReport(
        images=64,
        rows="test",
        max_difference=4e-7,
        top1_agreement=1.0,
        changed=0,
        ties=0,
        precision="float32",
        tolerance=1e-4,
        changed_tolerance=0,
        loss_tolerance=0,
        path="model.onnx",
        latency=latency,
    )


def fake_recipe(name: str, protocol: str, export: str) -> Recipe:
    """Three members, three stages."""
    members = [
        {"name": f"lite{i}", "backbone": f"tf_efficientnet_lite{i}", "img_size": 64}
        for i in range(3)
    ]
    stages = [{"name": f"lr{i}", "epochs": (6, 4, 3)[i - 3], "lr": 10.0**-i} for i in (3, 4, 5)]
    tree = {"name": name, "protocol": protocol, "folds": {"k": 3}, "ensemble": {"export": export}}
    return Recipe.parse({**tree, "members": members, "stages": stages})


def answers(
    rng: np.random.Generator, n: int, k: int, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (n, k) that are right on about nine of ten rows, and labels (n,)."""
    labels = rng.integers(0, k, n) if labels is None else labels
    rival = np.array(LOOKALIKE) if k == len(LOOKALIKE) else (np.arange(k) + k // 2) % k
    logits = rng.normal(0, 1.2, (n, k)) + 6.2 * np.eye(k)[labels] + 4.1 * np.eye(k)[rival[labels]]
    probs = np.exp(logits)
    return (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32), labels


@functools.cache
def garments() -> tuple[np.ndarray, np.ndarray]:
    """The demo's test images as a run keeps them, (1000, 96, 96, 3), and their labels."""
    with np.load(
        str(resources.files("threefold") / "assets" / "fashion_mnist" / "data.npz"),
        allow_pickle=False,
    ) as file:
        small, labels = file["test_images"], file["test_labels"].astype(np.int64)
    large = [
        Image.fromarray(image).resize((96, 96), Image.Resampling.BILINEAR).convert("RGB")
        for image in small
    ]
    return np.stack([np.asarray(image) for image in large]), labels


def _thumbs(probs: np.ndarray, labels: np.ndarray, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Pictures of mistakes with heat (the third has none), of suspects and of confused pairs."""
    images, top = garments()[0], probs.argmax(1)
    wrong = np.flatnonzero(top != labels)
    worst = wrong[np.argsort(-probs[wrong].max(1), kind="stable")][:48]
    grid = np.linspace(-1, 1, 96)
    centres = np.random.default_rng(3).uniform(-0.6, 0.6, (len(worst), 2))
    cams = np.stack(
        [255 * np.exp(-((grid - x) ** 2 + (grid[:, None] - y) ** 2) / 0.2) for x, y in centres]
    ).astype(np.uint8)
    cams[2] = 0
    pairs = wrong[: 12 * 8]
    return {
        "preview": images[:16],
        "ids": ids[worst],
        "images": images[worst % 1000],
        "cams": cams,
        "suspect_ids": np.array([str(i).replace("test", "train") for i in ids[:20]]),
        "suspect_images": images[100:120],
        "pair_ids": ids[pairs],
        "pair_images": images[pairs % 1000],
        "pair_true": labels[pairs],
        "pair_answer": top[pairs],
    }


def _write_histories(folder: Path, recipe: Recipe, top: float, rng: np.random.Generator) -> None:
    reached = 0.1
    for number, stage in enumerate(recipe.stages):
        gains = (1 - np.exp(-np.arange(1, stage.epochs + 1))) * (
            top - reached if number == 0 else 0.012
        )
        accuracy = reached + gains + rng.normal(0, 0.003, stage.epochs)
        kept = number < 2
        best = int(accuracy.argmax())
        epochs = [
            {"epoch": e, "loss": 0.5, "select_accuracy": float(a)} for e, a in enumerate(accuracy)
        ]
        reason = (
            "first stage"
            if number == 0
            else "improved by more than its noise"
            if kept
            else "within its noise"
        )
        outcome = {
            "accepted": kept,
            "best_epoch": best if kept else -1,
            "start_accuracy": reached,
            "reason": reason,
        }
        write_json(folder / stage.name / "history.json", {"epochs": epochs, **outcome})
        reached = float(accuracy[best]) if kept else reached


def _results(
    recipe: Recipe, classes: tuple[str, ...], n: int, rows: str, notes: tuple[str, ...]
) -> dict[str, Any]:
    listed = (
        ("ensemble", "mean", 0.889, "nothing"),
        ("ensemble", "pruned", 0.887, "nothing"),
        ("ensemble", "stacked", 0.891, "oof rows"),
        ("member", "lite0", 0.861, "nothing"),
        ("member", "lite1", 0.868, "nothing"),
        ("member", "lite2", 0.872, "nothing"),
    )
    scores = [
        {
            "name": name,
            "kind": kind,
            "rows": part,
            "n": n if part == rows else 3000,
            "accuracy": accuracy + shift,
            "interval": [accuracy + shift - 0.021, accuracy + shift + 0.018],
            "level": 0.95,
            "log_loss": 1.2 - accuracy,
            "ece": 0.021,
            "protocol": recipe.protocol,
            "fitted_on": "oof rows, cross-fitted"
            if (part, fitted) == ("oof", "oof rows")
            else fitted,
        }
        for part, shift in ((("test", 0.0), ("oof", -0.006)) if rows == "test" else (("oof", 0.0),))
        for kind, name, accuracy, fitted in listed
    ]
    return {
        "version": VERSION,
        "name": recipe.name,
        "digest": recipe.digest(),
        "protocol": recipe.protocol,
        "classes": classes,
        "created": "2026-11-20T10:00:00+00:00",
        "commit": "abc1234",
        "hardware": "AMD EPYC, 2 cores",
        "threads": 2,
        "seconds": {"train": 1270.4, "ensemble": 12.0, "export": 8.0, "report": 2.0},
        "scores": scores,
        "comparisons": [
            {
                "a": "mean",
                "b": "lite2",
                "rows": rows,
                "only_a": 41,
                "only_b": 24,
                "p": 0.046,
                "verdict": "some evidence that mean is better: 41 against 24 images, p = 0.046",
            }
        ],
        "chosen": "mean",
        "chosen_reason": "the simplest within one standard error of the best (stacked)",
        "per_class": [
            {
                "class": name,
                "n": n // len(classes),
                "recall": 0.6 + 0.39 * i / len(classes),
                "interval": [0.55, 0.99],
                "precision": 0.9,
            }
            for i, name in enumerate(classes)
        ],
        "members": [
            {
                "name": m.name,
                "backbone": m.backbone,
                "head": "linear on the pooled features",
                "img_size": 64,
                "parameters": 3_400_000,
                "weights": "pretrained",
            }
            for m in recipe.members
        ],
        "notes": list(notes),
    }
