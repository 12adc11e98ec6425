"""The command line: verbs that call functions and print.

No logic lives here. A training option is a recipe key, never a flag.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from threefold.arguments import parse_minutes, split_names
from threefold.cli.console import err, out, plain
from threefold.cli.data import register as register_data
from threefold.cli.demo import demo
from threefold.cli.images import register as register_images
from threefold.cli.options import (
    Backbones,
    ImageTime,
    Mode,
    ModelFile,
    QualityOption,
    RunOut,
    Sets,
    Verbose,
    WallTime,
)
from threefold.cli.output import (
    resume_command,
    show_next_steps,
    show_results,
    show_student,
    watch_training,
)
from threefold.cli.reproduce import register as register_reproduce
from threefold.cli.saved import register as register_saved
from threefold.errors import ExportError, RecipeError, refuse_address

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Cross-validated ensembles of fine-tuned ConvNets, with honest scores, in one file.",
)


def _print_version(requested: bool) -> None:
    if requested:
        from threefold import __version__

        out.print(f"threefold {__version__}", markup=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Handle the options that belong to no verb."""


app.command()(demo)


@app.command()
def fit(
    folder: Annotated[
        Path,
        typer.Argument(
            help="One folder per class, or train/, val/, test/ with class folders inside; "
            "or a CSV or parquet file."
        ),
    ],
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="The run folder (default runs/NAME).")
    ] = None,
    budget: WallTime = "20m",
    quality: QualityOption = "good",
    members: Backbones = "",
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Plan, train, ensemble, report and export: images to one file."""
    from threefold.predictions.run_folder import default_run_folder

    parse_minutes(budget, "--budget")  # before torch is imported, so that a typo fails at once
    target = out_dir or default_run_folder(folder)
    from threefold import api

    words: list[object] = ["fit", folder, "--out", target]
    for option, value, default in (
        ("--budget", budget, "20m"),
        ("--quality", quality, "good"),
        ("--members", members, ""),
    ):
        if value != default:
            words += [option, value]
    with watch_training(verbose, resume_command(*words, sets=sets)) as watcher:
        run = api.fit(
            folder,
            target,
            budget=budget,
            members=members,
            overrides=sets or (),
            quality=quality,
            watcher=watcher,
        )
    model = run.dir / "model.onnx"
    show_results(run)
    show_next_steps(run, f"threefold predict {model} IMAGE...", f"threefold serve {model}")


@app.command()
def plan(
    recipe: Annotated[
        str,
        typer.Argument(
            help="A folder or table of images, a recipe file, or a packaged recipe's name."
        ),
    ],
    budget: WallTime = "20m",
    quality: QualityOption = "good",
    members: Backbones = "",
    sets: Sets = None,
) -> None:
    """Print the recipe that would run, with the reasons for its values."""
    from threefold.data.detect_source import TABLES
    from threefold.predictions.run_folder import default_run_folder
    from threefold.recipe import packaged_names, resolve

    path = Path(recipe)
    if not path.exists() and recipe not in packaged_names():
        refuse_address(recipe)
        raise RecipeError(
            "no such folder, table or recipe",
            got=recipe,
            expected="a folder or table of images, a .toml file, or a name that "
            "`threefold list recipes` shows",
        )
    if path.is_dir() or path.suffix.lower() in TABLES:
        from threefold.training.plan import plan_folder

        planned = plan_folder(
            recipe,
            parse_minutes(budget, "--budget"),
            split_names([members]),
            tuple(sets or ()),
            quality,
            group_file=Path(f"{default_run_folder(path).name}-groups.csv"),
        )
        if planned.recipe.data.group_file:
            err.print("[yellow]note[/] groups are in", planned.recipe.data.group_file)
        out.print(planned.recipe.dump(planned.explain()), markup=False)
        return
    loaded = resolve(recipe, sets or ())
    out.print(loaded.dump(f"digest {loaded.digest()[:12]}"), markup=False)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a packaged recipe's name.")],
    out_dir: RunOut,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Train, ensemble and score a recipe; run it again to resume."""
    from threefold.recipe import resolve

    loaded = resolve(recipe, sets or ())  # before torch is imported, so that a typo fails at once
    from threefold import api

    command = resume_command("train", recipe, "--out", out_dir, sets=sets)
    with watch_training(verbose, command) as watcher:
        run = api.train(loaded, out_dir, watcher)
        api.report(run)
    show_results(run)
    show_next_steps(run, f"threefold export {run.dir} --out model.onnx")


