"""What a person sees in the terminal while members train, and the tables at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from threefold.predictions.results_schema import (
    ClassScore,
    Comparison,
    DistillationResults,
    Optimism,
    Score,
    ShortScore,
)
from threefold.recipe import Job, fold_name
from threefold.training.watcher import Watcher

NAME = 22
"""Characters of a name in a table that fits 80 columns; the ends of long names differ, so these are kept."""


class TerminalWatcher(Watcher):
    """Shows a progress bar on a terminal and nothing elsewhere; `verbose` adds a line per job and epoch."""

    def __init__(self, console: Console, verbose: bool = False) -> None:
        self.console, self.verbose = console, verbose
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[speed]}"),
            MofNCompleteColumn(),
        ]
        self.progress = Progress(
            *columns[:-1], console=console, transient=True, disable=not console.is_terminal
        )
        self.images: dict[Job, int] = {}
        self.current: Job | None = None
        self.seen = 0

    def __enter__(self) -> TerminalWatcher:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def plan(self, jobs: Sequence[Job], images: Sequence[int]) -> None:
        """Set up the bar over all jobs; a run before this one has its bar filled."""
        self._close()
        self.current = None
        self.images = dict(zip(jobs, images, strict=True))
        self.bar = self.progress.add_task("training", total=sum(images), speed="")

    def job(self, job: Job, skipped: bool) -> None:
        """Name the job; a skipped one counts as done."""
        self._close()
        self.current, self.seen = job, 0
        label = f"{job.member} {fold_name(job.fold)} {job.stage}"
        if self.verbose or (skipped and self.console.is_terminal):
            self.console.print(f"[dim]{label}{': already done' if skipped else ''}[/]")
        self.progress.update(self.bar, description=label)

    def batch(self, images: int) -> None:
        """Move the bar."""
        self.seen += images
        self.progress.advance(self.bar, images)

    def epoch(self, record: dict[str, Any]) -> None:
        """Show the speed; with `verbose` the whole line."""
        self.progress.update(
            self.bar,
            speed=f"{record['images_per_second']:.0f} images/s, select {record['select_accuracy']:.3f}",
        )
        if self.verbose and self.current:
            self.console.print(
                f"  {self.current.member} {fold_name(self.current.fold)} {self.current.stage} epoch {record['epoch']}: loss {record['loss']:.3f}, "
                f"select {record['select_accuracy']:.4f}, {record['images_per_second']:.0f} images/s",
                highlight=False,
            )

    def note(self, text: str) -> None:
        """A line to be read."""
        self.console.print(f"[yellow]note[/yellow] {escape(text)}", highlight=False)

    def _close(self) -> None:
        """A job that stopped early, or was skipped, still fills its part of the bar."""
        if self.current is not None:
            self.progress.advance(self.bar, max(0, self.images[self.current] - self.seen))


def score_table(scores: Sequence[Score], chosen: str | None = None) -> Table:
    """Scores as a table, ensembles below members, the chosen one marked; what was fitted where is in results.json."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("", "rows", "% right", "95 % interval", "log loss", "ECE"):
        table.add_column(name, justify="left" if name in ("", "rows") else "right", no_wrap=True)
    for s in scores:
        name = escape(_short(s.name))
        if s.kind == "ensemble":
            name = f"[bold]{name}[/]"
            if s.name == chosen:
                name += " [bold green]<[/]"
        table.add_row(name, f"{s.rows} {s.n}", *_figures(s))
    return table


def _figures(s: Score | ShortScore) -> list[str]:
    """Accuracy, interval, log loss and calibration error as the score tables show them."""
    low, high = s.interval
    return [
        f"{100 * s.accuracy:.2f}",
        f"{100 * low:.2f} - {100 * high:.2f}",
        f"{s.log_loss:.3f}",
        f"{s.ece:.3f}",
    ]


