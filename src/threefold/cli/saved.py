"""Verbs on saved predictions, model files and finished runs: ensemble, evaluate, compare, report.

They need no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from threefold.arguments import split_names
from threefold.cli.console import out, plain, print_json, print_wrapped
from threefold.cli.options import Json
from threefold.cli.progress import progress_bar
from threefold.errors import DataError, shorten
from threefold.names import count_of
from threefold.runtime.hub import local_path

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


Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Labelled images that model files answer: a folder, an archive or a table.",
    ),
]
Card = Annotated[
    Path | None,
    typer.Option(
        "--card",
        help="For ONNX files of other programs: a TOML card (docs/formats.md).",
    ),
]
Evaluated = Annotated[
    list[Path],
    typer.Argument(
        help="A run folder, or predictions (.npz, .csv, .parquet), joined by row id; "
        "or model files (.onnx) and the labelled images that they answer."
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
    from threefold.evaluation import multilabel_saved

    if multilabel_saved.are_multilabel(sources):
        from threefold.cli.multilabel import show_summary

        multilabel_saved.refuse_options(labels=labels, classes=classes, top=top, reopen_test=reopen)
        scored = multilabel_saved.combine_multilabel(
            sources, split_names(method) or ["auto"], split_names(members)
        )
        show_summary(scored, as_json, html)
        return
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
    print_wrapped(f"< chosen: {evaluation.chosen} ({evaluation.reason})")
    for line in [*map(verdict_line, evaluation.comparisons), *evaluation.warnings]:
        print_wrapped(line, indent=2)
    if evaluation.optimism:
        out.print(optimism_table(evaluation.optimism))
    out.print(f"\n{expected_line(evaluation.expected)}", soft_wrap=False)
    _show_page(html)


def evaluate(
    sources: Evaluated,
    members: Members = None,
    labels: Labels = None,
    classes: Classes = None,
    as_json: Json = False,
    html: Html = None,
    data: Data = None,
    card: Card = None,
) -> None:
    """Score predictions or model files as they are: nothing is fitted or chosen."""
    models = find_models(sources, data, card)
    if models is None:
        from threefold.evaluation import multilabel_saved

        if multilabel_saved.are_multilabel(sources):
            from threefold.cli.multilabel import show_summary

            multilabel_saved.refuse_options(labels=labels, classes=classes)
            scored = multilabel_saved.score_multilabel(sources, split_names(members))
            show_summary(scored, as_json, html)
            return
        from threefold.evaluation.saved import score_saved

        summary, rows = score_saved(sources, split_names(members), labels=labels, classes=classes)
    else:
        _refuse_for_models(members=members, labels=labels, classes=classes)
        if _give_labels(models, card):
            _show_labels(models, "evaluate", as_json, html)
            return
        from threefold.runtime.score_models import score_models

        with progress_bar("images") as progress:
            summary, rows = score_models(models.paths, models.data, card, progress)
    best = max(range(len(rows.members)), key=lambda i: summary.scores[i].accuracy)
    _write_page(html, summary, rows.probs[best], rows.labels)
    if as_json:
        print_json(summary.as_json())
        return
    from threefold.cli.terminal import class_table, coverage_lines, score_table

    out.print(score_table(summary.scores))
    out.print(f"\nclasses, lowest recall first ({plain(summary.per_class_of)})")
    out.print(class_table(summary.per_class))
    notes = list(summary.warnings)
    if summary.diversity is not None:
        for names in summary.diversity.duplicates:
            notes.append(f"the same predictions under several names: {', '.join(names)}")
    for note in notes:
        print_wrapped(note, indent=2)
    if summary.audit is not None and summary.audit.n_suspects:
        first = summary.audit.suspects[0]
        print_wrapped(
            count_of(summary.audit.n_suspects, "label looks", "labels look")
            + " wrong, if these are held-out predictions "
            f"(--json or --html lists them); the first: {first.id}, {first.reason}",
            indent=2,
        )
    if summary.conformal is not None:
        for line in coverage_lines(summary.conformal):
            print_wrapped(line, indent=2)
    _show_page(html)


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="PATH or PATH:MEMBER, two or more; one PATH alone compares its members. "
            "PATH:A+B is the mean of members; A1,A2,A3 are seeds of one recipe. "
            "Or model files (.onnx), with --data."
        ),
    ],
    shared: Annotated[
        bool, typer.Option("--shared", help="Compare on the rows that all sources have.")
    ] = False,
    labels: Labels = None,
    classes: Classes = None,
    as_json: Json = False,
    html: Html = None,
    data: Data = None,
    card: Card = None,
) -> None:
    """Test every pair on the same rows, with Holm's correction."""
    models = find_models([Path(source) for source in sources], data, card)
    if models is None:
        from threefold.evaluation import multilabel_saved

        if multilabel_saved.are_multilabel(sources):
            from threefold.cli.multilabel import show_summary

            multilabel_saved.refuse_options(labels=labels, classes=classes)
            show_summary(multilabel_saved.compare_multilabel(sources, shared), as_json, html)
            return
        from threefold.evaluation.compare import compare_saved

        summary, rows = compare_saved(sources, shared, labels=labels, classes=classes)
    else:
        _refuse_for_models(shared=shared, labels=labels, classes=classes)
        if _give_labels(models, card):
            _show_labels(models, "compare", as_json, html)
            return
        from threefold.runtime.score_models import compare_models

        with progress_bar("images") as progress:
            summary, rows = compare_models(models.paths, models.data, card, progress)
    _write_page(html, summary, rows.probs[0], rows.labels)
    if as_json:
        print_json(summary.as_json())
        return
    from threefold.cli.terminal import pair_table, score_table, verdict_line

    out.print(score_table(summary.scores))
    out.print()
    out.print(pair_table(summary.comparisons))
    for pair in summary.comparisons:
        print_wrapped(verdict_line(pair), indent=2)
    if summary.cochran_q is not None:
        q = summary.cochran_q
        out.print(
            f"  all together: Cochran's Q {q['q']:.2f}, {q['df']:.0f} degrees of freedom, "
            f"p = {q['p']:.2g}"
        )
    for line in summary.warnings:
        print_wrapped(line, indent=2)
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


