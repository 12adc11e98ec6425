"""Predictions: the members' probabilities for labelled rows, and their provenance.

Training ends here; ensembles, statistics and reports start from here. Files are .npz without
pickle: strings are fixed-width unicode arrays and the provenance is one JSON string. A file from
another program needs only `probs` and `labels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError, shorten
from threefold.predictions.array_files import read_npz
from threefold.predictions.checks import check_labels, check_probs
from threefold.predictions.member_probs import (
    Kind,
    MemberProbs,
    Protocol,
    check_npz,
    default_names,
    file_arguments,
    read_only,
)
from threefold.scratch import converted


@dataclass(frozen=True, eq=False)
class Predictions(MemberProbs):
    """Probabilities of m members for n rows and k classes, with labels and provenance.

    Everything is checked on construction, and the arrays are read-only.

    Attributes:
        probs: (m, n, k) float32, rows sum to 1.
        labels: (n,) int64, class numbers.
        ids: n unique names of the rows.
        classes: k class names.
        members: m unique member names.
        groups: n names of what must stay in one fold (patient, signer), or None.
        protocol: honest = nothing was chosen on these rows; paper = checkpoints were chosen on
            them; taught = a student whose teachers learned from the labels of these rows.
        kind: oof = out-of-fold rows, test = a test split, foreign = of unknown origin.
        folds: (n,) int64, the fold that scored each row, -1 where that does not apply; or None.
        roles: (f, n) int8, how the networks of each fold used each row: a sum of ledger.FIT,
            SELECT, SCORE and TEACH; or None.

    Raises:
        DataError: an argument is wrong, arguments contradict each other, or a row is scored by
            networks that saw it.
    """

    TASK = "multiclass"
    TRUTH = "labels"

    probs: np.ndarray
    labels: np.ndarray
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    members: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    protocol: Protocol = "honest"
    kind: Kind = "foreign"
    folds: np.ndarray | None = None
    roles: np.ndarray | None = None

    def __post_init__(self) -> None:
        probs = converted(check_probs(self.probs, 3), np.float32)
        _, n, k = probs.shape
        self._set("probs", read_only(probs))
        self._set("labels", read_only(check_labels(self.labels, n, k)))
        self._check_shared()

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """Read an .npz file written by `save` or by another program.

        `probs` (m, n, k) or (n, k) and `labels` (n,) are required. Missing names are filled in by
        `default_names`; the default kind is foreign.

        Raises:
            DataError: the file is missing, is not an .npz, needs pickle, or its arrays are wrong.
        """
        path = Path(path)
        check_npz(path, "labels")
        arrays = read_npz(path)
        try:
            arguments = file_arguments(cls, arrays)
            check_probs(arguments["probs"], 3)
            return cls(**arguments)
        except DataError as error:
            raise DataError("the predictions cannot be used", where=path, got=error) from None

    @classmethod
    def from_arrays(
        cls,
        probs: npt.ArrayLike,
        labels: npt.ArrayLike,
        classes: Sequence[Any] | np.ndarray | None = None,
        *,
        axes: str = "mnk",
        members: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
    ) -> Predictions:
        """Make predictions from arrays of any program, with the axes named.

        Args:
            probs: probabilities with the axes that `axes` names.
            labels: (n,), names of classes, or the numbers of their columns.
            classes: k names in the order of the columns, by default 0 to k - 1. Where they are
                numbers, as in scikit-learn's `classes_`, labels are such numbers, too.
            axes: a letter for each axis: m members, n rows, k classes. scikit-learn's programs
                often stack answers as "nmk"; "nk" are those of one member.
            members: m names, by default member0, member1, ...
            ids: n names, by default row0000, row0001, ...
            groups: n names of what belongs together, such as a patient.

        Raises:
            DataError: the axes do not fit the array, or an argument is wrong.
        """
        array = np.asarray(probs)
        letters = axes.lower()
        if sorted(letters) not in (["k", "m", "n"], ["k", "n"]) or len(letters) != array.ndim:
            raise DataError(
                "the axes do not fit the array",
                expected=f'{array.ndim} letters such as "mnk", "nmk" or "nk": m members, n rows, '
                "k classes",
                got=repr(axes),
            )
        if "m" not in letters:
            letters, array = f"m{letters}", array[None]
        array = array.transpose([letters.index(axis) for axis in "mnk"])
        defaults = default_names(*check_probs(array, 3).shape)
        given = {"classes": classes, "members": members, "ids": ids}
        names = {
            name: defaults[name] if value is None else tuple(map(str, value))
            for name, value in given.items()
        }
        # Numbers as classes are values of labels, as classes_ of scikit-learn is.
        are_values = classes is not None and not all(isinstance(name, str) for name in classes)
        return cls(
            probs=array,
            labels=_label_numbers(labels, names["classes"], are_values),
            groups=None if groups is None else tuple(map(str, groups)),
            classes=names["classes"],
            members=names["members"],
            ids=names["ids"],
        )


def _label_numbers(
    labels: npt.ArrayLike, classes: Sequence[str], are_values: bool = False
) -> np.ndarray:
    """Return labels as numbers of columns, where they are classes; others are checked later."""
    array = np.asarray(labels)
    if array.dtype.kind not in "UO" and not are_values:
        return array
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = sorted({str(label) for label in array.ravel()} - set(numbers))
    if unknown:
        raise DataError(
            "labels are no class", expected=shorten(classes), got=shorten(map(repr, unknown))
        )
    return np.array([numbers[str(label)] for label in array.ravel()]).reshape(array.shape)
