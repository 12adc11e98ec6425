"""Suspect labels: rows whose label the ensemble contradicts, by cleanlab's confident learning.

Only reports; no label is changed. The probabilities must come from models that have not seen the
row (Northcutt et al., Confident learning, 2021).
"""

from __future__ import annotations

import csv
import importlib
import io
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError, RunError
from threefold.extras import install_command
from threefold.files import read_text, write_bytes
from threefold.names import count_of, escape_formula, unescape_formula
from threefold.predictions.checks import check_probs
from threefold.predictions.predictions import Predictions
from threefold.predictions.results_schema import Audit, SuspectLabel
from threefold.scratch import row_blocks, scratch

LISTED: Final = 100
"""Suspects and pairs of copies listed in results.json; a CSV file has every suspect."""

_BATCH_VALUES: Final = 1 << 24
"""Probabilities that cleanlab gets at a time."""

MAX_BYTES: Final = 1 << 30
"""Largest CSV file of suspects."""


class Suspect(NamedTuple):
    """A row whose label may be wrong.

    Attributes:
        id: the row's id.
        label: name of the class it is labelled with.
        suggested: name of the class the ensemble predicts.
        score: label quality, the ensemble's probability of the label; low values are suspect.
        reason: an explanation, in words.
    """

    id: str
    label: str
    suggested: str
    score: float
    reason: str


def find_suspects(
    predictions: Predictions, limit: int | None = None, probs: npt.ArrayLike | None = None
) -> list[Suspect]:
    """Find rows whose label is probably wrong, the most suspect first.

    Their number is cleanlab's estimate (prune by noise rate), which tends to be too high for
    classes that are hard to tell apart. They are ordered by the probability of the label, which
    ranked better than the margin (bench/label_audit.py).

    Args:
        predictions: out-of-fold predictions; on training rows every label looks right.
        limit: largest number of suspects to return; None = all.
        probs: (n, k) probabilities of the ensemble; None = the members' mean.

    Raises:
        DataError: `probs` has the wrong shape, or the limit is below 1.
        RunError: cleanlab is not installed.
    """
    _import_cleanlab("filter")
    members = predictions.probs if probs is None else check_probs(probs, 2)[None]
    shape, expected = members.shape[1:], predictions.probs.shape[1:]
    if shape != expected:
        raise DataError("probabilities are of other rows or classes", expected=expected, got=shape)
    if limit is not None and limit < 1:
        raise DataError("the limit is 1 or more", got=limit)
    # cleanlab needs at least one row of every class.
    present, labels = np.unique(predictions.labels, return_inverse=True)
    if len(present) < 2:
        return []
    ensemble, present_probs = scratch(shape), scratch((len(labels), len(present)))
    for rows in row_blocks(len(labels), members[:, 0].size):
        mean = members[:, rows].mean(0, dtype=np.float64)
        mean /= mean.sum(-1, keepdims=True)
        some = np.maximum(mean[:, present], np.finfo(np.float32).tiny)
        ensemble[rows], present_probs[rows] = mean, some / some.sum(-1, keepdims=True)
    flagged = _find_issues(labels, present_probs)
    del present_probs
    quality = ensemble[np.arange(len(labels)), predictions.labels]
    predicted = ensemble.argmax(-1)
    suspect = flagged & (predicted != predictions.labels)
    ordered = [int(row) for row in np.argsort(quality, kind="stable") if suspect[row]]
    return [
        _explain_suspect(predictions, row, int(predicted[row]), ensemble[row])
        for row in ordered[:limit]
    ]