def class_table(classes: Sequence[ClassScore], most: int = 12) -> Table:
    """Recall, precision and F1 of the classes that are hardest to find; the rest is in the JSON and on the page."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("", "images", "% found", "95 % interval", "% right when named", "F1"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    known = [(c.recall, c) for c in classes if c.recall is not None]
    known.sort(key=lambda pair: pair[0])
    for recall, c in known[:most]:
        low, high = c.interval
        row = [
            f"{c.n:,}",
            f"{100 * recall:.1f}",
            f"{100 * low:.1f} - {100 * high:.1f}",
            "-" if c.precision is None else f"{100 * c.precision:.1f}",
            "-" if c.f1 is None else f"{c.f1:.3f}",
        ]
        table.add_row(escape(_short(c.name)), *row)
    if len(known) > most:
        table.add_row(f"[dim]and {len(known) - most} more[/]")
    return table


def pair_table(pairs: Sequence[Comparison]) -> Table:
    """Paired comparisons: images that only one has right, the difference with its interval, p after Holm's correction."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("A", "B", "A only", "B only", "points", "95 % interval", "Holm p"):
        table.add_column(name, justify="left" if name in ("A", "B") else "right", no_wrap=True)
    for pair in pairs:
        assert pair.difference is not None
        assert pair.interval is not None
        low, high = pair.interval
        counts = ["-" if n is None else f"{n:,}" for n in (pair.only_a, pair.only_b)]
        figures = [
            f"{100 * pair.difference:+.2f}",
            f"{100 * low:+.2f} to {100 * high:+.2f}",
            f"{pair.p:.2g}",
        ]
        table.add_row(*(escape(_short(name, 13)) for name in (pair.a, pair.b)), *counts, *figures)
    return table


def optimism_table(lines: Sequence[Optimism]) -> Table:
    """What each choice promised on the rows it was made on, and what it is worth on others."""
    table = Table(
        box=None,
        header_style="dim",
        pad_edge=False,
        title="[dim]optimism: % right on the rows of the choice, and on others[/]",
        title_justify="left",
    )
    for name in ("choice", "apparent", "honest", "difference", "95 % interval"):
        table.add_column(name, justify="left" if name == "choice" else "right", no_wrap=True)
    for line in lines:
        assert line.interval is not None
        low, high = (f"{100 * end:+.2f}" for end in line.interval)
        figures = [
            f"{100 * line.apparent:.2f}",
            f"{100 * line.honest:.2f}",
            f"{100 * line.difference:+.2f}",
        ]
        table.add_row(escape(line.description), *figures, f"{low} to {high}")
    return table


def distill_tables(distillation: DistillationResults) -> list[Table]:
    """Student, twin and teacher: a table of scores for each kind of rows, then one of what an answer costs."""
    scores = []
    for part in distillation.tables:
        table = Table(box=None, header_style="dim", pad_edge=False)
        for name in ("", "rows", "% right", "95 % interval", "log loss", "ECE"):
            table.add_column(
                name, justify="left" if name in ("", "rows") else "right", no_wrap=True
            )
        for s in part.scores:
            table.add_row(escape(_short(s.name)), f"{part.rows} {s.n}", *_figures(s))
        scores.append(table)
    return [*scores, _costs(distillation)]


def _costs(distillation: DistillationResults) -> Table:
    """Weights, multiply-adds and bytes, each also as a multiple of the student's."""
    own = next(line for line in distillation.costs if line.name == distillation.student)
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("an answer costs", "weights", "", "multiply-adds", "", "file", ""):
        table.add_column(name, justify="left" if name.startswith("an") else "right", no_wrap=True)
    for line in distillation.costs:
        row = []
        for value, own_value, unit in (
            (line.parameters, own.parameters, "M"),
            (line.macs, own.macs, "M"),
            (line.bytes, own.bytes, "MB"),
        ):
            if value is None or own_value is None:
                row += ["", ""]
            else:
                row += [f"{value / 1e6:,.1f} {unit}", f"{value / own_value:.1f} x"]
        table.add_row(escape(_short(line.name)), *row)
    return table


def _short(name: str, most: int = NAME) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


def verdict_line(pair: Comparison) -> str:
    """A comparison's verdict as a sentence of its own: it says of whom, also where no one is better."""
    if pair.verdict.startswith((f"{pair.a} ", f"{pair.b} ")):
        return pair.verdict
    return f"{pair.a} and {pair.b}: {pair.verdict}"
