"""What a person sees in the terminal while members train, and the tables at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

from threefold.recipe import Job, fold_name
from threefold.training__watcher import Watcher

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


def score_table(scores: Sequence[dict[str, Any]], chosen: str | None = None) -> Table:
    """Scores as a table, ensembles below members, the chosen one marked; what was fitted where is in results.json."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("", "rows", "% right", "95 % interval", "log loss", "ECE"):
        table.add_column(name, justify="left" if name in ("", "rows") else "right", no_wrap=True)
    for s in scores:
        short = _short(s["name"])
        name = f"[bold]{escape(short)}[/]" if s["kind"] == "ensemble" else escape(short)
        mark = " [bold green]<[/]" if s["kind"] == "ensemble" and s["name"] == chosen else ""
        low, high = s["interval"]
        figures = [
            f"{100 * s['accuracy']:.2f}",
            f"{100 * low:.2f} - {100 * high:.2f}",
            f"{s['log_loss']:.3f}",
            f"{s['ece']:.3f}",
        ]
        table.add_row(name + mark, f"{s['rows']} {s['n']}", *figures)
    return table


def class_table(classes: Sequence[dict[str, Any]], most: int = 12) -> Table:
    """Recall, precision and F1 of the classes that are hardest to find; the rest is in the JSON and on the page."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("", "images", "% found", "95 % interval", "% right when named", "F1"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    known = [c for c in classes if c["recall"] is not None]
    for c in sorted(known, key=lambda c: float(c["recall"]))[:most]:
        low, high = c["interval"]
        right = "-" if c["precision"] is None else f"{100 * c['precision']:.1f}"
        row = [
            f"{c['n']:,}",
            f"{100 * c['recall']:.1f}",
            f"{100 * low:.1f} - {100 * high:.1f}",
            right,
            f"{c['f1']:.3f}",
        ]
        table.add_row(escape(_short(c["class"])), *row)
    if len(known) > most:
        table.add_row(f"[dim]and {len(known) - most} more[/]")
    return table


def pair_table(pairs: Sequence[dict[str, Any]]) -> Table:
    """Paired comparisons: images that only one has right, the difference with its interval, p after Holm's correction."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("A", "B", "A only", "B only", "points", "95 % interval", "Holm p"):
        table.add_column(name, justify="left" if name in ("A", "B") else "right", no_wrap=True)
    for pair in pairs:
        low, high = pair["interval"]
        counts = ["-" if pair[side] is None else f"{pair[side]:,}" for side in ("only_a", "only_b")]
        figures = [
            f"{100 * pair['difference']:+.2f}",
            f"{100 * low:+.2f} to {100 * high:+.2f}",
            f"{pair['p']:.2g}",
        ]
        table.add_row(*(escape(_short(pair[side], 13)) for side in ("a", "b")), *counts, *figures)
    return table


def optimism_table(lines: Sequence[dict[str, Any]]) -> Table:
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
        low, high = (f"{100 * end:+.2f}" for end in line["interval"])
        figures = [
            f"{100 * line['apparent']:.2f}",
            f"{100 * line['honest']:.2f}",
            f"{100 * line['difference']:+.2f}",
        ]
        table.add_row(escape(line["told"]), *figures, f"{low} to {high}")
    return table


def distill_tables(found: dict[str, Any]) -> list[Table]:
    """Student, twin and teacher: a table of scores for each kind of rows, then one of what an answer costs."""
    scores = []
    for part in found["tables"]:
        table = Table(box=None, header_style="dim", pad_edge=False)
        for name in ("", "rows", "% right", "95 % interval", "log loss", "ECE"):
            table.add_column(
                name, justify="left" if name in ("", "rows") else "right", no_wrap=True
            )
        for s in part["scores"]:
            low, high = s["interval"]
            figures = [f"{100 * s['accuracy']:.2f}", f"{100 * low:.2f} - {100 * high:.2f}"]
            figures += [f"{s['log_loss']:.3f}", f"{s['ece']:.3f}"]
            table.add_row(escape(_short(s["name"])), f"{part['rows']} {s['n']}", *figures)
        scores.append(table)
    return [*scores, _costs(found)]


def _costs(found: dict[str, Any]) -> Table:
    """Weights, multiply-adds and bytes, each also as a multiple of the student's."""
    own = next(line for line in found["costs"] if line["name"] == found["student"])
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("an answer costs", "weights", "", "multiply-adds", "", "file", ""):
        table.add_column(name, justify="left" if name.startswith("an") else "right", no_wrap=True)
    for line in found["costs"]:
        row = []
        for key, unit in (("parameters", "M"), ("macs", "M"), ("bytes", "MB")):
            known = key in line and key in own
            row += (
                [f"{line[key] / 1e6:,.1f} {unit}", f"{line[key] / own[key]:.1f} x"]
                if known
                else ["", ""]
            )
        table.add_row(escape(_short(line["name"])), *row)
    return table


def _short(name: str, most: int = NAME) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]


def verdict_line(pair: Mapping[str, Any]) -> str:
    """A comparison's verdict as a sentence of its own: it says of whom, also where no one is better."""
    a, b, told = pair["a"], pair["b"], str(pair["verdict"])
    return told if told.startswith((f"{a} ", f"{b} ")) else f"{a} and {b}: {told}"
