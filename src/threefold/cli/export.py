"""The verb `export`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from threefold.arguments import split_names
from threefold.cli.console import err, out, plain
from threefold.errors import ExportError
from threefold.lazy import importing_for_good

FixedSize = Annotated[
    bool,
    typer.Option(
        "--fixed-size",
        help="Write an .onnx file that TensorRT reads: the caller resizes every image.",
    ),
]
NoCascade = Annotated[
    bool,
    typer.Option("--no-cascade", help="Leave the cascade out: every member answers every image."),
]


def export(
    run_dir: Annotated[
        Path, typer.Argument(help="A finished run folder; with --web also an exported .onnx file.")
    ],
    target: Annotated[
        Path,
        typer.Option(
            "--out",
            help="The file to write: .onnx, .pt2 (torch), .xml (OpenVINO), .mlpackage (Core ML) or "
            ".tflite (LiteRT).",
        ),
    ] = Path("model.onnx"),
    method: Annotated[
        str | None,
        typer.Option("--method", help="Export this ensemble method in place of the chosen one."),
    ] = None,
    members: Annotated[
        str,
        typer.Option(
            "--members",
            help="Export only these members, separated by commas; a single one needs no ensemble.",
        ),
    ] = "",
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            help="Precision of the members' weights: float32, float16, bfloat16 or int8.",
        ),
    ] = "float32",
    fixed_size: FixedSize = False,
    no_cascade: NoCascade = False,
    web: Annotated[
        Path | None,
        typer.Option(
            "--web", metavar="DIR", help="Also write a folder that classifies in the browser."
        ),
    ] = None,
    web_runtime: Annotated[
        Path | None,
        typer.Option(
            "--web-runtime",
            metavar="PATH",
            help="onnxruntime-web as a .tgz or a folder (default: fetched with npm).",
        ),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option("--card", metavar="PATH", help="Also write the README.md of `push`."),
    ] = None,
) -> None:
    """Write one file that answers as the run does, or refuse."""
    if web is not None:
        from threefold.serving.browser import require_free

        require_free(web)  # before the export, which takes minutes
    if run_dir.is_file():
        if web is None or method or members or card or fixed_size or no_cascade:
            raise ExportError(
                "this is an exported file",
                where=run_dir,
                fix="give a run folder, or only --web DIR",
            )
        _write_web(run_dir, web, web_runtime)
        return
    runtime: Mapping[str, bytes] = {}
    if web is not None:
        from threefold.predictions.run_folder import RunFolder
        from threefold.serving.onnxruntime_web import read_runtime

        _check_web(target, fixed_size)
        RunFolder.open(run_dir)
        runtime = read_runtime(web_runtime)  # without it, the export would be for nothing
    options = {"cascade": not no_cascade, "fixed_size": fixed_size}
    _write_model(run_dir, target, method, split_names([members]), precision, **options)
    if card is not None:
        _write_card(run_dir, card)
    if web is not None:
        _write_web(target, web, runtime)


def _check_web(target: Path, fixed_size: bool) -> None:
    """Refuse a file that the browser's page cannot use."""
    if target.suffix != ".onnx":
        raise ExportError(
            "the browser reads ONNX", where=target, fix="with --web, --out ends in .onnx"
        )
    if fixed_size:
        raise ExportError(
            "the page gives the model images of any size",
            where="--web",
            fix="leave out --fixed-size or --web",
        )


def _write_model(
    run_dir: Path,
    target: Path,
    method: str | None,
    members: tuple[str, ...],
    precision: str,
    *,
    cascade: bool,
    fixed_size: bool,
) -> None:
    """Write the file and say how its answers compare with the run's."""
    with importing_for_good():
        from threefold.data.class_names import exported_names
        from threefold.exporting.export import export as export_run
        from threefold.exporting.parity import describe_report
        from threefold.exporting.tensorrt import trtexec_line
        from threefold.training.progress.terminal_watcher import TerminalWatcher
        from threefold.training.run import Run

    run = Run.open(run_dir)
    run.watcher = TerminalWatcher(err)
    exported = export_run(
        run, target, method, members, precision, cascade=cascade, fixed_size=fixed_size
    )
    classes = run.folder.info.classes
    for name, written in zip(classes, exported_names(classes), strict=True):
        if name != written:
            err.print(f"[yellow]note[/] class {plain(repr(name))} is {plain(written)} in the file")
    combined = f"{members[0]} alone" if len(members) == 1 else exported.method
    out.print(
        f"{exported.path}: {exported.bytes / 1e6:.1f} MB, {combined}, {precision}; "
        f"{describe_report(exported)}",
        markup=False,
    )
    if fixed_size:
        out.print(f"next   {trtexec_line(target)}", markup=False)


def _write_card(run_dir: Path, path: Path) -> None:
    """Write the README.md of a model on the hub."""
    from threefold.exporting.hub_readme import write_readme
    from threefold.files import write_bytes
    from threefold.predictions.run_folder import RunFolder

    write_bytes(path, write_readme(RunFolder.open(run_dir)).encode())
    out.print(path, markup=False)


def _write_web(model: Path, folder: Path, runtime: Path | Mapping[str, bytes] | None) -> None:
    """Write the browser folder and say how to try it."""
    from threefold.serving.browser import write_web

    written = write_web(model, folder, runtime)
    out.print(
        f"{written.path}: {written.bytes / 1e6:.1f} MB, of which "
        f"{written.runtime} {written.runtime_bytes / 1e6:.1f} MB; "
        "put it on any static web host",
        markup=False,
    )
    out.print(
        f"next   python -m http.server --bind 127.0.0.1 --directory {written.path} 8080",
        markup=False,
    )
