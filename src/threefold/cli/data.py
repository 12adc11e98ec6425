"""The verbs about data sets and the paper: `data fetch`, `data check`, `reproduce`. No logic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from threefold.cli.console import err, out, print_json

if TYPE_CHECKING:
    from threefold.data.check import DataCheck
    from threefold.data.download import ProgressCallback
    from threefold.paper.scales import Protocol, Scale

_MARKS = {"error": "[bold red]error[/]", "warning": "[yellow]warning[/]", "note": "note"}


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line.

    Args:
        app: the command line.
    """
    data = typer.Typer(
        no_args_is_help=True, help="Get a published data set, or look at one before training on it."
    )
    data.command("fetch")(fetch)
    data.command("check")(check)
    app.add_typer(data, name="data")
    app.command("reproduce")(reproduce)


def fetch(
    name: Annotated[str, typer.Argument(help="A published data set: see `threefold list data`.")],
    to: Annotated[Path | None, typer.Option("--to", help="The folder (default data/NAME).")] = None,
    extra: Annotated[
        bool, typer.Option("--extra", help="Also the files that data.extra needs.")
    ] = False,
    accept: Annotated[
        bool, typer.Option("--accept-licence", help="You accept the terms that are shown.")
    ] = False,
) -> None:
    """Get a data set from where it is published: resumed, checked against its checksum, unpacked safely."""
    from threefold.data import download
    from threefold.data.published import find_published

    known, folder = find_published(name), to or Path("data") / name
    out.print(f"{known.title}: {known.homepage}\nterms: {known.licence}", markup=False)
    with _Download() as on_progress:
        paths = download.fetch(
            name, folder, extra=extra, accept_licence=accept, on_progress=on_progress
        )
    for path in paths:
        out.print(f"{path}  {path.stat().st_size / 1e6:.1f} MB", markup=False)
    out.print(
        f'next   threefold data check {folder} --as {name}\n       data.source = "{name}", data.root = "{folder}"',
        markup=False,
    )


class _Download:
    """A progress bar on a terminal, nothing elsewhere."""

    def __enter__(self) -> ProgressCallback:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
        )
        self.bar = Progress(*columns, console=out, transient=True, disable=not out.is_terminal)
        self.tasks: dict[str, Any] = {}
        self.bar.start()
        return self._told

    def _told(self, name: str, there: int, total: int) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(name, total=total or None)
        self.bar.update(self.tasks[name], completed=there)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def check(
    source: Annotated[
        str, typer.Argument(help="A folder, archive, CSV or parquet file, a recipe, or `demo`.")
    ],
    kind: Annotated[
        str, typer.Option("--as", help="The data set that lies there, if its files do not tell.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Say what a data set holds: classes, sizes, files that cannot be read, copies, groups. Exit code 1 if a run would stop."""
    from threefold.data.check import check_data, find_spec

    found = check_data(find_spec(source, kind))
    if as_json:
        print_json(
            {
                **found._asdict(),
                "findings": [f._asdict() for f in found.findings],
                "usable": found.usable,
            }
        )
    else:
        _show_check(found)
    if not found.usable:
        raise SystemExit(1)


def _show_check(found: DataCheck) -> None:
    parts = {
        part: sum(c.get(part, 0) for c in found.classes.values()) for part in ("train", "test")
    }
    if found.classes:
        counts = [c["train"] for c in found.classes.values()]
        test = f", {parts['test']:,} test images" if parts["test"] else ", no test images"
        out.print(
            f"{parts['train']:,} training images{test}, {len(found.classes)} classes ({min(counts):,} to {max(counts):,} training images each)"
        )
        sizes = [f"{size} ({count})" for size, count in list(found.sizes.items())[:5]]
        out.print(
            f"sizes, of {sum(found.sizes.values())} looked at: {', '.join(sizes)}{' ...' if len(found.sizes) > 5 else ''}"
        )
    if found.groups:
        out.print(
            f"{len(found.groups)} groups of {min(found.groups.values()):,} to {max(found.groups.values()):,} training images"
        )
    for finding in found.findings:
        out.print(f"{_MARKS[finding.level]} {escape(finding.what)}")
    out.print("a run could begin" if found.usable else "a run would stop here")


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
        int, typer.Option("--seeds", min=1, help="Train with so many seeds, and compare over them.")
    ] = 1,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change one recipe value."),
    ] = None,
) -> None:
    """Run a table or figure of the paper again, and show it beside the paper's values."""
    from threefold.paper.items import item
    from threefold.paper.scales import check_words

    if name == "list":
        _show_items(Path("runs/reproduce"))
        return
    known = item(name)
    which: tuple[Scale, Protocol] = check_words(scale, protocol)
    folder = out_dir or Path("runs/reproduce") / f"{known.name}-{scale}-{protocol}"
    from threefold.cli.terminal import TerminalWatcher
    from threefold.paper import reproduce as again  # torch from here on
    from threefold.paper.figures import draw_figure

    asked = again.Asked(known, *which, folder, data, seeds, tuple(sets or ()))
    try:
        with TerminalWatcher(out) as watcher:
            found = again.reproduce(asked, watcher)
    except KeyboardInterrupt:
        err.print("[yellow]stopped[/]; what is done is kept. The same command goes on")
        raise SystemExit(130) from None
    _show_found(found)
    out.print(
        f"\nfigure {draw_figure(found, folder / 'reproduce.png')}\nvalues {folder / 'reproduce.json'}",
        markup=False,
    )


