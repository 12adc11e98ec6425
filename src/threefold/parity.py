"""The gate before a file is written: does it answer as the pipeline in eager float32 PyTorch does?

Three things are measured on real images, each against a tolerance of its precision: the largest difference of a
probability, images whose likeliest class changes, and right answers lost on balance where labels are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from threefold.errors import ExportError


class Tolerance(NamedTuple):
    """What a precision may change."""

    difference: float
    """Largest absolute difference of a probability."""
    changed: float
    """Share of images whose likeliest class changes."""
    loss: float
    """Share of images, right answers lost minus right answers gained."""


TOLERANCES: Final[Mapping[str, Tolerance]] = {
    # Rounding of float32 in another order of summation: 1e-6 as measured. 1e-4 is a bug, or a net that doubles rounding.
    "float32": Tolerance(1e-4, 0.0, 0.0),
    # Weights move by up to 2**-11 of themselves: 0.0015 measured on the demo's six networks of 100 layers.
    "float16": Tolerance(0.01, 0.005, 0.005),
    # Eight times coarser than float16: 2**-8 of a weight; 0.024 measured.
    "bfloat16": Tolerance(0.08, 0.02, 0.01),
    # 7-bit weights and 8-bit activations: answers of unsure images move (0.11 measured); classes and accuracy must hold.
    "int8": Tolerance(0.3, 0.03, 0.01),
}
"""By precision. Of the shares, one image is always allowed where the share itself is not 0."""
TIE: Final = 2e-4
"""A class that changes among two that the pipeline holds equal to within this is a tie and not counted as changed."""


def compare(
    expected: np.ndarray,
    answers: np.ndarray,
    precision: str = "float32",
    labels: npt.ArrayLike | None = None,
    rows: str = "",
) -> dict[str, Any]:
    """Measure what a file changes.

    Args:
        expected: probabilities (n, k) of the pipeline in eager float32 PyTorch.
        answers: those of the file.
        precision: whose tolerances go into the report.
        labels: class numbers (n,), where they are known.
        rows: which images these are, in words.

    Returns:
        The parity report: images, rows, max_difference, top1_agreement, changed and ties (images), precision, its three
        tolerances, and with labels accuracy: right before and after, lost, gained (images) and change (share).
    """
    tolerance = TOLERANCES[precision]
    before, after = expected.argmax(1), answers.argmax(1)
    at = np.arange(len(expected))
    moved = before != after
    ties = moved & (expected[at, before] - expected[at, after] <= TIE)
    report: dict[str, Any] = {
        "images": len(expected),
        "rows": rows,
        "max_difference": float(np.abs(answers - expected).max(initial=0.0))
        if np.isfinite(answers).all()
        else np.inf,
        "top1_agreement": float(1 - moved.mean()),
        "changed": int((moved & ~ties).sum()),
        "ties": int(ties.sum()),
        "precision": precision,
        "tolerance": tolerance.difference,
        "changed_tolerance": _allowed(tolerance.changed, len(expected)),
        "loss_tolerance": _allowed(tolerance.loss, len(expected)),
    }
    if labels is not None:
        right, kept = before == np.asarray(labels), after == np.asarray(labels)
        lost, gained = int((right & ~kept).sum()), int((~right & kept).sum())
        report["accuracy"] = {
            "before": int(right.sum()),
            "after": int(kept.sum()),
            "lost": lost,
            "gained": gained,
            "change": (gained - lost) / len(expected),
            "counted_loss": int((right & ~kept & ~ties).sum() - (~right & kept & ~ties).sum()),
        }
    return report


def _allowed(share: float, images: int) -> int:
    """How many images a share is, at least one."""
    return max(1, int(share * images)) if share else 0


def check(report: dict[str, Any], where: object) -> dict[str, Any]:
    """The report, unless the file changes more than its precision may.

    Args:
        report: what `compare` measured.
        where: the file that would be written.

    Raises:
        ExportError: with the measured value.
    """
    n, accuracy = report["images"], report.get("accuracy")
    failed: Sequence[tuple[str, str]] = [
        (wanted, got)
        for wrong, wanted, got in (
            (
                not report["max_difference"] <= report["tolerance"],
                f"difference <= {report['tolerance']:g}",
                f"{report['max_difference']:.2e} over {n} images",
            ),
            (
                report["changed"] > report["changed_tolerance"],
                f"at most {report['changed_tolerance']} of {n} images with another class",
                str(report["changed"]),
            ),
            (
                accuracy is not None and accuracy["counted_loss"] > report["loss_tolerance"],
                f"at most {report['loss_tolerance']} right answers of {n} lost on balance",
                f"{accuracy['counted_loss'] if accuracy else 0}",
            ),
        )
        if wrong
    ]
    if failed:
        wanted, got = failed[0]
        raise ExportError(
            "the exported file would answer differently, so it was not written",
            where=where,
            expected=wanted,
            got=got,
            fix="" if report["precision"] == "float32" else "use --precision float16 or float32",
        )
    return report


def told(report: Mapping[str, Any]) -> str:
    """The report in one line for people."""
    line = (
        f"against the pipeline on {report['images']} images: largest difference {report['max_difference']:.1e}, "
        f"same class {report['top1_agreement']:.1%}"
    )
    if "accuracy" not in report:
        return line
    accuracy = report["accuracy"]
    n = report["images"]
    return f"{line}, right {accuracy['before']} -> {accuracy['after']} of {n} ({accuracy['lost']} lost, {accuracy['gained']} gained)"
