"""Score model files that give an image any number of labels, on labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from threefold.errors import RecipeError
from threefold.evaluation.multilabel_saved import (
    ScoredAnswers,
    compare_multilabel_rows,
    score_multilabel_rows,
)
from threefold.predictions.multilabel import MultilabelPredictions
from threefold.runtime.labelled_images import Progress, predict_targets
from threefold.runtime.model import KEY, Model
from threefold.runtime.model_file import read_card


def give_labels(paths: Sequence[Path]) -> bool:
    """Whether exported files give an image any number of labels.

    Raises:
        ExportError: a file cannot be opened.
        RecipeError: some do, and others give one class.
    """
    tasks = [read_card(path, KEY).get("task") or "multiclass" for path in paths]
    if len(set(tasks)) > 1:
        several, one = paths[tasks.index("multilabel")], paths[tasks.index("multiclass")]
        raise RecipeError(
            "a file that gives any number of labels and one that gives a class do not go together",
            got=f"{several} and {one}",
        )
    return tasks[:1] == ["multilabel"]


def score_label_models(
    paths: Sequence[Path], data: str | Path, progress: Progress | None = None
) -> ScoredAnswers:
    """Score files at their own thresholds; nothing is fitted.

    Args:
        paths: exported files of the same labels.
        data: a table of images with any number of labels, see `labelled.load_labelled`.
        progress: called after each batch.

    Raises:
        ExportError: a file cannot be opened or cannot answer.
        DataError: the images cannot be read, or have labels that a file does not know.
        RecipeError: the files have different labels.
    """
    rows, decided = _answer(paths, data, progress)
    return score_multilabel_rows(rows, [*map(str, paths), str(data)], decided)


def compare_label_models(
    paths: Sequence[Path], data: str | Path, progress: Progress | None = None
) -> ScoredAnswers:
    """Compare every pair of files; arguments and errors as `score_label_models`.

    Raises:
        DataError: also fewer than two files.
    """
    rows, decided = _answer(paths, data, progress)
    return compare_multilabel_rows(rows, decided, (*map(str, paths), str(data)))


def _answer(
    paths: Sequence[Path], data: str | Path, progress: Progress | None
) -> tuple[MultilabelPredictions, list[np.ndarray]]:
    """Return the files' answers, and the labels uint8 (n, k) that each gives."""
    models = [Model(path) for path in paths]
    rows = predict_targets(models, data, progress)
    decided = []
    for model, probs in zip(models, rows.probs, strict=True):
        assert model.thresholds is not None
        order = [model.classes.index(name) for name in rows.classes]
        decided.append((probs >= model.thresholds[order]).astype(np.uint8))
    return rows, decided
