"""The HTML pages of several labels per image: the report of a run, and of saved predictions.

Figures with an interval come from results.json or the summary; only curves are drawn from answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from threefold.ensembles.multilabel import CrossFitted
from threefold.errors import RunError
from threefold.files import write_bytes
from threefold.predictions.multilabel_results import (
    LabelScore,
    MultilabelPredictionSummary,
    MultilabelResults,
    MultilabelScore,
    MultilabelSummary,
)
from threefold.predictions.run_folder import RunFolder
from threefold.predictions.run_results import MultilabelAnswers
from threefold.report import multilabel_charts as charts
from threefold.report.facts import run_facts
from threefold.report.images import Thumbs, data_uri
from threefold.report.render import render

CURVES = 24
"""Largest number of labels with curves, those of the lowest average precision."""
MISTAKES = 24
"""Largest number of images with wrong labels."""
PREVIEW = 16
"""Largest number of augmented training images on the page."""
_NEEDED = ("recipe.toml", "run.json", "results.json", "chosen.npz")


def write_multilabel_report(folders: Sequence[RunFolder], out: Path | None = None) -> Path:
    """Write one HTML page about a complete run with several labels per image.

    Args:
        folders: one run.
        out: file to write; default `report.html` in the run folder.

    Raises:
        RunError: there are several runs, or the run is incomplete or contradicts itself.
    """
    folder = folders[0]
    if len(folders) > 1:
        raise RunError(
            "a report about several runs is for one label per image",
            got=", ".join(str(f.path) for f in folders),
            fix="write one report for each, and use `threefold compare`",
        )
    path = folder.path
    missing = [name for name in _NEEDED if not (path / name).is_file()]
    if missing:
        raise RunError(
            "the run is not complete",
            where=path,
            expected=", ".join(_NEEDED),
            got=f"no {', no '.join(missing)}",
            fix=f"resume with `{folder.train_command()}`",
        )
    folder.check_recipe()
    results, chosen = folder.multilabel_results, folder.multilabel_chosen
    score = headline_score(results)
    expected = (score.n, len(results.classes))
    if chosen.probs.shape != expected or chosen.targets.shape != expected:
        raise RunError(
            "two files of the run do not belong together",
            where=f"{path / 'chosen.npz'} and results.json",
            expected=expected,
            got=f"probs {chosen.probs.shape}",
            fix=folder.rescoring(path / "chosen.npz"),
        )
    with folder.advising(path / "thumbs.npz"):
        thumbs = Thumbs.read(folder.verify("thumbs.npz"))
    preview = [] if thumbs.preview is None else [data_uri(i) for i in thumbs.preview[:PREVIEW]]
    model = path / "model.onnx"
    view = {
        **_shared_view(results, score, chosen.probs, chosen.targets),
        "mistakes": _mistakes(chosen, results.classes, thumbs),
        "wrong": int((chosen.decided != chosen.targets).any(1).sum()),
        "title": folder.recipe.name,
        "what": "report",
        "notes": results.notes,
        "facts": run_facts(folder),
        "opened": results.test_opened,
        "members": results.members,
        "latency": results.export.latency if results.export is not None else None,
        "model_bytes": model.stat().st_size if model.is_file() else None,
        "toml": (path / "recipe.toml").read_text(encoding="utf-8"),
        "preview": preview,
        "pending": results.pending,
    }
    target = Path(out) if out else path / "report.html"
    folder.write_target(target, render("multilabel.html.j2", str(path), v=view).encode())
    return target


def write_multilabel_page(
    path: Path,
    title: str,
    summary: MultilabelPredictionSummary,
    targets: np.ndarray,
    answer: CrossFitted,
) -> Path:
    """Write one HTML page about saved predictions.

    Args:
        path: the file.
        title: its heading.
        summary: what the verbs print with `--json`.
        targets: (n, k).
        answer: the chosen ensemble's, or that of the best member.
    """
    rows = summary.scores[0].rows
    score = max(summary.scores, key=lambda s: s.mean_average_precision)
    if summary.chosen is not None:
        score = summary.score(summary.chosen, "ensemble", rows) or score
    view = {
        **_shared_view(summary, score, answer.probs, targets),
        "mistakes": [],
        "wrong": 0,
        "title": title,
        "what": {
            "ensemble": "combined predictions",
            "evaluate": "scores of predictions",
            "compare": "comparison of predictions",
        }[summary.kind],
        "notes": summary.warnings,
        "facts": [("read from", ", ".join(summary.source))],
        "opened": None,
        "members": (),
        "latency": None,
        "model_bytes": None,
        "toml": "",
        "preview": [],
        "pending": (),
    }
    write_bytes(Path(path), render("multilabel.html.j2", title, v=view).encode())
    return Path(path)


def _mistakes(
    chosen: MultilabelAnswers, classes: Sequence[str], thumbs: Thumbs
) -> list[dict[str, Any]]:
    """Return the images with wrong labels that the run keeps pictures of, in its order."""
    row_of = {name: row for row, name in enumerate(chosen.ids)}
    mistakes = []
    for name, pixels in list(thumbs.images.items())[:MISTAKES]:
        if name not in row_of:
            continue
        row = row_of[name]
        given, true = chosen.decided[row].astype(bool), chosen.targets[row].astype(bool)
        mistakes.append(
            {
                "id": name,
                "image": data_uri(pixels),
                "missed": _named(classes, chosen.probs[row], true & ~given),
                "extra": _named(classes, chosen.probs[row], given & ~true),
                "right": [
                    name for name, is_right in zip(classes, given & true, strict=True) if is_right
                ],
            }
        )
    return mistakes


def _named(
    classes: Sequence[str], probs: np.ndarray, which: np.ndarray
) -> list[dict[str, str | float]]:
    """Return the names and probabilities of some labels, of which `which` is true."""
    return [{"name": classes[j], "share": float(probs[j])} for j in np.flatnonzero(which).tolist()]


def lowest_first(labels: Sequence[LabelScore]) -> list[int]:
    """Return the places of labels, that of the lowest average precision first, undefined last."""
    return sorted(
        range(len(labels)),
        key=lambda j: (labels[j].average_precision is None, labels[j].average_precision or 0.0),
    )


def headline_score(results: MultilabelResults) -> MultilabelScore:
    """Return the chosen ensemble's score on the test rows, else out of fold.

    Raises:
        RunError: results.json has no such score.
    """
    for rows in ("test", "oof"):
        score = results.score(results.chosen, "ensemble", rows)
        if score is not None:
            return score
    raise RunError("results.json has no score", expected=f"an ensemble named {results.chosen}")


def _shared_view(
    summary: MultilabelSummary, score: MultilabelScore, probs: np.ndarray, targets: np.ndarray
) -> dict[str, Any]:
    """What the page of a run and that of saved predictions have in common."""
    order = lowest_first(summary.per_label)
    labels = [summary.per_label[j] for j in order]
    curves = []
    for j in order[:CURVES]:
        label = summary.per_label[j]
        if label.average_precision is None:
            continue
        column, truth = probs[:, j], targets[:, j]
        point = (label.recall, label.precision)
        curves.append(
            {
                "name": label.name,
                "ranked": charts.precision_recall_curve(label.name, column, truth, point),
                "reliability": charts.reliability(label.name, column, truth, score.level),
            }
        )
    shown = [s for s in summary.scores if s.rows == score.rows]
    ordered = sorted(shown, key=lambda s: (s.kind, -s.mean_average_precision))
    others = sorted(
        (s for s in summary.scores if s.rows != score.rows),
        key=lambda s: (s.kind, -s.mean_average_precision),
    )
    known = [label for label in labels if label.average_precision is not None]
    per_image = targets.sum(1)
    return {
        "score": score,
        "expected": summary.expected,
        "chosen": summary.chosen,
        "reason": summary.chosen_reason,
        "labels": labels,
        "label_of": summary.per_label_of or summary.chosen,
        "curves": curves,
        "more_curves": len(known) - len(curves),
        "dots": charts.score_dots(ordered),
        "label_dots": charts.label_dots(known),
        "scores": ordered,
        "others": others,
        "comparisons": summary.comparisons,
        "optimism": summary.optimism,
        "ledger": summary.ledger,
        "cooccurrence": charts.cooccurrence(targets, summary.classes)
        if 2 <= len(summary.classes) <= charts.MATRIX_LABELS
        else None,
        "per_image": float(per_image.mean()),
        "empty": int((per_image == 0).sum()),
    }
