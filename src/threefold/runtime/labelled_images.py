"""What model files answer to labelled images, as predictions to evaluate and compare."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from threefold.data.class_names import exported_names
from threefold.data.dataset import ImageDataset
from threefold.data.labelled import load_labelled
from threefold.errors import DataError, RecipeError, shorten
from threefold.files import real_path
from threefold.machine import decoding_threads
from threefold.predictions.multilabel import MultilabelPredictions
from threefold.predictions.predictions import Predictions
from threefold.runtime.batches import ROUND

Progress = Callable[[int, int], object]
"""Called with the number of images answered and of all."""
BATCH: Final = 16
"""Images of one size that a model answers at a time."""
ROUND_PIXELS: Final = 16_000_000
"""Pixels that are decoded before it is the model's turn, where images are large and stay so."""


class ImageClassifier(Protocol):
    """What answers images: an exported file, or a foreign one with a card."""

    path: Path
    classes: tuple[str, ...]

    def fit_canvas(self, pixels: np.ndarray) -> np.ndarray:
        """Resize an image uint8 (h, w, 3) to one size, or return it as it is."""

    def answer(self, images: np.ndarray) -> np.ndarray:
        """Map images of one size, uint8 (b, h, w, 3), to probabilities float32 (b, k)."""


def predict_labelled(
    models: Sequence[ImageClassifier],
    data: str | Path,
    progress: Progress | None = None,
    notify: Callable[[str], object] = lambda note: None,
) -> Predictions:
    """Answer labelled images with one model or several.

    Of images in splits only those of the test split are answered, since a model has probably
    learned from the others.

    Args:
        models: of the same classes, in any order.
        data: a folder of class folders, or of train/ [val/] test/; a CSV or parquet file.
        progress: called with the number of images answered and of all.
        notify: called with a note if images of other splits are left out.

    Returns:
        The models' probabilities, one member for each model, of kind "foreign".

    Raises:
        DataError: the images cannot be read, or have classes that a model does not know.
        RecipeError: the models have different classes, or names that cannot be told apart.
    """
    names = _names([model.path for model in models])
    rows = load_labelled(data, notify=notify)
    labels = _numbers(rows, models[0].classes, data)[rows.labels]
    return Predictions(
        probs=_answer(models, rows, progress),
        labels=labels,
        ids=rows.ids,
        classes=models[0].classes,
        members=names,
        groups=rows.groups,
    )


def predict_targets(
    models: Sequence[ImageClassifier],
    data: str | Path,
    progress: Progress | None = None,
    notify: Callable[[str], object] = lambda note: None,
) -> MultilabelPredictions:
    """As `predict_labelled`, where an image has any number of labels.

    Labels of the models that no image has count as missing from every image.
    """
    names = _names([model.path for model in models])
    rows = load_labelled(data, "multilabel", notify=notify)
    assert rows.targets is not None
    targets = np.zeros((len(rows), len(models[0].classes)), np.uint8)
    targets[:, _numbers(rows, models[0].classes, data)] = rows.targets
    return MultilabelPredictions(
        probs=_answer(models, rows, progress),
        targets=targets,
        ids=rows.ids,
        classes=models[0].classes,
        members=names,
        groups=rows.groups,
    )


def _answer(
    models: Sequence[ImageClassifier], rows: ImageDataset, progress: Progress | None
) -> np.ndarray:
    """Return the models' probabilities (m, n, k), in the order of the first one's classes."""
    classes = models[0].classes
    orders = [_order(model, classes, models[0].path) for model in models]
    probs = np.empty((len(models), len(rows), len(classes)), np.float32)
    for number, (model, order) in enumerate(zip(models, orders, strict=True)):
        done = number * len(rows)
        for begin, batch in _batches(rows, model):
            end = begin + len(batch)
            probs[number, begin:end] = model.answer(batch)[:, order]
            if progress is not None:
                progress(done + end, len(models) * len(rows))
    return probs


def _batches(rows: ImageDataset, model: ImageClassifier) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first row and the pixels of consecutive images of one size."""

    def read(row: int) -> np.ndarray:
        return model.fit_canvas(rows.pixels(row))

    row, count, largest = 0, 1, 1
    with ThreadPoolExecutor(decoding_threads()) as pool:
        while row < len(rows):
            images = [*pool.map(read, range(row, min(row + count, len(rows))))]
            for batch in _equal_shapes(images):
                yield row, np.stack(batch)
                row += len(batch)
            largest = max(largest, *(image.shape[0] * image.shape[1] for image in images))
            count = max(1, min(ROUND, ROUND_PIXELS // largest))


def _equal_shapes(images: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Yield consecutive images of one shape, at most `BATCH` at a time."""
    for _, group in itertools.groupby(images, lambda image: image.shape):
        same = [*group]
        for begin in range(0, len(same), BATCH):
            yield same[begin : begin + BATCH]


def _numbers(rows: ImageDataset, classes: Sequence[str], data: str | Path) -> np.ndarray:
    """Return the model's number of each class of the images, int64."""
    # A file has other names in place of those that could not be written into it.
    written = exported_names(rows.classes)
    number = {name: i for i, name in enumerate(classes)}
    known = [
        number.get(name, number.get(w, -1)) for name, w in zip(rows.classes, written, strict=True)
    ]
    occurs = np.zeros(len(rows.classes), bool)
    if rows.targets is None:
        occurs[rows.labels] = True
    else:
        occurs[:] = True
    unknown = [name for i, name in enumerate(rows.classes) if occurs[i] and known[i] < 0]
    if unknown:
        raise DataError(
            "the images have classes that the model does not know",
            where=data,
            expected=shorten(classes),
            got=shorten(unknown),
            fix="rename their folders or labels, or leave them out",
        )
    return np.array(known, np.int64)


def _order(model: ImageClassifier, classes: Sequence[str], first: Path) -> list[int]:
    """Return where a model has each of the classes."""
    if set(model.classes) != set(classes):
        different = sorted(set(model.classes) ^ set(classes))
        raise RecipeError(
            "the models have different classes",
            where=model.path,
            expected=f"the classes of {first}",
            got=f"only in one of them: {shorten(different)}",
        )
    return [model.classes.index(name) for name in classes]


def _names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Name each model by its file, or also by its folder where files have one name."""
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [f"{real_path(path).parent.name}/{path.stem}" for path in paths]
    if len(set(names)) < len(names):
        raise RecipeError(
            "the same model twice, or two that cannot be told apart",
            got=shorten(names),
            fix="rename a file or its folder",
        )
    return tuple(names)
