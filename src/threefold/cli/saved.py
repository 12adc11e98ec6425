"""Verbs on saved predictions and finished runs: ensemble, evaluate, compare, report. Seconds, no network, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from threefold.cli.console import out, plain, print_json

if TYPE_CHECKING:
    import numpy as np

    from threefold.predictions.results_schema import PredictionSummary

Sources = Annotated[
    list[Path],
    typer.Argument(
        help="A run folder, or predictions: .npz, .csv, .parquet; several files are joined by the rows' ids."
    ),
]
Members = Annotated[
    list[str] | None,
    typer.Option("--members", help="Only these members; may be repeated or separated by commas."),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Html = Annotated[Path | None, typer.Option("--html", help="Write a page of it, too.")]

Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        help="A table with label and id for files without labels; folder = from the paths.",
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option("--classes", help="A text file of class names, one a line, for files without."),
]


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    for verb in (ensemble, evaluate, compare, report):
        app.command()(verb)


def ensemble(
    sources: Sources,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", help="auto, or names of `threefold list ensembles`; may be repeated."
        ),
    ] = None,
    members: Members = None,
    top: Annotated[
        int,
        typer.Option(
            "--top", min=0, help="Combine only so many, the most accurate out of fold; 0 = all."
        ),
    ] = 0,
    reopen: Annotated[
        bool,
        typer.Option(
            "--reopen-test", help="Score on a run's test rows again; the run folder notes it."
        ),
    ] = False,
    labels: Labels = None,
    classes: Classes = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Combine saved predictions, from a run or from anywhere, and score the result."""
    from threefold.evaluation.saved import evaluate_saved, summarize_evaluation

    evaluation = evaluate_saved(
        sources,
        _split(method) or ["auto"],
        _split(members),
        top,
        reopen,
        labels=labels,
        classes=classes,
    )
    summary = summarize_evaluation(sources, evaluation)
    # The page is about the rows of the headline only.
    shown = tuple(score for score in summary.scores if score.rows == evaluation.rows.kind)
    _page(html, summary.replace(scores=shown), evaluation.probs, evaluation.rows.labels)
    if as_json:
        print_json(summary.as_json())
        return
    from threefold.cli.terminal import optimism_table, score_table, verdict_line

    out.print(score_table(evaluation.scores, evaluation.chosen))
    out.print(f"chosen: {evaluation.chosen} ({plain(evaluation.reason)})")
    for line in [*map(verdict_line, evaluation.comparisons), *evaluation.warnings]:
        out.print(f"  {plain(line)}")
    if evaluation.optimism:
        out.print(optimism_table(evaluation.optimism))
    expected = evaluation.expected
    low, high = expected.interval
    out.print(
        f"\nExpect [bold]{expected.accuracy:.1%}[/] of new images to be right "
        f"(95 % interval {low:.1%} to {high:.1%}; {expected.n:,} {plain(expected.basis)})."
    )
    _told(html)


def evaluate(
    sources: Sources,
    members: Members = None,
    labels: Labels = None,
    classes: Classes = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Score predictions as they are: nothing fitted, nothing chosen."""
    from threefold.evaluation.saved import score_saved

    summary, rows = score_saved(sources, _split(members), labels=labels, classes=classes)
    best = max(range(len(rows.members)), key=lambda i: summary.scores[i].accuracy)
    _page(html, summary, rows.probs[best], rows.labels)
    if as_json:
        print_json(summary.as_json())
        return
    from threefold.cli.terminal import class_table, score_table

    out.print(score_table(summary.scores))
    out.print(f"\nclasses, hardest first ({plain(summary.per_class_of)})")
    out.print(class_table(summary.per_class))
    copies = summary.diversity.duplicates if summary.diversity is not None else ()
    for line in [
        *summary.warnings,
        *(f"the same predictions under several names: {', '.join(group)}" for group in copies),
    ]:
        out.print(f"  {plain(line)}")
    if summary.audit is not None and summary.audit.n_suspects:
        first = summary.audit.suspects[0]
        out.print(
            f"  {summary.audit.n_suspects} labels look wrong, if these are held-out predictions "
            f"(--json or --html lists them); the first: {plain(first.id)}, {plain(first.reason)}"
        )
    _told(html)


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="PATH or PATH:MEMBER, two or more; PATH:A+B is the mean of members; A1,A2,A3 are seeds of one recipe; one alone: its members."
        ),
    ],
    shared: Annotated[
        bool, typer.Option("--shared", help="Compare on the rows that all of them have.")
    ] = False,
    labels: Labels = None,
    classes: Classes = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Is one better than the other? Paired tests of every pair on the same rows, with Holm's correction."""
    from threefold.evaluation.compare import compare_saved

    summary, rows = compare_saved(sources, shared, labels=labels, classes=classes)
    _page(html, summary, rows.probs[0], rows.labels)
    if as_json:
        print_json(summary.as_json())
        return
    from threefold.cli.terminal import pair_table, score_table, verdict_line

    out.print(score_table(summary.scores))
    out.print()
    out.print(pair_table(summary.comparisons))
    for pair in summary.comparisons:
        out.print(f"  {plain(verdict_line(pair))}")
    if summary.cochran_q is not None:
        q = summary.cochran_q
        out.print(
            f"  all together: Cochran's Q {q['q']:.2f}, {q['df']:.0f} degrees of freedom, "
            f"p = {q['p']:.2g}"
        )
    for line in summary.warnings:
        out.print(f"  {plain(line)}")
    _told(html)


def report(
    runs: Annotated[list[Path], typer.Argument(help="One or more finished run folders.")],
    target: Annotated[
        Path | None,
        typer.Option("--out", help="The file to write (default: report.html in the first run)."),
    ] = None,
) -> None:
    """Write the HTML report of one run, or of several side by side."""
    from threefold.report.pages import write_report

    out.print(str(write_report(runs, target)), markup=False)


def _split(words: Sequence[str] | None) -> list[str]:
    return [word for text in words or () for word in text.split(",") if word]


def _page(
    html: Path | None, summary: PredictionSummary, probs: np.ndarray, labels: np.ndarray
) -> None:
    if html is not None:
        from threefold.report.pages import write_page

        title = ", ".join(Path(source).name for source in summary.source)
        write_page(html, title, summary, probs, labels)


def _told(html: Path | None) -> None:
    if html is not None:
        out.print(f"page   {html}", markup=False)
