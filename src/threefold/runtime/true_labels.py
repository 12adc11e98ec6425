"""The right labels of images as people have them: names, numbers, or 0 and 1 for each class."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from threefold.data.sources.npz_file import label_text, label_texts
from threefold.errors import DataError
from threefold.tasks import Task


def true_labels(labels: Iterable[Any], task: Task) -> list[frozenset[str]]:
    """Return the labels of each image as texts, named as `fit` names those it is given.

    Args:
        labels: one name or whole number for each image, in any iterable, (n,) or (n, 1), or zeros
            and ones (n, k), whose columns are numbered; of a multilabel model n lists of labels, or
            zeros and ones (n, k).
        task: of the model.

    Raises:
        DataError: a label is missing, or the labels have another form.
    """
    rows = [
        row.tolist() if isinstance(row, np.ndarray | np.generic) else row
        for row in (np.asarray(labels) if hasattr(labels, "__array__") else labels)
    ]
    lists = [row for row in rows if isinstance(row, list | tuple)]
    if task == "multilabel":
        if rows and all(len(row) > 1 and set(row) <= {0, 1} for row in lists) and lists == rows:
            return [frozenset(str(i) for i, one in enumerate(row) if one) for row in rows]
        wrong = [row for row in rows if isinstance(row, str) or not isinstance(row, Collection)]
        if wrong:
            raise DataError(
                "the model gives any number of labels",
                expected="a list of labels for each image",
                got=f"one {'text' if isinstance(wrong[0], str) else 'value'} for an image",
            )
        return [frozenset(map(str, row)) for row in rows]
    if not lists:
        return [frozenset([label_text(row, f"labels, row {i}")]) for i, row in enumerate(rows)]
    if len(lists) < len(rows) or len(set(map(len, lists))) > 1:
        raise DataError("each image needs one label", got="lists of several lengths")
    return [frozenset([text]) for text in label_texts(np.array(lists), "labels")]
