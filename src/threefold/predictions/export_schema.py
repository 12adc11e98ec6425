"""What an export measures, as typed records; part of results.json."""

from __future__ import annotations

from threefold.predictions.records import Record
from threefold.tasks import Task


class CorrectAnswers(Record):
    """How many answers of the images in the parity gate are correct, before and after the export.

    Attributes:
        lost, gained: images that only the pipeline, or only the file, answers correctly.
        change: gained minus lost, as a share of the images.
        counted_loss: lost minus gained, without ties.
    """

    before: int
    after: int
    lost: int
    gained: int
    change: float
    counted_loss: int


class Latency(Record):
    """Milliseconds per image of an exported file; see `runtime.Model.measure_latency`."""

    full: float
    n: int
    threads: int
    fast: float | None = None
    stages: tuple[float, ...] | None = None


class ExportReport(Record):
    """How the answers of an exported file compare with the pipeline's; see `exporting.parity`.

    An answer is a class, or with the task multilabel all labels of an image.

    Attributes:
        rows: name of the rows that the images come from.
        max_difference: largest absolute difference of a probability.
        top1_agreement: share of images with the same answer.
        changed, ties: images whose answer changed, without and with equal probabilities.
        tolerance, changed_tolerance, loss_tolerance: limits on max_difference, on changed, and on
            the counted loss of correct answers.
        accuracy: only if the labels are known.
        bytes, path, method, latency: of the written file.
    """

    images: int
    rows: str
    max_difference: float
    top1_agreement: float
    changed: int
    ties: int
    precision: str
    tolerance: float
    changed_tolerance: int
    loss_tolerance: int
    accuracy: CorrectAnswers | None = None
    bytes: int = 0
    path: str = ""
    method: str = ""
    latency: Latency | None = None
    task: Task = "multiclass"
