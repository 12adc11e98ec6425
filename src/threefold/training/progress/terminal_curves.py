"""Learning curves on a terminal: a line for each of the last stages, in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from threefold.names import printable
from threefold.recipe.recipe import Job, fold_name

BLOCKS: Final = "▁▂▃▄▅▆▇█"
LENGTH: Final = 16
"""Characters of a curve."""
LABEL: Final = 26
"""Characters of a label. Of longer ones the end is shown, which has fold and stage."""
STAGES: Final = 6
"""Stages that are shown, the latest."""


def sparkline(values: Sequence[float], length: int = LENGTH) -> str:
    """Draw numbers as blocks of eight heights, from the smallest number to the largest.

    Args:
        values: finite numbers.
        length: most characters; of more numbers the means of neighbours are drawn.
    """
    count = len(values)
    if count > length:
        bounds = [i * count // length for i in range(length + 1)]
        parts = [values[bounds[i] : bounds[i + 1]] for i in range(length)]
        values = [sum(part) / len(part) for part in parts]
    low, high = min(values, default=0.0), max(values, default=0.0)
    if high == low:
        return BLOCKS[len(BLOCKS) // 2 - 1] * len(values)
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round(top * (value - low) / (high - low))] for value in values)


def label_of(job: Job) -> str:
    """Name a job: member, fold and stage."""
    return f"{job.member} {fold_name(job.fold)} {job.stage}"


def shorten_label(job: Job) -> str:
    """Name a job in at most `LABEL` characters that can be printed."""
    name = printable(label_of(job))
    return name if len(name) <= LABEL else "…" + name[1 - LABEL :]


class Curves:
    """Loss and accuracy of each epoch, by stage; Rich can print it.

    Numbers without curves are shown where the terminal has no block characters.
    """

    def __init__(self) -> None:
        self.records: dict[Job, list[dict[str, Any]]] = {}

    def add(self, job: Job, record: dict[str, Any]) -> None:
        """Add an epoch; `record` is its entry in history.json."""
        records = self.records.setdefault(job, [])
        if records and record["epoch"] <= records[-1]["epoch"]:
            records.clear()  # the stage began anew
        records.append(record)
        while len(self.records) > STAGES:
            del self.records[next(iter(self.records))]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield a table, once there is an epoch."""
        if not self.records:
            return
        table = Table(box=None, header_style="dim", pad_edge=False, show_edge=False)
        table.add_column("stage", no_wrap=True)
        table.add_column("epochs", justify="right")
        for name in ("loss", "select accuracy"):
            table.add_column(name, no_wrap=True)
            table.add_column("", justify="right", no_wrap=True)
        for job, records in self.records.items():
            losses = [record["loss"] for record in records]
            scores = [record["select_accuracy"] for record in records]
            name = shorten_label(job)
            curves = ["", ""] if options.ascii_only else [sparkline(losses), sparkline(scores)]
            numbers = [f"{losses[-1]:.3f}", f"{scores[-1]:.3f}"]
            table.add_row(
                escape(name), str(len(records)), curves[0], numbers[0], curves[1], numbers[1]
            )
        yield table


class ProgressWithCurves(Progress):
    """A progress bar with learning curves below it."""

    curves: Curves | None = None

    def get_renderables(self) -> Any:
        """Yield the bar, then the curves."""
        yield from super().get_renderables()
        if self.curves is not None:
            yield self.curves
