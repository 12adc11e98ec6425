"""Verbs about the installation itself: doctor, clean."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from threefold.cli.console import err, out, plain, print_json
from threefold.cli.options import Json
from threefold.errors import RunError

if TYPE_CHECKING:
    from threefold.predictions.run_check import RunCheck


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (doctor, clean):
        app.command()(verb)


def doctor(
    run: Annotated[
        Path | None,
        typer.Argument(help="Verify every file of this run folder, and nothing else."),
    ] = None,
    mend: Annotated[
        bool,
        typer.Option(
            "--mend", help="Delete damaged files of the run and make them again, by training."
        ),
    ] = False,
    speed: Annotated[
        bool, typer.Option("--speed", help="Also measure the machine, some seconds.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Examine the installation, or verify a run folder; exit code 1 with problems."""
    if run is not None:
        _verify_run(run, mend, as_json)
        return
    if mend:
        raise RunError("there is nothing to mend", fix="name the run folder")
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


def _verify_run(folder: Path, mend: bool, as_json: bool) -> None:
    """Verify every file of a run, and mend what can be made again."""
    from threefold.predictions.run_check import check_run

    check = check_run(folder)
    mended: list[str] = []
    if mend and any(fault.can_mend for fault in check.faults):
        mended = _mend_run(folder, check)
        check = check_run(folder)
    if as_json:
        faults = [{"path": str(f.path), "problem": f.problem} for f in check.faults]
        tree = {"verified": check.verified, "faults": faults, "mended": mended}
        print_json({**tree, "unknown": list(check.unknown)})
    else:
        for path in mended:
            out.print(f"mended  {plain(path)}")
        for fault in check.faults:
            out.print(f"[yellow]damaged[/] {plain(fault.problem)}")
        for name in check.unknown:
            out.print(f"note    {plain(folder / name)} is not a file of the run")
        out.print(f"{check.verified:,} files verified, {len(check.faults):,} damaged or missing")
        if any(fault.can_mend for fault in check.faults):
            out.print(f"mend with: threefold doctor {plain(shlex.quote(str(folder)))} --mend")
    if check.faults:
        raise SystemExit(1)


def _mend_run(folder: Path, check: RunCheck) -> list[str]:
    """Delete what is damaged and train, export and report as before; returns what was damaged."""
    from threefold.predictions.run_check import remove_damaged
    from threefold.predictions.run_folder import EXPORTED, RunFolder
    from threefold.recipe.recipe import Recipe

    names = [str(fault.path) for fault in check.faults if fault.can_mend]
    has = RunFolder.open(folder).has
    was_exported = all(map(has, EXPORTED))
    recipe = Recipe.load(folder / "recipe.toml")
    remove_damaged(folder, check)
    from threefold import api
    from threefold.training.progress.terminal_watcher import TerminalWatcher

    with TerminalWatcher(err) as watcher:
        run = api.train(recipe, folder, watcher)
        if was_exported:
            api.finish(run)
    return names


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
