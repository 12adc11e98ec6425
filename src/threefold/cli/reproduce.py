"""The verb `reproduce`: run a table or figure of the paper again. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from threefold.cli.console import out, print_wrapped
from threefold.cli.options import Address, Executor, Sets
from threefold.cli.output import executor_words, resume_command, watch_training
from threefold.lazy import importing_for_good

if TYPE_CHECKING:
    from threefold.paper.results import CellResult, ItemResults

_TEXT_COLUMNS = ("", "rows", "network here", "run", "member", "stage")


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("reproduce")(reproduce)


def reproduce(
    name: Annotated[
        str,
        typer.Argument(metavar="ITEM", help="A table or figure of the paper; `list` names them."),
    ] = "list",
    scale: Annotated[
        str,
        typer.Option("--scale", help="full, small (CPU, within an hour) or smoke (made-up data)."),
    ] = "small",
    protocol: Annotated[
        str,
        typer.Option(
            "--protocol", help="honest, or paper: chosen on the test split, as the authors did."
        ),
    ] = "honest",
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder of the runs (default runs/reproduce/ITEM-SCALE-PROTOCOL)."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Where the data set lies: official files, class folders, or a CSV file."
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Number of seeds to train and compare over.")
    ] = 1,
    sets: Sets = None,
    executor: Executor = "local",
    address: Address = "",
) -> None:
    """Run a table or figure of the paper again, beside its values."""
    from threefold.paper.items import find_item
    from threefold.paper.scales import check_words

    if name == "list":
        _show_items(Path("runs/reproduce"))
        return
    item = find_item(name)
    known_scale, known_protocol = check_words(scale, protocol)
    folder = out_dir or Path("runs/reproduce") / f"{item.name}-{scale}-{protocol}"
    with importing_for_good():
        from threefold.paper.figures import draw_figure
        from threefold.paper.reproduce import Reproduction, reproduce_item
        from threefold.training.execution import Execution

    plan = Reproduction(
        item=item,
        scale=known_scale,
        protocol=known_protocol,
        out=folder,
        data=data,
        seeds=seeds,
        overrides=tuple(sets or ()),
        execution=Execution(executor, address),
    )
    words: list[object] = ["reproduce", name, "--scale", scale, "--protocol", protocol]
    words += ["--out", folder, "--seeds", seeds]
    if data is not None:
        words += ["--data", data]
    words += executor_words(executor, address)
    command = resume_command(*words, sets=sets)
    with watch_training(verbose=False, command=command) as watcher:
        results = reproduce_item(plan, watcher)
    show_results(results)
    figure = draw_figure(results, folder / "reproduce.png")
    out.print(f"\nfigure {figure}\nvalues {folder / 'reproduce.json'}", markup=False)


def _show_items(root: Path) -> None:
    from threefold.paper.items import FIGURES_WITHOUT_VALUES, TABLE_OF_FIGURE, list_items

    states = list_items(root)
    any_run = any(state.runs for state in states)
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("item", no_wrap=True)
    table.add_column("what")
    table.add_column("data")
    if any_run:
        table.add_column(f"run here, in {root}")
    for item, runs in states:
        cells = [item.name, item.title, ", ".join(item.sources)]
        if any_run:
            cells.append("; ".join(runs) or "not run")
        table.add_row(*map(escape, cells))
    for figure, name in TABLE_OF_FIGURE.items():
        table.add_row(figure, f"the values of {name}")
    for figure, shown in FIGURES_WITHOUT_VALUES.items():
        table.add_row(figure, f"{shown}; no values")
    out.print(table)
    if not any_run:
        out.print(f"none of them has been run in {root}", markup=False)
    out.print(
        "next   threefold reproduce ITEM [--scale full|small|smoke] "
        "[--protocol honest|paper] [--data FOLDER]",
        markup=False,
    )


def show_results(results: ItemResults) -> None:
    """Show our values beside the paper's, then the tests and the notes."""
    measured = [cell for cell in results.cells if cell.ours is not None]
    rows = {_describe_rows(cell) for cell in measured}
    seeds = f"{len(results.seeds)} seed{'s' if len(results.seeds) > 1 else ''}"
    heading = f"{results.title}: {results.scale}, protocol {results.protocol}, {seeds}"
    if len(rows) == 1:
        heading += f", {rows.pop()} images"
        show_rows = False
    else:
        show_rows = True
    out.print(heading)
    show_network = results.scale == "small"  # the one that replaces the network of the row's name
    names = ["", "paper", "ours", "95 % interval"]
    if show_rows:
        names.append("rows")
    if show_network:
        names.append("network here")
    table = _table(*names)
    for cell in results.cells:
        columns = [escape(cell.label), *_figures(cell)]
        if show_rows:
            columns.append(_describe_rows(cell) if cell.ours is not None else "")
        if show_network:
            columns.append(_describe_network(cell))
        table.add_row(*columns)
    out.print(table)
    if results.stages:
        _show_stages(results)
    for c in results.comparisons:
        low, high = c.interval
        out.print(
            f"  {escape(c.a)} - {escape(c.b)}: {c.difference:+.4f} ({low:+.4f} to {high:+.4f}); "
            f"{escape(c.verdict)}"
        )
    for note in results.notes:
        print_wrapped(note, "[yellow]note[/]")


def _table(*names: str) -> Table:
    """Return a table of text columns and right-aligned figures, without line breaks in cells."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in names:
        if name in _TEXT_COLUMNS:
            table.add_column(name, no_wrap=True)
        else:
            table.add_column(name, justify="right", no_wrap=True, min_width=6)
    return table


def _describe_rows(cell: CellResult) -> str:
    return f"{cell.n:,} {cell.rows}"


def _describe_network(cell: CellResult) -> str:
    """Return timm's name without the tag of its weights, or the number of joined networks."""
    networks = (cell.backbone or "").split(" + ")
    if len(networks) > 1:
        return f"{len(networks)} joined"
    return escape(networks[0].partition(".")[0].removeprefix("tf_"))


def _figures(cell: CellResult) -> tuple[str, str, str]:
    """Return the paper's value, ours, and our interval."""
    paper = f"{cell.paper:.4f}" if cell.paper is not None else "-"
    if cell.ours is None or cell.interval is None:
        return paper, "-", "not run here"
    low, high = cell.interval
    return paper, f"{cell.ours:.4f}", f"{low:.4f} - {high:.4f}"


def _show_stages(results: ItemResults) -> None:
    """Show the best epoch of every stage on the select rows, the mean over folds."""
    several_runs = len({stage.run for stage in results.stages}) > 1
    names = ["member", "stage", "rate", "authors", "select rows", "folds kept"]
    table = _table(*(["run"] if several_runs else []), *names)
    for stage in results.stages:
        columns = [
            stage.member,
            stage.stage,
            f"{stage.lr:g}",
            f"{stage.paper:.4f}" if stage.paper is not None else "-",
            f"{stage.best:.4f}",
            f"{stage.accepted} of {stage.folds}",
        ]
        if several_runs:
            columns.insert(0, stage.run)
        table.add_row(*columns)
    out.print(table)
