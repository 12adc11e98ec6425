"""A bar for work that counts images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from threefold.cli.console import err
from threefold.counting import listening

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def describe_speed(units: float) -> str:
    """Write units in a second, with a decimal if they are few."""
    return f"{units:,.0f}/s" if units >= 10 else f"{units:.1f}/s"


@contextmanager
def progress_bar(what: str, speed: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal while something is counted, and nothing elsewhere.

    Args:
        what: is counted.
        speed: also show how many in a second, and the time that is left. The first call then says
            where the count begins.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class SpeedColumn(ProgressColumn):
        """Units in a second."""

        def render(self, task: Task) -> Text:
            """Return the speed of the last half minute."""
            return Text("" if task.speed is None else describe_speed(task.speed))

    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
    ]
    if speed:
        columns += [SpeedColumn(), TimeRemainingColumn(compact=True)]
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task(what, total=None)
        begun = False

        def update(done: int, total: int) -> None:
            nonlocal begun
            if begun or not speed:
                progress.update(bar, completed=done, total=total)
            else:
                progress.reset(bar, completed=done, total=total)
            begun = True

        with _showing_counts(progress):
            yield update


@contextmanager
def count_bars() -> Iterator[None]:
    """Show a bar on a terminal for whatever is counted, such as images that are verified."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    with (
        Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress,
        _showing_counts(progress),
    ):
        yield


@contextmanager
def _showing_counts(progress: Progress) -> Iterator[None]:
    """Add a bar for each thing that is counted, until all are there."""
    bars: dict[str, TaskID] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = progress.add_task(what, total=None)
        progress.update(bars[what], completed=done, total=total or None)
        if done == total:
            progress.remove_task(bars.pop(what))

    with listening(show):
        yield
