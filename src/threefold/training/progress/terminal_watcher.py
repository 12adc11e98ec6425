"""Progress while members train: bar and curves on a terminal or in a notebook, notes elsewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
from threefold.recipe import Job
from threefold.training.progress.terminal_curves import Curves, ProgressWithCurves, label_of
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


class TerminalWatcher(Watcher):
    """Show notes, and a progress bar with learning curves on a terminal or in a notebook.

    In a notebook the bar needs ipywidgets.

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
        self.seen = 0
        self.counts: dict[str, TaskID] = {}

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
        self._fill_job()
        self.current = None
        self.images = dict(zip(jobs, images, strict=True))
        self.bar = self.progress.add_task("training", total=sum(images), speed="")

    def job(self, job: Job, skipped: bool) -> None:
        """Name the job; a skipped one counts as done."""
        self._fill_job()
        self.current, self.seen = job, 0
        label = label_of(job)
        if self.verbose or (skipped and self.console.is_terminal):
            self.console.print(f"[dim]{label}{': already done' if skipped else ''}[/]")
        self.progress.update(self.bar, description=label)

    def batch(self, images: int) -> None:
        """Move the bar."""
        self.seen += images
        self.progress.advance(self.bar, images)

    def features(self, done: int, total: int) -> None:
        """Show how far the frozen backbones are."""
        for bar in self.progress.task_ids[-1:]:
            self.progress.update(bar, speed=f"features {done:,} of {total:,}")

    def epoch(self, record: dict[str, Any]) -> None:
        """Show the speed and the curves; with `verbose` print a line."""
        if self.current is not None:
            self.curves.add(self.current, record)
        speed = f"{record['images_per_second']:.0f} images/s"
        self.progress.update(self.bar, speed=f"{speed}, select {record['select_accuracy']:.3f}")
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

    def _fill_job(self) -> None:
        """Fill the current job's part of the bar, if it stopped early or was skipped."""
        if self.current is not None:
            self.progress.advance(self.bar, max(0, self.images[self.current] - self.seen))


def has_bar(console: Console) -> bool:
    """Whether a progress bar can be drawn there; in files and pipes it cannot."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal
