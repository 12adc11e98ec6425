"""The measurements of a run as typed records: results.json, views.json, and saved predictions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from threefold.names import printable
from threefold.predictions.export_schema import ExportReport
from threefold.predictions.records import FirstOpening, Record, VersionedRecord

Interval = tuple[float, float]
"""Lower and upper end of a confidence interval."""


class Score(Record):
    """Scores of one member, ensemble or contender on one kind of rows.

    Attributes:
        rows: test, oof (out-of-fold) or foreign.
        interval: confidence interval of the accuracy at `level`.
        fitted_on: the rows that an ensemble or its calibration learned from.
        apparent: some of the rows were seen during fitting.
        macs, parameters: cost of an answer, over all networks and views that take part.
        seeds: accuracy of each seed, where the other figures are means over seeds, and the interval
            is for other seeds and other images.
        temperature, calibrated_log_loss, calibrated_ece: what temperature scaling would do.
    """

    name: str
    kind: Literal["member", "ensemble", "contender"]
    rows: str
    n: int
    accuracy: float
    interval: Interval
    level: float
    log_loss: float
    ece: float
    protocol: str
    fitted_on: str
    apparent: bool = False
    brier: float | None = None
    balanced_accuracy: float | None = None
    balanced_accuracy_interval: Interval | None = None
    macro_f1: float | None = None
    roc_auc: float | None = None
    top5: float | None = None
    macs: int | None = None
    parameters: int | None = None
    seeds: tuple[float, ...] | None = None
    temperature: float | None = None
    calibrated_log_loss: float | None = None
    calibrated_ece: float | None = None

    def __repr__(self) -> str:
        """Say in one line what matters; `model_dump()` has all figures."""
        low, high = self.interval
        rows = "given" if self.rows == "foreign" else self.rows
        return (
            f"<Score {printable(self.name, '')}: accuracy {self.accuracy:.4f} [{low:.4f}, "
            f"{high:.4f}] on {self.n:,} {rows} rows, log loss {self.log_loss:.3f}>"
        )

    __str__ = __repr__


class Comparison(Record):
    """A paired test of two answers on the same rows.

    Attributes:
        only_a, only_b: rows that only one of the two answers right; None for several seeds.
        difference, interval: accuracy of a minus that of b, with its confidence interval.
        p: p-value, under Holm's correction where several pairs are tested together.
        p_alone: the p-value without correction.
        p_over_folds: p-value of the corrected t-test over folds.
        primary: the one comparison of the chosen ensemble, which needs no correction.
    """

    a: str
    b: str
    rows: str
    p: float
    verdict: str
    only_a: int | None = None
    only_b: int | None = None
    difference: float | None = None
    interval: Interval | None = None
    n: int | None = None
    accuracy_a: float | None = None
    accuracy_b: float | None = None
    primary: bool | None = None
    test: str | None = None
    p_alone: float | None = None
    p_over_folds: float | None = None
    seeds: tuple[float, ...] | None = None


class MetricScore(Record):
    """The metric that a run goes by, with its bootstrap interval."""

    name: str
    value: float
    interval: Interval

    @property
    def words(self) -> str:
        """The name in words."""
        return {"roc_auc": "ROC AUC", "macro_f1": "macro F1"}.get(
            self.name, self.name.replace("_", " ")
        )


class Expected(Record):
    """The accuracy to expect on new images.

    Attributes:
        basis: the rows that it was measured on, in words.
        metric: the metric that the run goes by, if it is not the accuracy.
    """

    accuracy: float
    interval: Interval
    n: int
    rows: str
    basis: str
    metric: MetricScore | None = None


class ClassScore(Record):
    """Recall, precision and F1 of one class; None where no row is of the class or named so."""

    name: str = Field(alias="class")
    n: int
    recall: float | None
    interval: Interval
    precision: float | None
    precision_interval: Interval | None = None
    f1: float | None = None
    f1_interval: Interval | None = None


class Optimism(Record):
    """How much better a choice looks on the rows it was made on than on other rows.

    Attributes:
        choice: checkpoint, stage, views, member, method, or the name of a fitted method.
        description: what was chosen, in words.
    """

    choice: str
    description: str = ""
    apparent: float
    honest: float
    difference: float
    interval: Interval | None = None
    n: int
    apparent_rows: str
    honest_rows: str


class LedgerLine(Record):
    """The rows that a step was fitted on and those it scores, in words; `overlap` are both."""

    step: str
    fitted_on: str
    scored: str
    overlap: int


class SuspectLabel(Record):
    """A row whose label may be wrong."""

    id: str
    label: str
    suggested: str
    score: float
    reason: str


class CopyPair(Record):
    """Two images that look the same; distance 0 = equal pixel for pixel."""

    a: str
    b: str
    distance: float
    same_label: bool | None
    same_part: bool | None


class Copies(Record):
    """Pairs of copies: how many there are, and those that are listed."""

    total: int
    pairs: tuple[CopyPair, ...]


class Audit(Record):
    """Suspect labels and copies of images; `missing` says why no label was audited."""

    suspects: tuple[SuspectLabel, ...] = ()
    n_suspects: int = 0
    file: str = ""
    missing: str = ""
    warnings: tuple[str, ...] = ()
    duplicates: Copies | None = None


class CalibrationState(Record):
    """The calibration of the chosen ensemble."""

    name: str
    reason: str
    temperature: float | None
    scale: tuple[float, ...] | None = None
    bias: tuple[float, ...] | None = None


class PredictionSets(Record):
    """Conformal prediction sets of one kind, and their measured coverage and size."""

    by_class: bool
    state: dict[str, Any]
    n: int
    coverage: float
    interval: Interval
    mean_size: float
    single: float
    rows: str


class UnknownImages(Record):
    """The threshold below which an image is called unknown, and how often that is wrong."""

    state: dict[str, Any]
    rate: float
    measured: float
    interval: Interval
    n: int
    rows: str


class Conformal(Record):
    """Prediction sets that miss the right class in a share `alpha` of cases, and unknown images."""

    alpha: float
    sets: tuple[PredictionSets, ...]
    unknown: UnknownImages | None


class CascadeSaving(Record):
    """A cascade compared with its full ensemble; see `cascade_savings.Saving`."""

    n: int
    accuracy: float
    full: float
    difference: float
    interval: Interval
    only_fast: int
    only_full: int
    p: float
    disagreement: float
    disagreement_interval: Interval
    bound: float
    shares: tuple[float, ...]
    macs: float
    rows: str


class CascadeResult(Record):
    """The cascade of the chosen ensemble; `missing` says why there is none.

    Attributes:
        state: of `cascade.Cascade`.
        costs: multiply-adds of each member.
        measured: cross-fitted on out-of-fold rows, then on test rows where there are any.
        caps: the results with at most 1, 2, ... stages, up to all but the last.
    """

    missing: str = ""
    state: dict[str, Any] | None = None
    members: tuple[str, ...] = ()
    costs: tuple[float, ...] = ()
    measured: tuple[CascadeSaving, ...] = ()
    caps: tuple[CascadeSaving, ...] = ()


class MemberRow(Record):
    """One member as it was trained; `macs` are the multiply-adds of one image."""

    name: str
    backbone: str
    img_size: int
    weights: str
    head: str
    parameters: int
    macs: int = 0
    bytes: int | None = None


class DiversityRecord(Record):
    """How often members disagree about being right: a matrix (m, m)."""

    members: tuple[str, ...]
    disagreement: tuple[tuple[float, ...], ...]
    means: dict[str, Any] | None = None
    duplicates: tuple[tuple[str, ...], ...] = ()


class SizeCurveRecord(Record):
    """Accuracy against the number of members: random order (mean, low, high) and best first."""

    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    ordered: tuple[float, ...]
    order: tuple[str, ...] = ()
    n: int | None = None


class Teacher(Record):
    """The run that taught a student."""

    name: str
    method: str
    run: str


class FoldTargets(Record):
    """The teacher of one fold of a student; fold -1 is the refit."""

    fold: int
    method: str
    temperature: float | None
    accuracy: float
    seconds: float


class ShortScore(Record):
    """The main figures of one answer in a comparison of student, twin and teacher."""

    name: str
    accuracy: float
    interval: Interval
    log_loss: float
    ece: float
    n: int


class DistillTable(Record):
    """Student, twin and teacher on the same rows."""

    rows: str
    scores: tuple[ShortScore, ...]
    comparisons: tuple[Comparison, ...]


class AnswerCost(Record):
    """What one answer costs: weights, multiply-adds and bytes of the exported file."""

    name: str
    parameters: int
    macs: int
    bytes: int | None = None


class PseudoLabelCounts(Record):
    """The unlabelled images that a fold learns from.

    Attributes:
        fold: its number, or -1 for the refit.
        teachers: members whose networks of this fold answer the images.
        images: number of unlabelled images.
        used: how many of them the networks are sure enough of.
        classes: the number of these by their most likely class.
    """

    fold: int
    teachers: tuple[str, ...]
    images: int
    used: int
    classes: dict[str, int]


class DistillationResults(Record):
    """Results of distillation; see `distill` in docs/concepts.md."""

    teacher: Teacher
    student: str
    twin: str
    alpha: float
    temperature: float
    inner: int
    targets: tuple[FoldTargets, ...]
    tables: tuple[DistillTable, ...]
    costs: tuple[AnswerCost, ...]


class Summary(Record):
    """The part that the report of a run and the page of saved predictions share."""

    scores: tuple[Score, ...]
    classes: tuple[str, ...] = ()
    chosen: str | None = None
    chosen_reason: str = ""
    combined: tuple[str, ...] = ()
    expected: Expected | None = None
    comparisons: tuple[Comparison, ...] = ()
    per_class: tuple[ClassScore, ...] = ()
    optimism: tuple[Optimism, ...] = ()
    ledger: tuple[LedgerLine, ...] = ()
    audit: Audit | None = None
    calibration: CalibrationState | None = None
    diversity: DiversityRecord | None = None
    size_curve: SizeCurveRecord | None = None
    conformal: Conformal | None = None

    def score(self, name: str, kind: str, rows: str) -> Score | None:
        """Return the score of that name and kind on those rows, or None."""
        for score in self.scores:
            if (score.name, score.kind, score.rows) == (name, kind, rows):
                return score
        return None


class PredictionSummary(Summary):
    """What `threefold ensemble`, `evaluate` and `compare` print with --json.

    Attributes:
        source: the files or run folders that were read.
        per_class_of: the member that `per_class` is about, where nothing was chosen.
        cochran_q: q, df and p of Cochran's test of all contenders together.
    """

    kind: Literal["ensemble", "evaluate", "compare"]
    source: tuple[str, ...] = ()
    n: int | None = None
    warnings: tuple[str, ...] = ()
    per_class_of: str | None = None
    cochran_q: dict[str, float] | None = None


class Results(Summary, VersionedRecord):
    """results.json: everything that was measured in a run.

    Attributes:
        seconds: duration of each step: train, ensemble, export, report.
        members: the members and their cost.
        test_opened: the first opening of the test rows.
        pending: members that the recipe has and that are still to be trained; every figure is that
            of the others.
        notes: caveats about the figures, and findings about the data.
        export: the parity report of the exported file, with its latency.
        distill: the comparison of a student with its twin and teacher.
        pseudo_labels: the unlabelled images that each fold learns from.
    """

    name: str
    protocol: str
    created: str
    classes: tuple[str, ...]
    commit: str
    hardware: str
    threads: int
    digest: str
    seconds: dict[str, float]
    chosen: str
    chosen_reason: str
    members: tuple[MemberRow, ...]
    notes: tuple[str, ...]
    temperature: float | None = None
    cascade: CascadeResult | None = None
    test_opened: FirstOpening | None = None
    pending: tuple[str, ...] = ()
    export: ExportReport | None = None
    distill: DistillationResults | None = None
    pseudo_labels: tuple[PseudoLabelCounts, ...] = ()


class ChosenViews(VersionedRecord):
    """views.json: the number of test-time views that was chosen, and the accuracy of each number.

    Attributes:
        views: the chosen number.
        best: the number with the best accuracy; `standard_error` is that of its accuracy.
    """

    views: int
    chosen_on: str
    accuracy: dict[int, float]
    best: int
    standard_error: float
    optimism: tuple[Optimism, ...]
