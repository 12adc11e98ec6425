"""The measurements of several labels per image as typed records: results.json, and summaries."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from threefold.predictions.export_schema import ExportReport
from threefold.predictions.records import FirstOpening, Record, VersionedRecord
from threefold.predictions.results_schema import Interval, LedgerLine, MemberRow


class MultilabelScore(Record):
    """Scores of one member, ensemble or contender on one kind of rows.

    Attributes:
        rows: test, oof (out-of-fold) or foreign.
        level: of all intervals.
        macro_f1: mean over labels of F1 at the labels' thresholds; `micro_f1` is that of all pairs
            of image and label together.
        subset_accuracy: share of images that are given exactly their labels.
        fitted_on: the rows that weights, calibration and thresholds learned from.
        macs, parameters: cost of an answer, over all networks and views that take part.
    """

    name: str
    kind: Literal["member", "ensemble", "contender"]
    rows: str
    n: int
    level: float
    mean_average_precision: float
    mean_average_precision_interval: Interval
    macro_f1: float
    macro_f1_interval: Interval
    micro_f1: float
    micro_f1_interval: Interval
    subset_accuracy: float
    subset_accuracy_interval: Interval
    log_loss: float
    brier: float
    protocol: str
    fitted_on: str
    macs: int | None = None
    parameters: int | None = None


class LabelScore(Record):
    """Scores of one label; None where no image has it, or is given it.

    Attributes:
        n: images with the label.
        threshold: probability from which on the label is given.
        slope, intercept: calibration of the logit; 1 and 0 = none.
        ece: distance of probability and frequency, on average.
    """

    name: str = Field(alias="class")
    n: int
    average_precision: float | None
    average_precision_interval: Interval | None
    recall: float | None
    recall_interval: Interval
    precision: float | None
    precision_interval: Interval
    f1: float | None
    f1_interval: Interval
    log_loss: float
    brier: float
    ece: float
    threshold: float | None = None
    slope: float | None = None
    intercept: float | None = None


class MultilabelComparison(Record):
    """A paired bootstrap of two answers to the same images.

    Attributes:
        difference, interval: mean average precision of a minus that of b.
        p: its p-value, under Holm's correction where several pairs are tested together.
        p_alone: the p-value without correction.
        f1_difference, f1_interval, f1_p: the same of macro F1, without correction.
        primary: the one comparison of the chosen ensemble, which needs no correction.
    """

    a: str
    b: str
    rows: str
    n: int
    mean_average_precision_a: float
    mean_average_precision_b: float
    difference: float
    interval: Interval
    p: float
    p_alone: float
    macro_f1_a: float
    macro_f1_b: float
    f1_difference: float
    f1_interval: Interval
    f1_p: float
    verdict: str
    primary: bool | None = None


class MultilabelExpected(Record):
    """The scores to expect on new images.

    Attributes:
        basis: the rows that they were measured on, in words.
    """

    mean_average_precision: float
    mean_average_precision_interval: Interval
    macro_f1: float
    macro_f1_interval: Interval
    subset_accuracy: float
    subset_accuracy_interval: Interval
    n: int
    rows: str
    basis: str


class MultilabelOptimism(Record):
    """How much better a choice looks on the rows it was made on than on other rows."""

    choice: Literal["thresholds", "method"]
    description: str
    metric: Literal["macro_f1", "mean_average_precision"]
    apparent: float
    honest: float


class EnsembleState(Record):
    """The fitted ensemble, see `ensembles.multilabel.MultilabelEnsemble`.

    Attributes:
        members: m names, in the order of the weights.
    """

    members: tuple[str, ...]
    weights: tuple[float, ...]
    slope: tuple[float, ...]
    intercept: tuple[float, ...]
    thresholds: tuple[float, ...]


class MultilabelSummary(Record):
    """The part that the report of a run and the page of saved predictions share.

    Attributes:
        per_label: labels of the chosen ensemble, or of the member `per_label_of`.
    """

    task: Literal["multilabel"] = "multilabel"
    scores: tuple[MultilabelScore, ...]
    classes: tuple[str, ...]
    per_label: tuple[LabelScore, ...] = ()
    per_label_of: str | None = None
    chosen: str | None = None
    chosen_reason: str = ""
    combined: tuple[str, ...] = ()
    ensemble: EnsembleState | None = None
    expected: MultilabelExpected | None = None
    comparisons: tuple[MultilabelComparison, ...] = ()
    optimism: tuple[MultilabelOptimism, ...] = ()
    ledger: tuple[LedgerLine, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return plain values for JSON, with the task, by which readers tell these records."""
        return {"task": self.task, **super().as_json()}

    def score(self, name: str, kind: str, rows: str) -> MultilabelScore | None:
        """Return the score of that name and kind on those rows, or None."""
        for score in self.scores:
            if (score.name, score.kind, score.rows) == (name, kind, rows):
                return score
        return None


class MultilabelPredictionSummary(MultilabelSummary):
    """What `threefold ensemble`, `evaluate` and `compare` print with --json.

    Attributes:
        source: the files or run folders that were read.
    """

    kind: Literal["ensemble", "evaluate", "compare"]
    source: tuple[str, ...] = ()
    n: int
    warnings: tuple[str, ...] = ()


class MultilabelResults(MultilabelSummary, VersionedRecord):
    """results.json of a run with several labels per image; see `results_schema.Results`."""

    name: str
    protocol: str
    created: str
    commit: str
    hardware: str
    threads: int
    digest: str
    seconds: dict[str, float]
    chosen: str
    chosen_reason: str
    ensemble: EnsembleState
    members: tuple[MemberRow, ...]
    notes: tuple[str, ...]
    test_opened: FirstOpening | None = None
    pending: tuple[str, ...] = ()
    export: ExportReport | None = None