class ModelSources(NamedTuple):
    """Model files, and the labelled images that they answer."""

    paths: list[Path]
    data: Path


def find_models(
    sources: Sequence[Path], data: Path | None, card: Path | None
) -> ModelSources | None:
    """Tell model files and their images from predictions; None for predictions.

    Args:
        sources: what the command line names: model files and, without `data`, the images.
        data: the images, or None.
        card: of foreign model files, or None.

    Raises:
        DataError: model files without images, or with other sources.
    """
    sources = [local_path(path) for path in sources]
    models = [path for path in sources if path.suffix.lower() == ".onnx"]
    others = [path for path in sources if path.suffix.lower() != ".onnx"]
    if data is not None:
        # A run folder stands for the file that it has exported.
        models = [path / "model.onnx" if path.is_dir() else path for path in sources]
        others = [path for path in models if path.suffix.lower() != ".onnx"]
    elif not models:
        if card is not None:
            raise DataError("a card is for model files", where=card, fix="name a .onnx file")
        return None
    elif len(others) == 1:
        data = others.pop()
    if data is None or others:
        named = f"threefold evaluate {shlex.join(map(str, models))} FOLDER"
        raise DataError(
            "model files need labelled images to answer",
            where=models[0],
            expected="one folder, archive or table of images",
            got=shorten(map(str, others)) or "none",
            fix=f"type `{named}`, or name it with --data",
        )
    return ModelSources(models, data)


def _give_labels(models: ModelSources, card: Path | None) -> bool:
    """Whether model files give any number of labels; those of other programs give a class."""
    from threefold.runtime.score_labels import give_labels

    return card is None and give_labels(models.paths)


def _show_labels(models: ModelSources, verb: str, as_json: bool, html: Path | None) -> None:
    """Score or compare model files that give any number of labels, and show it."""
    from threefold.cli.multilabel import show_summary
    from threefold.runtime import score_labels

    answer = score_labels.score_label_models
    if verb == "compare":
        answer = score_labels.compare_label_models
    with progress_bar("images") as progress:
        scored = answer(models.paths, models.data, progress)
    show_summary(scored, as_json, html)


def _refuse_for_models(**options: object) -> None:
    """Refuse options that are about files of predictions."""
    given = [name for name, value in options.items() if value]
    if given:
        raise DataError(
            "an option for predictions, not for model files",
            got=", ".join(f"--{name}" for name in given),
            fix="leave it out; labels and classes are those of the images",
        )


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
