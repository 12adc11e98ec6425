"""The verbs about data sets: `data fetch` and `data check`. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from threefold.cli.console import out, print_json

if TYPE_CHECKING:
    from threefold.data.check import DataCheck
    from threefold.data.download import ProgressCallback

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
