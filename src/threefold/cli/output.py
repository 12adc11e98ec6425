"""What the training verbs print: progress, the score table, and where the files are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from threefold.cli.console import err, out, plain

if TYPE_CHECKING:
    from threefold.cli.terminal import TerminalWatcher
    from threefold.training.run import Run


@contextmanager
def watch_training(verbose: bool, command: str) -> Iterator[TerminalWatcher]:
    """Show progress while a run trains; on Ctrl-C print the command that resumes it.

    Args:
        verbose: print a line per job and epoch.
        command: the command that resumes the run.

    Yields:
        The watcher to pass to the training function.

    Raises:
        SystemExit: with code 130, after Ctrl-C.
    """
    from threefold.cli.terminal import TerminalWatcher

    try:
        with TerminalWatcher(out, verbose) as watcher:
            yield watcher
    except KeyboardInterrupt:
        err.print(f"[yellow]stopped[/]; finished work is kept. Resume with: {plain(command)}")
        raise SystemExit(130) from None


def show_results(run: Run) -> None:
    """Print the score table, the accuracy to expect, the largest optimism and suspect labels."""
    from threefold.cli.terminal import expected_line, score_table

    results = run.results
    out.print(score_table(results.scores, results.chosen))
    out.print(f"< chosen: {results.chosen} ({plain(results.chosen_reason)})")
    expected, audit = results.expected, results.audit
    if expected is not None:
        out.print(f"\n{expected_line(expected, results.protocol)}")
    if results.optimism:
        largest = max(results.optimism, key=lambda line: line.difference)
        points = f"{100 * largest.difference:+.1f} points"
        out.print(f"optimism of {largest.description}: {points} on the rows it was chosen on")
    if audit is not None and audit.n_suspects:
        out.print(f"suspect labels: {audit.n_suspects}, in {run.dir / audit.file}", markup=False)


def show_student(run: Run) -> None:
    """Print student, twin and teacher on the same rows, with verdicts and costs."""
    from threefold.cli.terminal import distill_tables, pair_table, verdict_line

    results = run.results
    if results.distill is None:
        return
    *score_tables, cost_table = distill_tables(results.distill)
    for score_table, part in zip(score_tables, results.distill.tables, strict=True):
        out.print(score_table)
        out.print(pair_table(part.comparisons))
        for pair in part.comparisons:
            out.print(f"  {plain(verdict_line(pair))}")
        out.print()
    out.print(cost_table)
    for note in results.notes:
        out.print(f"[yellow]note[/] {plain(note)}", highlight=False)


def show_next_steps(run: Run, *commands: str) -> None:
    """Print where a run's files are, and the commands to type next."""
    out.print()
    files = {
        "report": "report.html",
        "model": "model.onnx",
        "scores": "results.json",
        "run": "",
    }
    for name, path in files.items():
        if (run.dir / path).exists():
            out.print(f"{name:7}{run.dir / path}", markup=False)
    for command in commands:
        out.print(f"next   {command}", markup=False)