def _find_issues(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """Return cleanlab's issues, booleans (n,), as it finds them in all rows at once.

    cleanlab takes several times the memory of the probabilities (n, k). But once it has the
    confident joint, it looks at the rows of each class by themselves.
    """
    count, filters = _import_cleanlab("count"), _import_cleanlab("filter")
    thresholds = count.get_confident_thresholds(labels, probs)
    joint = _confident_joint(labels, probs, thresholds)
    joint = count.calibrate_confident_joint(joint, labels)
    sizes = np.bincount(labels)
    # Classes by their number of values so far, as many together as fit a block.
    batch = np.cumsum(sizes * probs.shape[1]) // _BATCH_VALUES
    flagged = np.zeros(len(labels), bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes with few rows
        for number in np.unique(batch):
            rows = np.flatnonzero(batch[labels] == number)
            flagged[rows] = filters.find_label_issues(
                labels[rows], probs[rows], confident_joint=joint, n_jobs=1
            )
    return flagged


def _confident_joint(labels: np.ndarray, probs: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Count rows (k, k) by label and by the class whose threshold they reach.

    That is `cleanlab.count.compute_confident_joint` without calibration, by blocks of rows.
    """
    k, cells = probs.shape[1], []
    for rows in row_blocks(*probs.shape):
        block = probs[rows]
        confident = block >= thresholds - 1e-6
        number = confident.sum(1)
        guess = np.where(number > 1, block.argmax(1), confident.argmax(1))
        cells.append((labels[rows] * k + guess)[number > 0])
    joint = np.bincount(np.concatenate(cells), minlength=k * k).reshape(k, k)
    np.fill_diagonal(joint, joint.diagonal().clip(min=1))
    return joint


def list_suspects(
    predictions: Predictions, probs: npt.ArrayLike | None = None
) -> tuple[list[Suspect], str]:
    """Call `find_suspects`; without cleanlab, return no suspects and the reason."""
    try:
        return find_suspects(predictions, probs=probs), ""
    except RunError as error:
        return [], str(error)


def summarize_audit(suspects: Sequence[Suspect], missing: str) -> Audit:
    """Return the first LISTED suspects, their number, and the reason if there was no audit."""
    listed = tuple(SuspectLabel(**suspect._asdict()) for suspect in suspects[:LISTED])
    return Audit(suspects=listed, n_suspects=len(suspects), missing=missing)


def write_suspects(path: str | Path, suspects: Iterable[Suspect]) -> None:
    """Write a CSV file (UTF-8) with one row per suspect: id, label, suggested, score, reason.

    Raises:
        RunError: the file cannot be written.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(Suspect._fields)
    for suspect in suspects:
        score = f"{suspect.score:.6g}"
        texts = (suspect.id, suspect.label, suspect.suggested)
        table.writerow([*map(escape_formula, texts), score, escape_formula(suspect.reason)])
    write_bytes(Path(path), text.getvalue().encode())


def read_suspects(path: str | Path) -> list[Suspect]:
    """Read a file of `write_suspects`.

    Raises:
        DataError: it cannot be read, or has other columns.
    """
    try:
        table = csv.DictReader(io.StringIO(read_text(Path(path), MAX_BYTES), newline=""))
        rows = list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError("cannot read the suspect labels", where=path, got=error) from None
    header = tuple(table.fieldnames or ())
    if header != Suspect._fields:
        expected, got = (", ".join(names) for names in (Suspect._fields, header))
        raise DataError("not a list of suspect labels", where=path, expected=expected, got=got)
    try:
        return [
            Suspect(
                id=unescape_formula(row["id"]),
                label=unescape_formula(row["label"]),
                suggested=unescape_formula(row["suggested"]),
                score=float(row["score"]),
                reason=unescape_formula(row["reason"]),
            )
            for row in rows
        ]
    except (TypeError, ValueError):
        raise DataError(
            "not a list of suspect labels", where=path, expected="five cells in each row"
        ) from None


def _explain_suspect(
    predictions: Predictions, row: int, predicted: int, probs: np.ndarray
) -> Suspect:
    label = predictions.classes[predictions.labels[row]]
    suggested = predictions.classes[predicted]
    votes = int((predictions.probs[:, row].argmax(-1) == predicted).sum())
    who = "the ensemble" if predictions.kind == "foreign" else "the ensemble that never saw it"
    return Suspect(
        id=predictions.ids[row],
        label=label,
        suggested=suggested,
        score=float(probs[predictions.labels[row]]),
        reason=f"labelled {label}; {who} says {suggested} with {probs[predicted]:.2f}; "
        f"{votes} of {count_of(len(predictions.members), 'member')} agree",
    )


def _import_cleanlab(module: str) -> Any:
    """Import a module of cleanlab, an optional package.

    Raises:
        RunError: it is not installed.
    """
    try:
        return importlib.import_module(f"cleanlab.{module}")
    except ImportError:
        fix = install_command("audit")
        raise RunError("label audits need cleanlab, which is not installed", fix=fix) from None
