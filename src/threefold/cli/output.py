"""What the training verbs print: progress, the score table, and where the files are."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from threefold.cli.console import err, out, plain, print_wrapped
from threefold.cli.signals import catch_signals
from threefold.errors import RecipeError

if TYPE_CHECKING:
    from threefold.training.progress.watcher import Watcher
    from threefold.training.run import Run


def resume_command(*words: object, sets: Iterable[str] | None = None, log: str = "") -> str:
    """Return a command line for the shell, with every `--set` and the `--log` that it had."""
    options = [word for text in sets or () for word in ("--set", text)]
    options += ["--log", log] if log else []
    return shlex.join(["threefold", *map(str, words), *options])


def executor_words(executor: str, address: str) -> list[str]:
    """Return the options that name an executor other than this machine.

    Raises:
        RecipeError: there is an address, and nothing to connect to it.
    """
    if address and executor != "ray":
        raise RecipeError(
            "only a Ray cluster has an address", where="--address", fix="add --executor ray"
        )
    words = [] if executor == "local" else ["--executor", executor]
    return words + (["--address", address] if address else [])


@contextmanager
def watch_training(verbose: bool, command: str, trackers: Sequence[str] = ()) -> Iterator[Watcher]:
    """Show progress while a run trains; print the command that resumes it if it is stopped.

    Args:
        verbose: print a line per job and epoch.
        command: the command that resumes the run.
        trackers: names of the experiment trackers that are to receive the numbers, too.

    Yields:
        The watcher to pass to the training function.

    Raises:
        SystemExit: with code 128 + n after signal n, such as 130 after Ctrl-C.
    """
    from threefold.training.progress.terminal_watcher import TerminalWatcher
    from threefold.training.progress.trackers import TrackedWatcher

    watcher = TerminalWatcher(out, verbose)
    with catch_signals(watcher) as signals:
        try:
            with watcher, TrackedWatcher(watcher, trackers) as tracked:
                yield tracked
        except BaseException as error:
            if not signals.have_ended(error):
                raise
            signals.is_told = True
            with suppress(OSError):  # after SIGHUP the terminal is gone
                resume = plain(command)
                err.print(f"[yellow]stopped[/]; finished work is kept. Resume with: {resume}")
            raise SystemExit(signals.exit_code) from None


def show_results(run: Run) -> None:
    """Print the score table, the accuracy to expect, the largest optimism and suspect labels."""
    if run.folder.is_multilabel:
        from threefold.cli import multilabel

        multilabel.show_results(run.folder.multilabel_results)
        return
    from threefold.cli.terminal import expected_line, score_table

    results = run.results
    out.print(score_table(results.scores, results.chosen))
    print_wrapped(f"< chosen: {results.chosen} ({results.chosen_reason})")
    expected, audit = results.expected, results.audit
    if expected is not None:
        out.print(f"\n{expected_line(expected, results.protocol)}", soft_wrap=False)
    if results.optimism:
        largest = max(results.optimism, key=lambda line: line.difference)
        points = f"{100 * largest.difference:+.1f} points"
        print_wrapped(f"optimism of {largest.description}: {points} on the rows it was chosen on")
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
        print_wrapped(note, "[yellow]note[/]")


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
