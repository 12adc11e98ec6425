"""The verbs about data sets: `data fetch`, `check`, `review`, `export`. No logic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from threefold.cli.console import out, plain, print_json, print_wrapped
from threefold.cli.options import Json
from threefold.cli.progress import count_bars
from threefold.cli.verb_group import DataVerbGroup
from threefold.files import real_path
from threefold.names import count_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import TaskID

    from threefold.data.check import DataCheck
    from threefold.data.download import ProgressCallback
    from threefold.data.quality import QualityFinding

DataSets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="data.KEY=VALUE",
        help="Change how the images are read, e.g. data.label_column=breed; may be repeated.",
    ),
]

_LISTED = 10
"""Images that stand out in the table of `data check`; --json has all."""

_MARKS = {"error": "[bold red]error[/]", "warning": "[yellow]warning[/]", "note": "note"}


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    data = typer.Typer(
        cls=DataVerbGroup,
        no_args_is_help=True,
        help="Get a published data set, check one, and review what looks wrong in it.",
    )
    data.command("fetch")(fetch)
    data.command("check")(check)
    data.command("review")(review)
    data.command("export")(export)
    app.add_typer(data, name="data")


def fetch(
    name: Annotated[str, typer.Argument(help="A published data set: see `threefold list data`.")],
    to: Annotated[Path | None, typer.Option("--to", help="The folder (default data/NAME).")] = None,
    extra: Annotated[
        bool, typer.Option("--extra", help="Also fetch the files that data.extra needs.")
    ] = False,
    accept: Annotated[
        bool, typer.Option("--accept-licence", help="Accept the terms of the data set.")
    ] = False,
) -> None:
    """Download a published data set: resume, verify the checksum, unpack safely."""
    from threefold.data import download
    from threefold.data.published import find_published

    dataset, folder = find_published(name), to or Path("data") / name
    out.print(f"{dataset.title}: {dataset.homepage}", markup=False)
    out.print(f"terms: {dataset.licence}", markup=False)
    with _DownloadBar() as on_progress:
        paths = download.fetch(
            name, folder, extra=extra, accept_licence=accept, on_progress=on_progress
        )
    for path in paths:
        out.print(f"{path}  {path.stat().st_size / 1e6:.1f} MB", markup=False)
    out.print(f"next   threefold data check {folder} --as {name}", markup=False)
    out.print(f'       data.source = "{name}", data.root = "{folder}"', markup=False)


class _DownloadBar:
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
        self.tasks: dict[str, TaskID] = {}
        self.bar.start()
        return self._update

    def _update(self, name: str, bytes_done: int, bytes_total: int) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(name, total=bytes_total or None)
        self.bar.update(self.tasks[name], completed=bytes_done)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def check(
    source: Annotated[str, typer.Argument(help="Images as for fit, a recipe, or `demo`.")],
    kind: Annotated[
        str, typer.Option("--as", help="The kind of data set, if its files do not show it.")
    ] = "",
    sets: DataSets = None,
    as_json: Json = False,
) -> None:
    """Check a data set: classes, sizes, unreadable files, copies, groups, odd images.

    Odd images stand out from the others: blurred, dark, bright, of one colour, oddly sized.
    The exit code is 1 if a run would stop.
    """
    from threefold.data.check import check_data, find_spec

    with count_bars():
        report = check_data(find_spec(source, kind, sets or ()))
    if as_json:
        findings = [finding._asdict() for finding in report.findings]
        quality = [finding._asdict() for finding in report.quality]
        extra = {"findings": findings, "quality": quality, "usable": report.usable}
        print_json({**report._asdict(), **extra})
    else:
        _show_check(report)
    if not report.usable:
        raise SystemExit(1)


def review(
    source: Annotated[
        str, typer.Argument(help="A run (with its suspect labels), or images as for fit.")
    ],
    kind: Annotated[
        str, typer.Option("--as", help="The kind of data set, if its files do not show it.")
    ] = "",
    target: Annotated[
        Path | None, typer.Option("--out", help="The CSV file (default NAME-reviewed.csv).")
    ] = None,
    port: Annotated[
        int,
        typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 = any free one."),
    ] = 0,
    sets: DataSets = None,
) -> None:
    """Open a local page to accept, relabel or drop suspect images; write a CSV file for fit.

    It shows suspect labels (of a run), copies, and images that stand out. Your files stay as they
    are.
    """
    from threefold.evaluation.review import check_new_file, open_review
    from threefold.evaluation.review_state import ReviewState
    from threefold.extras import missing_extra

    try:
        from threefold.serving.review import run_review
    except ModuleNotFoundError as error:
        raise missing_extra(error, "serve", "`threefold data review`") or error from None
    target = target or Path(f"{real_path(Path(source).expanduser()).stem}-reviewed.csv")
    check_new_file(target)  # before the images are read
    found = open_review(source, kind, sets or ())
    state = ReviewState(found, target)
    for note in found.notes:
        print_wrapped(note, _MARKS["note"])
    if not found.items:
        out.print("nothing to look at")
        return
    out.print(f"{count_of(len(found.items), 'image')} to look at")
    run_review(state, port, lambda url: out.print(f"{url}   (Ctrl-C stops)", markup=False))
    if not state.decisions:
        out.print("nothing was decided, so no file was written")
        return
    counts = ", ".join(f"{number} {name}" for name, number in state.count().items())
    out.print(f"{target}: {counts}", markup=False)
    out.print(f"next   threefold fit {target}", markup=False)


def export(
    source: Annotated[
        str, typer.Argument(help="A run (with its suspect labels), or images as for fit.")
    ],
    file_format: Annotated[
        Literal["labelstudio", "fiftyone"], typer.Option("--format", help="Who imports the file.")
    ],
    target: Annotated[Path, typer.Option("--out", help="The JSON file; it must not exist yet.")],
    kind: Annotated[
        str, typer.Option("--as", help="The kind of data set, if its files do not show it.")
    ] = "",
    sets: DataSets = None,
) -> None:
    """Write suspect labels, copies and odd images for Label Studio or FiftyOne to import.

    The images stay where they are; the output says how to import the file.
    """
    from threefold.evaluation import review_export
    from threefold.evaluation.review import check_new_file, check_target, open_review
    from threefold.json_files import write_json

    check_new_file(target, ".json")  # before the images are read
    found = open_review(source, kind, sets or ())
    check_target(found, target, ".json")
    for note in found.notes:
        print_wrapped(note, _MARKS["note"])
    root = review_export.media_root(found)
    if file_format == "labelstudio":
        write_json(target, review_export.to_label_studio(found))
        hints = [
            f"LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true "
            f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={root.parent} label-studio start",
            f"labelling interface: {review_export.label_studio_config(found)}",
            f"add {root} as local storage, then import {target}",
        ]
    else:
        write_json(target, review_export.to_fiftyone(found))
        hints = [
            "fiftyone.Dataset.from_dir("
            "dataset_type=fiftyone.types.FiftyOneImageClassificationDataset,",
            f"    data_path={str(root)!r}, labels_path={str(target.absolute())!r})",
        ]
    out.print(f"{target}: {count_of(len(found.items), 'image')}", markup=False)
    for hint in hints:
        out.print(hint, markup=False, soft_wrap=True)


def _show_check(report: DataCheck) -> None:
    """Print counts, sizes, groups and findings."""
    if report.classes:
        train = [counts["train"] for counts in report.classes.values()]
        num_test = sum(counts.get("test", 0) for counts in report.classes.values())
        out.print(
            f"{count_of(sum(train), 'training image')}, "
            f"{count_of(num_test, 'test image') if num_test else 'no test images'}, "
            f"{count_of(len(train), 'class', 'classes')} "
            f"({min(train):,} to {max(train):,} training images each)"
        )
        sizes = [f"{size} ({count})" for size, count in report.sizes.items()]
        shown = ", ".join(sizes[:5]) + (" ..." if len(sizes) > 5 else "")
        out.print(f"sizes, of {sum(report.sizes.values())} looked at: {shown}")
    if report.groups:
        counts = report.groups.values()
        out.print(
            f"{count_of(len(counts), 'group')} of {min(counts):,} to {max(counts):,} "
            "training images"
        )
    for finding in report.findings:
        print_wrapped(finding.what, _MARKS[finding.level])
    _show_quality(report.quality)
    out.print("a run could begin" if report.usable else "a run would stop here")


def _show_quality(quality: Sequence[QualityFinding]) -> None:
    """Print a table of the images that stand out, the most unusual first."""
    from rich.table import Table

    if not quality:
        return
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("image", "stands out", "measured"):
        table.add_column(name, overflow="fold")
    for finding in sorted(quality, key=lambda finding: -finding.score)[:_LISTED]:
        table.add_row(*map(plain, (finding.id, finding.fault, finding.value)))
    out.print(table)
    if len(quality) > _LISTED:
        out.print(f"... and {len(quality) - _LISTED:,} more: --json lists all")