@app.command()
def export(
    run_dir: Annotated[
        Path, typer.Argument(help="A finished run folder; with --web also an exported .onnx file.")
    ],
    target: Annotated[
        Path,
        typer.Option("--out", help="The file to write: .onnx, .pt2 (torch) or .xml (OpenVINO)."),
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
) -> None:
    """Write one file that answers as the run does, or refuse."""
    if web is not None:
        from threefold.serving.browser import require_free

        require_free(web)  # before the export, which takes minutes
    if run_dir.is_file():
        if web is None or method or members:
            raise ExportError(
                "this is an exported file",
                where=run_dir,
                fix="give a run folder, or only --web DIR",
            )
        _write_web(run_dir, web, web_runtime)
        return
    if web is not None and target.suffix != ".onnx":
        raise ExportError(
            "the browser reads ONNX", where=target, fix="with --web, --out ends in .onnx"
        )
    from threefold.data.class_names import exported_names
    from threefold.exporting.export import export as export_run
    from threefold.exporting.parity import describe_report
    from threefold.training.run import Run
    from threefold.training.terminal_watcher import TerminalWatcher

    run = Run.open(run_dir)
    run.watcher = TerminalWatcher(err)
    exported = export_run(run, target, method, split_names([members]), precision)
    classes = run.folder.info.classes
    for name, written in zip(classes, exported_names(classes), strict=True):
        if name != written:
            err.print(f"[yellow]note[/] class {plain(repr(name))} is {plain(written)} in the file")
    out.print(
        f"{exported.path}: {exported.bytes / 1e6:.1f} MB, {exported.method}, {precision}; "
        f"{describe_report(exported)}",
        markup=False,
    )
    if web is not None:
        _write_web(target, web, web_runtime)


def _write_web(model: Path, folder: Path, runtime: Path | None) -> None:
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


@app.command()
def distill(
    run_dir: Annotated[Path, typer.Argument(help="A finished run folder: the teacher.")],
    student: Annotated[
        str, typer.Option("--student", help="A member of the run, or any timm name.")
    ],
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="The run folder (default RUN-NAME).")
    ] = None,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Train one small network on an ensemble's answers.

    A twin that learns from the labels alone is trained beside it.
    """
    from threefold.api import default_folder
    from threefold.api import distill as distill_run

    target = out_dir or default_folder(run_dir, student)
    command = resume_command("distill", run_dir, "--student", student, "--out", target, sets=sets)
    with watch_training(verbose, command) as watcher:
        run = distill_run(run_dir, student, target, overrides=sets or (), watcher=watcher)
    show_student(run)
    show_next_steps(
        run,
        f"threefold predict {run.dir / 'model.onnx'} IMAGE...",
        f"threefold report {run_dir} {run.dir} --out both.html",
    )


register_images(app)


@app.command()
def serve(
    model: ModelFile,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 = any free one."),
    ] = 8000,
    api_key: Annotated[
        str,
        typer.Option(
            "--api-key",
            envvar="THREEFOLD_API_KEY",
            help="Require this key with every request.",
            show_default=False,
        ),
    ] = "",
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            metavar="NAME=NUMBER",
            help="Change one limit, e.g. pixels=50000000; may be repeated.",
        ),
    ] = None,
    mode: Mode = "full",
    budget: ImageTime = "",
) -> None:
    """Serve a web page to drop images on, and POST /predict."""
    from threefold.runtime.predict import parse_policy
    from threefold.serving.app import LOOPBACK, run_server
    from threefold.serving.limits import ServerLimits

    def announce(address: str) -> None:
        out.print(f"{address}   a page for people (Ctrl-C stops)", markup=False)
        out.print(f"curl -F files=@IMAGE {address}/predict", markup=False)
        if host not in LOOPBACK and not api_key:
            err.print("[yellow]note[/] no API key: anyone who reaches this address can predict")

    policy = parse_policy(mode, budget)
    run_server(model, host, port, api_key, ServerLimits().override(limits or ()), announce, policy)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="backbones, heads, ensembles, data or recipes.")],
    pattern: Annotated[
        str, typer.Argument(help="For backbones: a pattern, e.g. '*convnext*'.")
    ] = "*",
) -> None:
    """List the names that a recipe can use."""
    from threefold.cli.catalog import catalogue

    for line in catalogue(what, pattern):
        out.print(line, markup=False)


register_saved(app)
register_data(app)
register_reproduce(app)
