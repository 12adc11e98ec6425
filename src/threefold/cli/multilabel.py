"""The terminal: results of several labels per image, in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from threefold.cli.console import out, plain, print_json
from threefold.cli.terminal import cell_name, plain_table, verdict_line

if TYPE_CHECKING:
    from threefold.evaluation.multilabel_saved import ScoredAnswers
    from threefold.predictions.multilabel_results import (
        LabelScore,
        MultilabelComparison,
        MultilabelExpected,
        MultilabelOptimism,
        MultilabelResults,
        MultilabelScore,
    )

LABELS = 12
"""Largest number of labels in the table; JSON and page list all of them."""

_METRICS = {"macro_f1": "macro F1", "mean_average_precision": "mean average precision"}


def score_table(scores: Sequence[MultilabelScore], chosen: str | None = None) -> Table:
    """Return a table of scores, with ensembles in bold and the chosen one marked.

    Its columns are the mean average precision with its interval, macro F1, and the share of images
    that are given exactly their labels.
    """
    table = plain_table(("", "rows"), ("mAP", "95 % interval", "macro F1", "all right %"))
    for s in scores:
        name = cell_name(s.name)
        if s.kind == "ensemble":
            name = f"[bold]{name}[/]"
            if s.name == chosen:
                name += " [bold green]<[/]"
        low, high = s.mean_average_precision_interval
        table.add_row(
            name,
            f"{'given' if s.rows == 'foreign' else s.rows} {s.n}",
            f"{s.mean_average_precision:.4f}",
            f"{low:.4f} - {high:.4f}",
            f"{s.macro_f1:.4f}",
            f"{100 * s.subset_accuracy:.1f}",
        )
    return table


def label_table(labels: Sequence[LabelScore], limit: int = LABELS) -> Table:
    """Return a table of the labels with the lowest average precision."""
    has_thresholds = any(label.threshold is not None for label in labels)
    numbers = ["images", "AP", "95 % interval", "F1", "ECE"]
    table = plain_table(("",), [*numbers, "threshold"] if has_thresholds else numbers)
    known = [(s.average_precision, s) for s in labels if s.average_precision is not None]
    known.sort(key=lambda pair: pair[0])
    for precision, s in known[:limit]:
        low, high = s.average_precision_interval or (0.0, 1.0)
        cells = [
            f"{s.n:,}",
            f"{precision:.3f}",
            f"{low:.3f} - {high:.3f}",
            "-" if s.f1 is None else f"{s.f1:.3f}",
            f"{s.ece:.3f}",
        ]
        if s.threshold is not None:
            cells.append(f"{s.threshold:.3f}")
        table.add_row(cell_name(s.name), *cells)
    if len(known) > limit:
        table.add_row(f"[dim]and {len(known) - limit} more[/]")
    return table


def pair_table(pairs: Sequence[MultilabelComparison]) -> Table:
    """Return a table of paired comparisons: differences of mAP and macro F1, and p after Holm."""
    table = plain_table(("A", "B"), ("mAP", "95 % interval", "macro F1", "Holm p"))
    for pair in pairs:
        low, high = pair.interval
        table.add_row(
            *(cell_name(name, 15) for name in (pair.a, pair.b)),
            f"{pair.difference:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
            f"{pair.f1_difference:+.4f}",
            f"{pair.p:.2g}",
        )
    return table


def expected_lines(expected: MultilabelExpected, protocol: str = "") -> list[str]:
    """Return what to expect on new images as Rich markup, one figure a line."""
    figures = (
        ("mean average precision", "mean_average_precision"),
        ("macro F1", "macro_f1"),
    )
    lines = []
    for words, name in figures:
        value, (low, high) = getattr(expected, name), getattr(expected, f"{name}_interval")
        lines.append(
            f"Expect {words} [bold]{value:.3f}[/] on new images "
            f"(95 % interval {low:.3f} to {high:.3f})."
        )
    low, high = expected.subset_accuracy_interval
    lines.append(
        f"Expect [bold]{expected.subset_accuracy:.1%}[/] of them to get exactly their labels "
        f"({low:.1%} to {high:.1%})."
    )
    source = f"Measured on {expected.n:,} {escape(expected.basis)}"
    return [*lines, f"{source}; protocol {protocol}." if protocol else f"{source}."]


def optimism_line(line: MultilabelOptimism) -> str:
    """Say how much better a choice looks on the rows that it was made on."""
    return (
        f"optimism of {line.description}: {_METRICS[line.metric]} {line.apparent:.4f} on the rows "
        f"of the choice, {line.honest:.4f} on others"
    )


def show_results(results: MultilabelResults) -> None:
    """Print scores, the chosen ensemble, its labels, and what to expect on new images."""
    out.print(score_table(results.scores, results.chosen))
    out.print(f"< chosen: {results.chosen} ({plain(results.chosen_reason)})")
    out.print(f"\nlabels, lowest average precision first ({results.chosen})")
    out.print(label_table(results.per_label))
    if results.expected is not None:
        out.print()
        for line in expected_lines(results.expected, results.protocol):
            out.print(line)
    for entry in results.optimism:
        out.print(optimism_line(entry))


def show_summary(scored: ScoredAnswers, as_json: bool, html: Path | None) -> None:
    """Print what `ensemble`, `evaluate` and `compare` measured, and write their page."""
    summary = scored.summary
    if html is not None:
        from threefold.report.multilabel_pages import write_multilabel_page

        title = ", ".join(Path(source).name for source in summary.source)
        write_multilabel_page(html, title, summary, scored.rows.targets, scored.answer)
    if as_json:
        print_json(summary.as_json())
        return
    out.print(score_table(summary.scores, summary.chosen))
    if summary.chosen is not None:
        out.print(f"< chosen: {summary.chosen} ({plain(summary.chosen_reason)})")
    if summary.kind == "compare":
        out.print()
        out.print(pair_table(summary.comparisons))
    else:
        name = plain(summary.per_label_of or "")
        out.print(f"\nlabels, lowest average precision first ({name})")
        out.print(label_table(summary.per_label))
    for line in [*map(verdict_line, summary.comparisons), *summary.warnings]:
        out.print(f"  {plain(line)}")
    for entry in summary.optimism:
        out.print(f"  {optimism_line(entry)}")
    if summary.expected is not None:
        out.print()
        for line in expected_lines(summary.expected):
            out.print(line)
    if html is not None:
        out.print(f"page   {html}", markup=False)
