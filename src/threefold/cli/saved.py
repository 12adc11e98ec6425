"""Verbs on saved predictions and finished runs: ensemble, evaluate, compare, report.

They take seconds and need no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from threefold.cli.console import out, plain, print_json
from threefold.cli.options import Json, split_names

if TYPE_CHECKING:
    import numpy as np

    from threefold.predictions.results_schema import PredictionSummary

Sources = Annotated[
    list[Path],
    typer.Argument(
        help="A run folder, or predictions (.npz, .csv, .parquet); "
        "several files are joined by row id."
    ),
]
Members = Annotated[
    list[str] | None,
    typer.Option("--members", help="Use only these members, separated by commas; may be repeated."),
]
Html = Annotated[Path | None, typer.Option("--html", help="Also write an HTML page.")]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        help="For files without labels: a table of ids and labels, or `folder` = from the paths.",
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option(
        "--classes", help="For files without class names: a text file of them, one per line."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (ensemble, evaluate, compare, report):
        app.command()(verb)


def ensemble(
    sources: Sources,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", help="auto, or a name from `threefold list ensembles`; may be repeated."
        ),
    ] = None,
    members: Members = None,
    top: Annotated[
        int,
        typer.Option(
            "--top",
            min=0,
            help="Combine only this many members, the most accurate out of fold; 0 = all.",
        ),
    ] = 0,
    reopen: Annotated[
        bool,
        typer.Option(
            "--reopen-test", help="Score on a run's test rows again; the run folder records it."
        ),
    ] = False,
    labels: Labels = None,
    classes: Classes = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Combine and score saved predictions, from a run or elsewhere."""
    from threefold.evaluation.saved import evaluate_saved, summarize_evaluation

    evaluation = evaluate_saved(
        sources,
        split_names(method) or ["auto"],
        split_names(members),
        top,
        reopen,
        labels=labels,
        classes=classes,
    )
    summary = summarize_evaluation(sources, evaluation)
    # The page shows the headline's rows only.
    headline = tuple(score for score in summary.scores if score.rows == evaluation.rows.kind)
    _write_page(html, summary.replace(scores=headline), evaluation.probs, evaluation.rows.labels)
    if as_json:
        print_json(summary.as_json())
        return
    from threefold.cli.terminal import expected_line, optimism_table, score_table, verdict_line

    out.print(score_table(evaluation.scores, evaluation.chosen))
    out.print(f"< chosen: {evaluation.chosen} ({plain(evaluation.reason)})")
    for line in [*map(verdict_line, evaluation.comparisons), *evaluation.warnings]:
        out.print(f"  {plain(line)}")
    if evaluation.optimism:
        out.print(optimism_table(evaluation.optimism))
    out.print(f"\n{expected_line(evaluation.expected)}")
    _show_page(html)


def evaluate(
    sources: Sources,
    members: Members = None,
    labels: Labels = None,
    classes: Classes = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Score predictions as they are: nothing is fitted or chosen."""
    from threefold.evaluation.saved import score_saved

    summary, rows = score_saved(sources, split_names(members), labels=labels, classes=classes)
    best = max(range(len(rows.members)), key=lambda i: summary.scores[i].accuracy)
    _write_page(html, summary, rows.probs[best], rows.labels)
    if as_json:
        print_json(summary.as_json())
        return
    from threefold.cli.terminal import class_table, score_table

    out.print(score_table(summary.scores))
    out.print(f"\nclasses, lowest recall first ({plain(summary.per_class_of)})")
    out.print(class_table(summary.per_class))
    notes = list(summary.warnings)
    if summary.diversity is not None:
        for names in summary.diversity.duplicates:
            notes.append(f"the same predictions under several names: {', '.join(names)}")
    for note in notes:
        out.print(f"  {plain(note)}")
    if summary.audit is not None and summary.audit.n_suspects:
        first = summary.audit.suspects[0]
        out.print(
            f"  {summary.audit.n_suspects} labels look wrong, if these are held-out predictions "
            f"(--json or --html lists them); the first: {plain(first.id)}, {plain(first.reason)}"
        )
    _show_page(html)


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="PATH or PATH:MEMBER, two or more; one PATH alone compares its members. "
            "PATH:A+B is the mean of members; A1,A2,A3 are seeds of one recipe."
        ),
    ],
    shared: Annotated[
        bool, typer.Option("--shared", help="Compare on the rows that all sources have.")
    ] = False,
    labels: Labels = None,
    classes: Classes = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Test every pair on the same rows, with Holm's correction."""
    from threefold.evaluation.compare import compare_saved

    summary, rows = compare_saved(sources, shared, labels=labels, classes=classes)
    _write_page(html, summary, rows.probs[0], rows.labels)
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
    _show_page(html)


def report(
    runs: Annotated[list[Path], typer.Argument(help="One or more finished run folders.")],
    target: Annotated[
        Path | None,
        typer.Option("--out", help="The file to write (default: report.html in the first run)."),
    ] = None,
) -> None:
    """Write the HTML report of one run or of several."""
    from threefold.report.pages import write_report

    out.print(str(write_report(runs, target)), markup=False)


def _write_page(
    html: Path | None, summary: PredictionSummary, probs: np.ndarray, labels: np.ndarray
) -> None:
    if html is not None:
        from threefold.report.pages import write_page

        title = ", ".join(Path(source).name for source in summary.source)
        write_page(html, title, summary, probs, labels)


def _show_page(html: Path | None) -> None:
    if html is not None:
        out.print(f"page   {html}", markup=False)
