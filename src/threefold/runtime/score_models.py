"""Score model files on labelled images, as `evaluate` and `compare` score saved predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from threefold.ensembles.conformal import ConformalSets
from threefold.evaluation.compare import compare_predictions
from threefold.evaluation.saved import score_predictions
from threefold.predictions.predictions import Predictions
from threefold.predictions.results_schema import (
    Conformal,
    PredictionSets,
    PredictionSummary,
    UnknownImages,
)
from threefold.runtime.foreign_model import ForeignCard, ForeignModel
from threefold.runtime.labelled_images import ImageClassifier, Progress, predict_labelled
from threefold.runtime.model import Model


def score_models(
    paths: Sequence[Path],
    data: str | Path,
    card: Path | None = None,
    progress: Progress | None = None,
) -> tuple[PredictionSummary, Predictions]:
    """Score model files on labelled images; nothing is fitted.

    Besides what `saved.score_saved` measures: how often the prediction sets of the most accurate
    file contain the right class, and how often it calls these images unknown.

    Args:
        paths: exported files, or with `card` ONNX classifiers of other programs.
        data: labelled images, see `labelled_images.predict_labelled`.
        card: TOML file that says how foreign classifiers want their images.
        progress: called after each batch.

    Returns:
        What `threefold evaluate` prints and shows, and the predictions.

    Raises:
        ExportError: a file cannot be opened or cannot answer.
        DataError: the images cannot be read, or have classes that a file does not know.
        RecipeError: the files have different classes.
    """
    models = open_classifiers(paths, card)
    notes: list[str] = []
    rows = predict_labelled(models, data, progress, notes.append)
    summary = score_predictions(rows, [*map(str, paths), str(data)])
    summary = summary.replace(warnings=(*notes, *summary.warnings))
    best = rows.members.index(summary.per_class_of or rows.members[0])
    model = models[best]
    if isinstance(model, Model) and model.sets:
        summary = summary.replace(conformal=_measure_sets(model, rows, best))
    return summary, rows


def compare_models(
    paths: Sequence[Path],
    data: str | Path,
    card: Path | None = None,
    progress: Progress | None = None,
) -> tuple[PredictionSummary, Predictions]:
    """Compare every pair of model files on labelled images; arguments and errors as `score_models`.

    Raises:
        DataError: also fewer than two files.
    """
    notes: list[str] = []
    rows = predict_labelled(open_classifiers(paths, card), data, progress, notes.append)
    summary, rows = compare_predictions(rows, [*map(str, paths), str(data)])
    return summary.replace(warnings=(*notes, *summary.warnings)), rows


def open_classifiers(paths: Sequence[Path], card: Path | None) -> list[ImageClassifier]:
    """Open model files: exported ones, or with a card foreign ones."""
    if card is None:
        return [Model(path, spin=False) for path in paths]  # threads decode the images
    foreign = ForeignCard.load(card)
    return [ForeignModel(path, foreign) for path in paths]


def _measure_sets(model: Model, rows: Predictions, member: int) -> Conformal:
    """Measure the prediction sets and the unknown threshold of a file on labelled images."""
    # The file's classes are those of the predictions, in the order of the first file.
    order = [rows.classes.index(name) for name in model.classes]
    probs = rows.probs[member][:, order]
    labels = np.argsort(order)[rows.labels]
    sets = [_measure_set(kind, probs, labels, rows.groups) for kind in model.sets.values()]
    unknown = None
    if model.unknown is not None:
        rejection = model.unknown.measure(probs, rows.groups)
        unknown = UnknownImages(
            state=model.unknown.state(),
            rate=float(model.card["unknown"].get("rate", 0.05)),
            measured=rejection.rate,
            interval=rejection.interval,
            n=rejection.n,
            rows=rows.kind,
        )
    return Conformal(alpha=next(iter(model.sets.values())).alpha, sets=tuple(sets), unknown=unknown)


def _measure_set(
    kind: ConformalSets, probs: np.ndarray, labels: np.ndarray, groups: Sequence[str] | None
) -> PredictionSets:
    coverage = kind.measure(probs, labels, groups)
    return PredictionSets(
        by_class=kind.by_class, state=kind.state(), rows="foreign", **coverage._asdict()
    )
