"""Predictions of several labels per image: independent probabilities, and targets of 0 and 1.

A file is an .npz as of `Predictions`, with `targets` (n, k) in place of `labels` and the task in
its provenance. A file from another program needs only `probs` and `targets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError
from threefold.predictions.array_files import detect_format, npz_dtypes, read_npz
from threefold.predictions.checks import check_sigmoids, check_targets
from threefold.predictions.member_probs import (
    Kind,
    MemberProbs,
    Protocol,
    check_npz,
    default_names,
    file_arguments,
    read_only,
)
from threefold.predictions.predictions import Predictions


@dataclass(frozen=True, eq=False)
class MultilabelPredictions(MemberProbs):
    """Probabilities of m members for n images and k labels, of which an image has any number.

    Everything is checked on construction, and the arrays are read-only. `ledger`, `parts`,
    `select`, `rows` and `save` are as those of `Predictions`.

    Attributes:
        probs: (m, n, k) float32 in [0, 1], each the probability that the image has the label.
        targets: (n, k) uint8, 1 where the image has the label; a row may be all zeros.
        ids: n unique names of the rows.
        classes: k names of the labels.
        members: m unique member names.
        groups: n names of what must stay in one fold (patient, signer), or None.
        protocol: honest = nothing was chosen on these rows; paper = checkpoints were chosen on
            them; taught = a student whose teachers learned from the targets of these rows.
        kind: oof = out-of-fold rows, test = a test split, foreign = of unknown origin.
        folds: (n,) int64, the fold that scored each row, -1 where that does not apply; or None.
        roles: (f, n) int8, how the networks of each fold used each row: a sum of ledger.FIT,
            SELECT, SCORE and TEACH; or None.

    Raises:
        DataError: an argument is wrong, arguments contradict each other, or a row is scored by
            networks that saw it.
    """

    TASK = "multilabel"
    TRUTH = "targets"

    probs: np.ndarray
    targets: np.ndarray
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    members: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    protocol: Protocol = "honest"
    kind: Kind = "foreign"
    folds: np.ndarray | None = None
    roles: np.ndarray | None = None

    def __post_init__(self) -> None:
        probs = check_sigmoids(self.probs, 3).astype(np.float32, copy=False)
        _, n, k = probs.shape
        self._set("probs", read_only(probs))
        self._set("targets", read_only(check_targets(self.targets, n, k)))
        self._check_shared()

    def member(self, name: str) -> MultilabelPredictions:
        """Return the predictions of one member.

        Raises:
            DataError: the name is unknown.
        """
        return self.select([name])

    @classmethod
    def load(cls, path: str | Path) -> MultilabelPredictions:
        """Read an .npz file written by `save` or by another program.

        `probs` (m, n, k) or (n, k) and `targets` (n, k) are required. Missing names are filled in
        by `default_names`; the default kind is foreign.

        Raises:
            DataError: the file is missing, is not an .npz, needs pickle, is of one label per
                image, or its arrays are wrong.
        """
        path = Path(path)
        check_npz(path, "targets")
        arrays = read_npz(path)
        try:
            arguments = file_arguments(cls, arrays)
            check_sigmoids(arguments["probs"], 3)
            return cls(**arguments)
        except DataError as error:
            raise DataError("the predictions cannot be used", where=path, got=error) from None

    @classmethod
    def from_arrays(
        cls,
        probs: npt.ArrayLike,
        targets: npt.ArrayLike,
        classes: Sequence[str] | None = None,
        *,
        members: Sequence[str] | None = None,
        ids: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
    ) -> MultilabelPredictions:
        """Make predictions from arrays of any program.

        Args:
            probs: (m, n, k), or (n, k) of one member: outputs of a sigmoid.
            targets: (n, k), zeros and ones.
            classes: k names of the labels, by default 0 to k - 1.
            members: m names, by default member0, member1, ...
            ids: n names, by default row0000, row0001, ...
            groups: n names of what belongs together, such as a patient.

        Raises:
            DataError: an argument is wrong.
        """
        array = np.asarray(probs)
        array = check_sigmoids(array[None] if array.ndim == 2 else array, 3)
        given = {"classes": classes, "members": members, "ids": ids}
        names = default_names(*array.shape) | {
            name: tuple(map(str, values)) for name, values in given.items() if values is not None
        }
        return cls(
            probs=array,
            targets=np.asarray(targets),
            groups=None if groups is None else tuple(map(str, groups)),
            ids=names["ids"],
            classes=names["classes"],
            members=names["members"],
        )


AnyPredictions = Predictions | MultilabelPredictions


def is_multilabel_file(path: str | Path) -> bool:
    """Whether a file is an .npz with `targets`, that is, of several labels per image.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = Path(path)
    return detect_format(path) == "npz" and "targets" in npz_dtypes(path)


def load_predictions(path: str | Path) -> AnyPredictions:
    """Read the .npz file of either record: `MultilabelPredictions` if it has `targets`.

    Raises:
        DataError: the file is missing, is not an .npz, or its arrays are wrong.
    """
    if is_multilabel_file(path):
        return MultilabelPredictions.load(path)
    return Predictions.load(path)
