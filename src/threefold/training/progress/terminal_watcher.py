"""Progress while members train: bar and curves on a terminal or in a notebook, notes elsewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from threefold.counting import listening
from threefold.names import printable, wrap_words
from threefold.recipe.recipe import Job
from threefold.training.progress.terminal_curves import (
    Curves,
    ProgressWithCurves,
    label_of,
    shorten_label,
)
from threefold.training.progress.watcher import Watcher


@contextmanager
def show_progress(watcher: Watcher | None = None, progress: bool = True) -> Iterator[Watcher]:
    """Choose what follows the training of a caller from Python.

    Args:
        watcher: follows the training in place of the bar.
        progress: show notes and a bar on standard error or in the notebook.
    """
    if watcher is not None or not progress:
        yield watcher or Watcher()
        return
    # Standard error, as tqdm does, so that the output of a script is its own.
    with TerminalWatcher(Console(stderr=True, highlight=False, soft_wrap=True)) as shown:
        yield shown


@dataclass
class _Row:
    """A running job: images that it has trained on, and its own bar where several run."""

    seen: int = 0
    bar: TaskID | None = None


class TerminalWatcher(Watcher):
    """Show notes, and a progress bar with learning curves on a terminal or in a notebook.

    Where several jobs run at the same time, each has a bar of its own below that of all jobs. In a
    notebook the bars need ipywidgets.

    Args:
        console: where to print.
        verbose: print a line per job and epoch.
    """

    def __init__(self, console: Console, verbose: bool = False) -> None:
        self.console, self.verbose = console, verbose
        self.curves = Curves()
        self.progress = ProgressWithCurves(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[speed]}"),
            console=console,
            transient=True,
            disable=not has_bar(console),
        )
        self.progress.curves = self.curves
        self.images: dict[Job, int] = {}
        self.current: Job | None = None
        self.counts: dict[str, TaskID] = {}
        self.running: dict[Job, _Row] = {}
        self.done = 0

    def __enter__(self) -> TerminalWatcher:
        self.progress.start()
        self.counting = listening(self.count)
        self.counting.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.counting.__exit__(None, None, None)
        with suppress(OSError):  # a terminal that was closed
            self.progress.stop()

    def count(self, what: str, done: int, total: int) -> None:
        """Show how far the images are, until all are there."""
        if what not in self.counts:
            self.counts[what] = self.progress.add_task(what, total=None, speed="")
        bar = self.counts[what]
        self.progress.update(bar, completed=done, total=total or None, speed=f"{done:,}")
        if done == total:
            self.progress.remove_task(self.counts.pop(what))

    def plan(self, jobs: Sequence[Job], images: Sequence[int]) -> None:
        """Start a bar over all jobs; fill the bar of the run before."""
        for job in [*self.running]:
            self.ended(job)
        self.current, self.done = None, 0
        self.images = dict(zip(jobs, images, strict=True))
        self.bar = self.progress.add_task("training", total=sum(images), speed="")

    def job(self, job: Job, skipped: bool) -> None:
        """Name the job; a skipped one counts as done."""
        label = label_of(job)
        if self.verbose or (skipped and self.console.is_terminal):
            self.console.print(f"[dim]{label}{': already done' if skipped else ''}[/]")
        if skipped:
            self.done += 1
            self.progress.advance(self.bar, self.images[job])
            return
        self.current = job
        self.running[job] = _Row()
        if len(self.running) > 1:
            for other, row in self.running.items():
                self._open(other, row)
            self._count()
        else:
            self.progress.update(self.bar, description=label)

    def focus(self, job: Job) -> None:
        """What follows is about one of several jobs."""
        self.current = job

    def ended(self, job: Job, done: bool = True) -> None:
        """Fill the job's part of the bar, or empty it, and close its own bar."""
        row = self.running.pop(job, None)
        if row is not None:
            left = self.images[job] - row.seen if done else -row.seen
            self.progress.advance(self.bar, max(0, left) if done else left)
            self.done += done
            if row.bar is not None:
                self.progress.remove_task(row.bar)
                self._count()

    def batch(self, images: int) -> None:
        """Move the bar."""
        self.progress.advance(self.bar, images)
        row = self._row()
        if row is not None:
            row.seen += images
            if row.bar is not None:
                self.progress.advance(row.bar, images)

    def features(self, done: int, total: int) -> None:
        """Show how far the frozen backbones are."""
        for bar in self.progress.task_ids[-1:]:
            self.progress.update(bar, speed=f"features {done:,} of {total:,}")

    def epoch(self, record: dict[str, Any]) -> None:
        """Show the speed and the curves; with `verbose` print a line."""
        if self.current is not None:
            self.curves.add(self.current, record)
        speed = f"{record['images_per_second']:.0f} images/s"
        row = self._row()
        bar = self.bar if row is None or row.bar is None else row.bar
        self.progress.update(bar, speed=f"{speed}, select {record['select_accuracy']:.3f}")
        if self.verbose and self.current:
            self.console.print(
                f"  {label_of(self.current)} epoch {record['epoch']}: loss {record['loss']:.3f}, "
                f"select {record['select_accuracy']:.4f}, {speed}",
                highlight=False,
            )

    def note(self, text: str) -> None:
        """Print a note, wrapped between words."""
        lines = wrap_words(f"note {printable(text)}", self.console.width, "  ")
        marked = f"[yellow]note[/yellow]{escape(lines.removeprefix('note'))}"
        self.console.print(marked, highlight=False)

    def _count(self) -> None:
        """Say on the bar of all jobs how many are done."""
        text = f"{self.done} of {len(self.images)} jobs"
        self.progress.update(self.bar, description=text, speed="")

    def _row(self) -> _Row | None:
        """The row of the job that is in focus."""
        return self.running.get(self.current) if self.current is not None else None

    def _open(self, job: Job, row: _Row) -> None:
        """Give a running job a bar of its own, if it has none."""
        if row.bar is None:
            label = shorten_label(job)
            row.bar = self.progress.add_task(
                f"[dim]{escape(label)}[/]", total=self.images[job], completed=row.seen, speed=""
            )


def has_bar(console: Console) -> bool:
    """Whether a progress bar can be drawn there; in files and pipes it cannot."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal
