"""The terminal: the tables of results, in 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from threefold.names import printable
from threefold.predictions.multilabel_results import MultilabelComparison
from threefold.predictions.results_schema import (
    ClassScore,
    Comparison,
    Conformal,
    DistillationResults,
    Expected,
    Optimism,
    Score,
    ShortScore,
)

NAME = 22
"""Characters of a name in a table. Of longer names the ends are shown, which differ more often."""


def plain_table(text: Sequence[str], numbers: Sequence[str], title: str | None = None) -> Table:
    """Return a table without lines: columns of text, then right-aligned numbers."""
    table = Table(
        box=None,
        header_style="dim",
        pad_edge=False,
        title=title,
        title_style="dim",
        title_justify="left",
    )
    for name in text:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


_SCORE_COLUMNS = ("accuracy %", "95 % interval", "log loss", "ECE")


def score_table(scores: Sequence[Score], chosen: str | None = None) -> Table:
    """Return a table of scores, with ensembles in bold and the chosen one marked."""
    table = plain_table(("", "rows"), _SCORE_COLUMNS)
    shown = _without_repetitions(scores, chosen)
    for s in shown:
        name = cell_name(s.name)
        if s.kind == "ensemble":
            name = f"[bold]{name}[/]"
            if s.name == chosen:
                name += " [bold green]<[/]"
        rows = "given" if s.rows == "foreign" else s.rows
        table.add_row(name, f"{rows} {s.n}", *_figures(s))
    if len(shown) < len(scores):
        table.add_row("[dim]others are the member[/]")
    return table


def _without_repetitions(scores: Sequence[Score], chosen: str | None) -> list[Score]:
    """Leave out ensembles of a single member that are that member, but for the chosen one."""
    members = {s.rows: s for s in scores if s.kind == "member"}
    if len({s.name for s in scores if s.kind == "member"}) != 1:
        return list(scores)
    return [
        s
        for s in scores
        if s.kind != "ensemble"
        or s.name == chosen
        or s.rows not in members
        or _figures(s) != _figures(members[s.rows])
    ]


def _figures(s: Score | ShortScore) -> list[str]:
    """Return the cells of _SCORE_COLUMNS."""
    low, high = s.interval
    return [
        f"{100 * s.accuracy:.2f}",
        f"{100 * low:.2f} - {100 * high:.2f}",
        f"{s.log_loss:.3f}",
        f"{s.ece:.3f}",
    ]


def class_table(classes: Sequence[ClassScore], limit: int = 12) -> Table:
    """Return a table of the classes with the lowest recall; JSON and page list all of them."""
    numbers = ("images", "recall %", "95 % interval", "precision %", "F1")
    table = plain_table(("",), numbers)
    known = [(c.recall, c) for c in classes if c.recall is not None]
    known.sort(key=lambda pair: pair[0])
    for recall, c in known[:limit]:
        low, high = c.interval
        table.add_row(
            cell_name(c.name),
            f"{c.n:,}",
            f"{100 * recall:.1f}",
            f"{100 * low:.1f} - {100 * high:.1f}",
            "-" if c.precision is None else f"{100 * c.precision:.1f}",
            "-" if c.f1 is None else f"{c.f1:.3f}",
        )
    if len(known) > limit:
        table.add_row(f"[dim]and {len(known) - limit} more[/]")
    return table


def pair_table(pairs: Sequence[Comparison]) -> Table:
    """Return a table of paired comparisons.

    Its columns are the images that only one of the two has right, the difference with its interval,
    and p after Holm's correction.
    """
    table = plain_table(("A", "B"), ("A only", "B only", "points", "95 % interval", "Holm p"))
    for pair in pairs:
        assert pair.difference is not None
        assert pair.interval is not None
        low, high = pair.interval
        counts = ["-" if n is None else f"{n:,}" for n in (pair.only_a, pair.only_b)]
        figures = [
            f"{100 * pair.difference:+.2f}",
            f"{100 * low:+.2f} to {100 * high:+.2f}",
            f"{pair.p:.2g}",
        ]
        names = [cell_name(name, 13) for name in (pair.a, pair.b)]
        table.add_row(*names, *counts, *figures)
    return table


def optimism_table(lines: Sequence[Optimism]) -> Table:
    """Return a table of each choice's accuracy on the rows it was made on, and on others."""
    table = plain_table(
        ("choice",),
        ("apparent", "honest", "difference", "95 % interval"),
        title="optimism: accuracy in % on the rows of the choice, and on others",
    )
    for line in lines:
        assert line.interval is not None
        low, high = (f"{100 * end:+.2f}" for end in line.interval)
        figures = [
            f"{100 * line.apparent:.2f}",
            f"{100 * line.honest:.2f}",
            f"{100 * line.difference:+.2f}",
        ]
        table.add_row(escape(line.description), *figures, f"{low} to {high}")
    return table


def distill_tables(distillation: DistillationResults) -> list[Table]:
    """Return the scores of student, twin and teacher for each kind of rows, then their costs."""
    tables = []
    for part in distillation.tables:
        table = plain_table(("", "rows"), _SCORE_COLUMNS)
        for s in part.scores:
            table.add_row(cell_name(s.name), f"{part.rows} {s.n}", *_figures(s))
        tables.append(table)
    return [*tables, _cost_table(distillation)]


def _cost_table(distillation: DistillationResults) -> Table:
    """Return weights, multiply-adds and bytes, each also as a multiple of the student's."""
    own = next(line for line in distillation.costs if line.name == distillation.student)
    table = plain_table(("cost per image",), ("weights", "", "multiply-adds", "", "file", ""))
    for line in distillation.costs:
        row = []
        for value, own_value, unit in (
            (line.parameters, own.parameters, "M"),
            (line.macs, own.macs, "M"),
            (line.bytes, own.bytes, "MB"),
        ):
            if value is None or own_value is None:
                row += ["", ""]
            else:
                row += [f"{value / 1e6:,.1f} {unit}", f"{value / own_value:.1f} x"]
        table.add_row(cell_name(line.name), *row)
    return table


def cell_name(name: str, limit: int = NAME) -> str:
    """Return a name for a cell of a table, as Rich markup."""
    name = printable(name)
    return escape(name if len(name) <= limit else "…" + name[1 - limit :])


def coverage_lines(conformal: Conformal) -> list[str]:
    """Say how often prediction sets contain the right class, and how often images are unknown."""
    lines = []
    for sets in conformal.sets:
        kind = "sets by class" if sets.by_class else "sets"
        low, high = sets.interval
        lines.append(
            f"{1 - conformal.alpha:.0%} {kind}: contain the right class of {sets.coverage:.1%} "
            f"[{low:.1%}, {high:.1%}] of the images, with {sets.mean_size:.1f} classes on average"
        )
    if conformal.unknown is not None:
        unknown = conformal.unknown
        lines.append(
            f"called unknown: {unknown.measured:.1%} of the images; of known classes, "
            f"{unknown.rate:.0%} are expected"
        )
    return lines


def verdict_line(pair: Comparison | MultilabelComparison) -> str:
    """Return a comparison's verdict as a sentence that names both, also if neither is better."""
    if pair.verdict.startswith((f"{pair.a} ", f"{pair.b} ")):
        return pair.verdict
    return f"{pair.a} and {pair.b}: {pair.verdict}"


def expected_line(expected: Expected, protocol: str = "") -> str:
    """Return the metric and the accuracy to expect on new images as Rich markup."""
    low, high = expected.interval
    source = f"{expected.n:,} {escape(expected.basis)}"
    if protocol:
        source += f", protocol {protocol}"
    first = ""
    if expected.metric is not None:
        metric, (least, most) = expected.metric, expected.metric.interval
        first = (
            f"Expect {metric.words} [bold]{metric.value:.3f}[/] on new images "
            f"(95 % interval {least:.3f} to {most:.3f}).\n"
        )
    return first + (
        f"Expect [bold]{expected.accuracy:.1%}[/] of new images to be right "
        f"(95 % interval {low:.1%} to {high:.1%}; {source})."
    )
