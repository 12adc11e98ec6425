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
        Literal["features", "archives", "images", "shards", "files", "buckets", "verified", "all"],
        typer.Argument(
            help="What to delete: cached features, unpacked archives, copied images, where images "
            "are in shards, downloaded shards, copied folders of buckets, which images are known "
            "to be sound, or all."
        ),
    ] = "all",
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """Delete cached files; runs and images are never touched."""
    from threefold.files import cache_folder
    from threefold.machine import folder_size
    from threefold.runtime.doctor import CACHES, remove_cache

    kinds = CACHES if kind == "all" else (kind,)
    sizes = {name: folder_size(cache_folder(name)) for name in kinds}
    for name, size in sizes.items():
        out.print(f"{name:10}{size / 1e9:8.2f} GB  {cache_folder(name)}", markup=False)
    if not any(sizes.values()):
        out.print("nothing to delete")
        return
    if not yes and not _is_confirmed():
        err.print("nothing was deleted; --yes deletes without asking")
        raise SystemExit(1)
    freed = sum(remove_cache(name) for name in kinds)
    out.print(f"freed {freed / 1e9:.2f} GB")


def _is_confirmed() -> bool:
    """Ask; without a terminal or with Ctrl-C the answer is no."""
    try:
        return typer.confirm("Delete? It is computed or downloaded again when it is needed.")
    except typer.Abort:
        err.print()
        return False
