"""The content of `reproduce.json` as typed records. Imports no torch."""

from __future__ import annotations

from typing import Literal

from threefold.predictions.records import Record, VersionedRecord
from threefold.predictions.results_schema import Interval


class CellResult(Record):
    """The accuracy of a cell beside the paper's value.

    Attributes:
        column: of the cell; of images in groups, the group, or "mean" for the mean over groups.
        paper: the paper's value, a share; None where it prints none.
        ours: accuracy, the mean over seeds; None if the cell was left out at this scale.
        interval: its confidence interval, which counts images or groups, not seeds.
        n: number of images.
        rows: test, or oof (out-of-fold); empty if the cell was left out.
        backbone, img_size, parameters, macs: of a single member.
    """

    row: str
    column: str
    paper: float | None = None
    note: str = ""
    ours: float | None = None
    interval: Interval | None = None
    n: int = 0
    rows: str = ""
    per_seed: tuple[float, ...] = ()
    backbone: str | None = None
    img_size: int | None = None
    parameters: int | None = None
    macs: int | None = None

    @property
    def label(self) -> str:
        """Row and column."""
        return f"{self.row} {self.column}".strip()


class CellComparison(Record):
    """A paired test of two cells on the same images.

    Attributes:
        a, b: labels of the cells.
        test: name of the test.
        difference, interval: accuracy of a minus that of b.
        p, p_holm: p-value, and the one under Holm's correction over the item.
        per_seed: difference of each seed, where there are several.
        only_a, only_b: images that only one of the two answers right, where there is one seed.
    """

    a: str
    b: str
    seeds: int
    test: str
    difference: float
    interval: Interval
    p: float
    p_holm: float = 1.0
    verdict: str = ""
    per_seed: tuple[float, ...] = ()
    only_a: int | None = None
    only_b: int | None = None


class StageCurve(Record):
    """Accuracy on the select rows in one stage of a member, the mean over folds.

    Attributes:
        run: name of the item's run.
        number: of the stage, from 0.
        select: accuracy after each epoch.
        best: mean of each fold's best epoch.
        accepted: number of folds in which the stage was accepted.
        paper: the best epoch in the authors' notebooks, if they have it.
    """

    run: str
    member: str
    stage: str
    number: int
    lr: float
    select: tuple[float, ...]
    best: float
    accepted: int
    folds: int
    paper: float | None


class ItemResults(VersionedRecord):
    """reproduce.json: an item's cells and tests, and how its runs were trained."""

    item: str
    title: str
    scale: Literal["full", "small", "smoke"]
    protocol: Literal["honest", "paper"]
    draw: Literal["dots", "curves", "macs", "groups"]
    seeds: tuple[int, ...]
    created: str
    trained: str
    hardware: str
    threads: int
    commit: str
    training_minutes: float
    cells: tuple[CellResult, ...]
    comparisons: tuple[CellComparison, ...]
    stages: tuple[StageCurve, ...]
    notes: tuple[str, ...]