def _show_items(root: Path) -> None:
    from threefold.paper.items import PICTURES, SAME, states

    lines = states(root)
    done = any(line["state"] != "not run" for line in lines)
    names = ("item", "what", "data", *([f"run here, in {root}"] if done else []))
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in names:
        table.add_column(column, no_wrap=column == "item")
    for line in lines:
        table.add_row(
            *(escape(line[key]) for key in ("name", "title", "data", "state")[: len(names)])
        )
    for figure, same in SAME.items():
        table.add_row(figure, f"the values of {same}")
    for figure, what in PICTURES.items():
        table.add_row(figure, f"{what}; no values")
    out.print(table)
    if not done:
        out.print(f"none of them has been run in {root}", markup=False)
    out.print(
        "next   threefold reproduce ITEM [--scale full|small|smoke] [--protocol honest|paper] [--data FOLDER]",
        markup=False,
    )


def _show_found(found: Mapping[str, Any]) -> None:
    """Our values beside the paper's, then the tests and what has to be said."""
    kinds = {_kind(cell) for cell in found["cells"] if cell["ours"] is not None}
    one = f", {kinds.pop()} images" if len(kinds) == 1 else ""
    out.print(
        f"{found['title']}: {found['scale']}, protocol {found['protocol']}, {len(found['seeds'])} seed{'s' * (len(found['seeds']) > 1)}{one}"
    )
    network = found["scale"] == "small"  # what stands in for the one in the row's name
    table = _table(
        "",
        "paper",
        "ours",
        "95 % interval",
        *([] if one else ["rows"]),
        *(["network here"] if network else []),
    )
    for cell in found["cells"]:
        there = cell["ours"] is not None
        kind = [] if one else [_kind(cell) if there else ""]
        table.add_row(
            escape(f"{cell['row']} {cell['column']}".strip()),
            *_figures(cell),
            *kind,
            *([_network(cell)] if network else []),
        )
    out.print(table)
    if found["stages"]:
        _show_stages(found["stages"])
    for line in found["comparisons"]:
        low, high = line["interval"]
        out.print(
            f"  {escape(line['a'])} - {escape(line['b'])}: {line['difference']:+.4f} ({low:+.4f} to {high:+.4f}); {escape(line['verdict'])}"
        )
    for note in found["notes"]:
        out.print(f"[yellow]note[/] {escape(note)}")


def _table(*names: str) -> Table:
    """A table whose first columns are words and whose others are figures; nothing is broken over lines while it fits."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in names:
        words = name in ("", "rows", "network here", "run", "member", "stage")
        table.add_column(
            name, justify="left" if words else "right", no_wrap=True, min_width=None if words else 6
        )
    return table


def _kind(cell: Mapping[str, Any]) -> str:
    return f"{cell['n']:,} {cell['rows']}"


def _network(cell: Mapping[str, Any]) -> str:
    """timm's name without where its weights are from."""
    joined = str(cell.get("backbone", "")).split(" + ")
    return (
        f"{len(joined)} joined"
        if len(joined) > 1
        else escape(joined[0].partition(".")[0].removeprefix("tf_"))
    )


def _figures(cell: Mapping[str, Any]) -> Sequence[str]:
    paper = f"{cell['paper']:.4f}" if cell["paper"] is not None else "-"
    if cell["ours"] is None:
        return paper, "-", "not run here"
    low, high = cell["interval"]
    return paper, f"{cell['ours']:.4f}", f"{low:.4f} - {high:.4f}"


def _show_stages(stages: Sequence[Mapping[str, Any]]) -> None:
    """The best epoch of every stage on the select rows, mean over folds."""
    runs = ["run"] if len({s["run"] for s in stages}) > 1 else []
    table = _table(*runs, "member", "stage", "rate", "authors", "select rows", "folds kept")
    for s in stages:
        paper = f"{s['paper']:.4f}" if s["paper"] is not None else "-"
        table.add_row(
            *(s[key] for key in runs),
            s["member"],
            s["stage"],
            f"{s['lr']:g}",
            paper,
            f"{s['best']:.4f}",
            f"{s['kept']} of {s['folds']}",
        )
    out.print(table)
