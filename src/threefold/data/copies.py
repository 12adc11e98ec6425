"""Warnings about images that are equal byte for byte, before any is decoded twice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from threefold.data.same_content import same_digests
from threefold.data.sources.folder import ListedImage
from threefold.errors import shorten
from threefold.names import count_of


def warn_of_copies(items: Sequence[ListedImage], digests: NDArray[np.bytes_]) -> list[str]:
    """Warn about files that are equal byte for byte.

    Args:
        items: the images.
        digests: of their bytes, (n,).
    """
    test_copies: list[str] = []
    contradicting: list[str] = []
    train_copies = 0
    for rows in same_digests(digests):
        copies = [items[row] for row in rows]
        in_test = [item.id for item in copies if item.part == "test"]
        in_train = len(copies) - len(in_test)
        train_copies += max(0, in_train - 1)
        if in_train:
            test_copies += in_test
        if len({item.label for item in copies}) > 1:
            contradicting.append(" = ".join(item.id for item in copies))
    warnings = []
    if test_copies:
        warnings.append(
            count_of(
                len(test_copies), "test image is an exact copy", "test images are exact copies"
            )
            + f" of training images: {shorten(test_copies)}"
        )
    if train_copies:
        warnings.append(
            count_of(
                train_copies, "training image is an exact copy", "training images are exact copies"
            )
            + " of others; only grouped folds keep copies together"
        )
    if contradicting:
        one, many = "image is in several classes as", "images are in several classes as"
        if items[0].labels is not None:
            one, many = "image has different labels in", "images have different labels in"
        what = count_of(len(contradicting), one, many)
        warnings.append(f"{what} exact copies: {shorten(contradicting)}")
    return warnings
