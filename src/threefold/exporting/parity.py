"""Check that an exported file answers like the pipeline in eager float32 PyTorch.

Three things are measured on real images, each with a tolerance per precision: the largest
difference of a probability, the images whose predicted class changes, and the net number of
correct answers lost if labels are known. Where an image has any number of labels, all of them
together are the answer: it changes, or is correct, as a whole.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from threefold.errors import ExportError
from threefold.names import count_of
from threefold.predictions.export_schema import CorrectAnswers, ExportReport
from threefold.runtime.tolerances import TOLERANCES

TIE: Final = 2e-4
"""A change between classes whose probabilities differ by at most this is a tie."""


def compare(
    expected: np.ndarray,
    answers: np.ndarray,
    precision: str = "float32",
    labels: npt.ArrayLike | None = None,
    rows: str = "",
    thresholds: npt.ArrayLike | None = None,
) -> ExportReport:
    """Compare the answers of a file with those of the pipeline.

    Args:
        expected: probabilities (n, k) of the pipeline in eager float32 PyTorch.
        answers: probabilities (n, k) of the file.
        precision: its tolerances go into the report.
        labels: class indices (n,) or targets (n, k), if known; only then the report has an
            accuracy.
        rows: name of the images' rows.
        thresholds: (k,) from which probability on an image has each label; None = an image has the
            most probable class.
    """
    tolerance, n = TOLERANCES[precision], len(expected)
    before, after = _decide(expected, thresholds), _decide(answers, thresholds)
    moved = (before != after).any(1)
    ties = moved & _is_tie(expected, before, after, thresholds)
    difference = float(np.abs(answers - expected).max(initial=0.0))
    report = ExportReport(
        images=n,
        rows=rows,
        max_difference=difference if np.isfinite(answers).all() else np.inf,
        top1_agreement=float(1 - moved.mean()),
        changed=int((moved & ~ties).sum()),
        ties=int(ties.sum()),
        precision=precision,
        tolerance=tolerance.difference,
        changed_tolerance=_allowed(tolerance.changed, n),
        loss_tolerance=_allowed(tolerance.loss, n),
        task="multiclass" if thresholds is None else "multilabel",
    )
    if labels is None:
        return report
    truth = np.asarray(labels)
    if truth.ndim == 1:
        truth = np.arange(expected.shape[1]) == truth[:, None]
    correct_before, correct_after = (before == truth).all(1), (after == truth).all(1)
    lost, gained = correct_before & ~correct_after, ~correct_before & correct_after
    accuracy = CorrectAnswers(
        before=int(correct_before.sum()),
        after=int(correct_after.sum()),
        lost=int(lost.sum()),
        gained=int(gained.sum()),
        change=(int(gained.sum()) - int(lost.sum())) / n,
        counted_loss=int((lost & ~ties).sum() - (gained & ~ties).sum()),
    )
    return report.replace(accuracy=accuracy)


def _decide(probs: np.ndarray, thresholds: npt.ArrayLike | None) -> np.ndarray:
    """Return which classes (n, k) probabilities stand for: the most probable one, or labels."""
    if thresholds is None:
        return np.asarray(np.arange(probs.shape[1]) == probs.argmax(1)[:, None])
    return np.asarray(probs >= np.asarray(thresholds))


def _is_tie(
    expected: np.ndarray, before: np.ndarray, after: np.ndarray, thresholds: npt.ArrayLike | None
) -> np.ndarray:
    """Return (n,) whether rounding alone can have changed an answer."""
    if thresholds is None:
        # Before and after an answer is one class; the sums pick its probability.
        return np.asarray(((expected * before).sum(1) - (expected * after).sum(1)) <= TIE)
    distance = np.abs(expected - np.asarray(thresholds))
    return np.asarray(np.where(before != after, distance, 0).max(1) <= TIE)


def _allowed(share: float, images: int) -> int:
    """Return the number of images in a share, at least one unless the share is 0."""
    return max(1, int(share * images)) if share else 0


def check(report: ExportReport, where: object) -> ExportReport:
    """Return the report if the file is within the tolerances of its precision.

    Args:
        report: of `compare`.
        where: the file that would be written.

    Raises:
        ExportError: with the first tolerance that is exceeded and the measured value.
    """
    n = report.images
    lost = report.accuracy.counted_loss if report.accuracy is not None else 0
    expected = got = ""
    # `not <=` also refuses a difference that is not a number.
    if not report.max_difference <= report.tolerance:
        expected = f"difference <= {report.tolerance:g}"
        got = f"{report.max_difference:.2e} over {n} images"
    elif report.changed > report.changed_tolerance:
        other = "other labels" if report.task == "multilabel" else "another class"
        expected = f"at most {report.changed_tolerance} of {n} images with {other}"
        got = str(report.changed)
    elif lost > report.loss_tolerance:
        expected = f"at most {report.loss_tolerance} correct answers of {n} lost on balance"
        got = str(lost)
    if expected:
        raise ExportError(
            "the exported file would answer differently, so it was not written",
            where=where,
            expected=expected,
            got=got,
            fix="" if report.precision == "float32" else "use --precision float16 or float32",
        )
    return report


def describe_report(report: ExportReport) -> str:
    """Describe the report in one line."""
    same = "labels" if report.task == "multilabel" else "class"
    line = (
        f"against the pipeline on {count_of(report.images, 'image')}: "
        f"largest difference {report.max_difference:.1e}, "
        f"same {same} {report.top1_agreement:.1%}"
    )
    accuracy = report.accuracy
    if accuracy is None:
        return line
    return (
        f"{line}, correct {accuracy.before} -> {accuracy.after} of {report.images} "
        f"({accuracy.lost} lost, {accuracy.gained} gained)"
    )
