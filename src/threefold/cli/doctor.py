"""Verbs about the installation itself: doctor, clean."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from threefold.cli.console import err, out, plain, print_json
from threefold.cli.options import Json


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (doctor, clean):
        app.command()(verb)


def doctor(
    speed: Annotated[
        bool, typer.Option("--speed", help="Also measure the machine, some seconds.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Examine the installation: versions, devices, disk, caches; exit code 1 with problems."""
    from threefold.runtime.doctor import examine

    problems, section, records = 0, "", []
    for finding in examine(speed):
        problems += bool(finding.problem)
        records.append(finding._asdict())
        if as_json:
            continue
        if finding.section != section:
            section = finding.section
            out.print(f"[bold]{section}[/]")
        out.print(f"  {finding.name:24}{plain(finding.value)}")
        if finding.problem:
            out.print(f"  [yellow]{'problem':24}{plain(finding.problem)}[/]")
    if as_json:
        print_json(records)
    elif not problems:
        out.print("no problems found")
    if problems:
        raise SystemExit(1)


def clean(
    kind: Annotated[
        Literal["features", "archives", "all"],
        typer.Argument(help="What to delete: cached features, unpacked archives, or both."),
    ] = "all",
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """Delete cached files; runs and images are never touched."""
    from threefold.files import cache_folder
    from threefold.machine import folder_size
    from threefold.runtime.doctor import CACHES, remove_cache

    kinds = CACHES if kind == "all" else (kind,)
    for name in kinds:
        folder = cache_folder(name)
        out.print(f"{name:10}{folder_size(folder) / 1e9:8.2f} GB  {folder}", markup=False)
    if not yes and not typer.confirm("Delete? It is computed again when it is needed."):
        err.print("nothing was deleted")
        raise SystemExit(1)
    freed = sum(remove_cache(name) for name in kinds)
    out.print(f"freed {freed / 1e9:.2f} GB")
