"""The command line: verbs that call functions and print. No logic; a training option is a recipe key, never a flag."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from threefold.cli_data import register as register_data
from threefold.cli_saved import Json
from threefold.cli_saved import register as register_saved
from threefold.console import err, out, plain
from threefold.errors import ExportError, ThreefoldError

if TYPE_CHECKING:
    from threefold.run import Run
    from threefold.terminal import TerminalWatcher

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Cross-validated ensembles of fine-tuned ConvNets, with honest scores, in one file.",
)
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Change one recipe value, e.g. train.batch_size=64."
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="A line per job and epoch.")]
Mode = Annotated[
    str,
    typer.Option("--mode", help="full: every member; fast: stop where the first members are sure."),
]
Milliseconds = Annotated[
    str,
    typer.Option(
        "--budget",
        help="Time of the model for an image, e.g. 15ms: as many members as fit, measured here.",
    ),
]
Out = Annotated[Path, typer.Option("--out", help="The run folder.")]


def main() -> None:
    """Entry point: 0 ok, 1 an error that the user can mend (one line), 2 wrong usage, 130 interrupted."""
    try:
        app()
    except ThreefoldError as error:
        _tell(error)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(0)


def _tell(what: ThreefoldError | str) -> None:
    sign = "[bold red]error[/] " if isinstance(what, ThreefoldError) else ""
    err.print(f"{sign}{plain(what)}", highlight=False)


@contextmanager
def _watched(verbose: bool, again: str) -> Iterator[TerminalWatcher]:
    """A progress bar; Ctrl-C says how to go on."""
    from threefold.terminal import TerminalWatcher

    try:
        with TerminalWatcher(out, verbose) as watcher:
            yield watcher
    except KeyboardInterrupt:
        err.print(f"[yellow]stopped[/]; what is done is kept. Go on with: {plain(again)}")
        raise SystemExit(130) from None


@app.command()
def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="The run folder.")] = Path("runs/demo"),
    verbose: Verbose = False,
) -> None:
    """Real pretrained members on real images, on a CPU, in minutes: train, ensemble, report, export, predict."""
    from threefold import workflow
    from threefold.recipe import packaged

    with _watched(verbose, f"threefold demo --out {out_dir}") as watcher:
        out.print(
            "threefold demo: 3 pretrained networks, 3,000 training images of Fashion-MNIST, 1,000 sealed test images"
        )
        run = workflow.train(packaged("demo"), out_dir, watcher)
        workflow.finish(run)
    image, truth = workflow.sample_image(run)
    _show_results(run)
    out.print(f"\n{image.name} (a {truth}), asked of the exported file in a fresh process:")
    out.print(workflow.predict_elsewhere(run.dir / "model.onnx", image).rstrip())
    _show_places(
        run, f"threefold serve {run.dir / 'model.onnx'}", "threefold fit FOLDER_OF_YOUR_IMAGES"
    )


@app.command()
def fit(
    folder: Annotated[
        Path,
        typer.Argument(
            help="One folder per class, or train/, val/, test/ with class folders inside."
        ),
    ],
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="The run folder (default runs/NAME).")
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", help="Bound on the wall time: 90s, 20m, 2h; 0 = none.")
    ] = "20m",
    members: Annotated[
        str, typer.Option("--members", help="timm names, separated by commas.")
    ] = "",
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Plan, train, ensemble, report, export: one command from a folder of images to one file."""
    from threefold.recipe import parse_minutes

    target = out_dir or Path("runs") / folder.resolve().name
    minutes = parse_minutes(budget)
    from threefold import workflow

    with _watched(verbose, f"threefold fit {folder} --out {target}") as watcher:
        run = workflow.fit(
            folder,
            target,
            budget_minutes=minutes,
            members=tuple(filter(None, members.split(","))),
            overrides=tuple(sets or ()),
            watcher=watcher,
        )
    _show_results(run)
    _show_places(
        run,
        f"threefold predict {run.dir / 'model.onnx'} IMAGE...",
        f"threefold serve {run.dir / 'model.onnx'}",
    )


@app.command()
def plan(
    recipe: Annotated[
        str, typer.Argument(help="A folder of images, a recipe file, or a packaged recipe's name.")
    ],
    budget: Annotated[
        str, typer.Option("--budget", help="Bound on the wall time: 90s, 20m, 2h; 0 = none.")
    ] = "20m",
    members: Annotated[
        str, typer.Option("--members", help="timm names, separated by commas (for a folder).")
    ] = "",
    sets: Sets = None,
) -> None:
    """Print the recipe that would run, every value written out, with reasons; or the jobs of a recipe."""
    from threefold.recipe import parse_minutes, resolve

    if Path(recipe).is_dir():
        from threefold.plan import plan_folder

        made = plan_folder(
            recipe,
            parse_minutes(budget),
            tuple(filter(None, members.split(","))),
            tuple(sets or ()),
        )
        out.print(made.recipe.dump(made.explain()), markup=False)
        return
    loaded = resolve(recipe, sets or ())
    out.print(loaded.dump(f"digest {loaded.digest()[:12]}"), markup=False)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a packaged recipe's name.")],
    out_dir: Out,
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Train, cross-validate, ensemble and score what a recipe says; run again to go on where it stopped."""
    from threefold.recipe import resolve

    loaded = resolve(
        recipe, sets or ()
    )  # before torch is imported: a typing error is answered at once
    from threefold import workflow

    with _watched(verbose, f"threefold train {recipe} --out {out_dir}") as watcher:
        run = workflow.train(loaded, out_dir, watcher)
        workflow.report(run)
    _show_results(run)
    _show_places(run, f"threefold export {run.dir} --out model.onnx")


@app.command()
def export(
    run_dir: Annotated[
        Path, typer.Argument(help="A finished run folder; for --web alone, an exported .onnx file.")
    ],
    target: Annotated[
        Path,
        typer.Option("--out", help="The file to write: .onnx, .pt2 (torch) or .xml (OpenVINO)."),
    ] = Path("model.onnx"),
    method: Annotated[
        str | None, typer.Option("--method", help="Another ensemble than the chosen one.")
    ] = None,
    members: Annotated[
        str,
        typer.Option(
            "--members",
            help="Only these members, separated by commas; one alone is exported as it is.",
        ),
    ] = "",
    precision: Annotated[
        str,
        typer.Option(
            "--precision", help="Of the members' weights: float32, float16, bfloat16 or int8."
        ),
    ] = "float32",
    web: Annotated[
        Path | None,
        typer.Option(
            "--web", metavar="DIR", help="Write a folder that classifies in the browser, too."
        ),
    ] = None,
    web_runtime: Annotated[
        Path | None,
        typer.Option(
            "--web-runtime",
            metavar="PATH",
            help="onnxruntime-web, a .tgz or a folder (default: npm gets it).",
        ),
    ] = None,
) -> None:
    """Write one file that answers as the run does; refuses if the answers differ."""
    if web is not None:
        from threefold.webfolder import require_free

        require_free(web)  # before the minutes that an export takes
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
    from threefold import workflow
    from threefold.parity import told
    from threefold.run import Run

    made = workflow.export(
        Run.open(run_dir), target, method, [n for n in members.split(",") if n], precision
    )
    out.print(
        f"{made['path']}: {made['bytes'] / 1e6:.1f} MB, {made['method']}, {precision}; {told(made)}",
        markup=False,
    )
    if web is not None:
        _write_web(target, web, web_runtime)


def _write_web(model: Path, folder: Path, runtime: Path | None) -> None:
    from threefold.webfolder import write_web

    made = write_web(model, folder, runtime)
    out.print(
        f"{made['path']}: {made['bytes'] / 1e6:.1f} MB, of which {made['runtime']} {made['runtime_bytes'] / 1e6:.1f} MB; "
        "put it on any static web host",
        markup=False,
    )
    out.print(
        f"next   python -m http.server --bind 127.0.0.1 --directory {made['path']} 8080",
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
    """Teach one small network what a run's ensemble knows, beside a twin that learns from labels; compare, export, report."""
    from threefold.student import default_folder
    from threefold.student import distill as teach

    target = out_dir or default_folder(run_dir, student)
    with _watched(
        verbose, f"threefold distill {run_dir} --student {student} --out {target}"
    ) as watcher:
        run = teach(run_dir, student, target, overrides=sets or (), watcher=watcher)
    _show_student(run)
    _show_places(
        run,
        f"threefold predict {run.dir / 'model.onnx'} IMAGE...",
        f"threefold report {run_dir} {run.dir} --out both.html",
    )


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="An exported model file.")],
    images: Annotated[
        list[str], typer.Argument(help="Files, folders, or - for a list on standard input.")
    ],
    top: Annotated[int, typer.Option("--top", min=1, help="How many classes to name.")] = 3,
    as_json: Json = False,
    csv: Annotated[
        bool, typer.Option("--csv", help="One row per image with every probability.")
    ] = False,
    mode: Mode = "full",
    budget: Milliseconds = "",
) -> None:
    """Classify images with an exported file; needs neither torch nor the run."""
    from threefold import answers

    form = "json" if as_json else "csv" if csv else "text"
    spent = answers.milliseconds(budget, mode)
    failed = answers.write(sys.stdout, _tell, model, images, top, form, mode, spent)
    if failed:
        raise SystemExit(1)


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="An exported model file.")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="Port to listen on; 0 = any free one.")
    ] = 8000,
    api_key: Annotated[
        str,
        typer.Option(
            "--api-key", envvar="THREEFOLD_API_KEY", help="Ask for this key.", show_default=False
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
    budget: Milliseconds = "",
) -> None:
    """A page to drop images on, and POST /predict for programs; GET /card, /health, /metrics, /openapi.json."""
    from threefold.answers import milliseconds
    from threefold.limits import Limits
    from threefold.serve import LOOPBACK, run_server

    def ready(address: str) -> None:
        out.print(f"{address}   a page for people (Ctrl-C stops)", markup=False)
        out.print(f"curl -F files=@IMAGE {address}/predict", markup=False)
        if host not in LOOPBACK and not api_key:
            err.print("[yellow]note[/] no API key: whoever reaches this address can use the model")

    spent = milliseconds(budget, mode)
    run_server(model, host, port, api_key, Limits().changed(limits or ()), ready, mode, spent)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="backbones, heads, ensembles, data or recipes.")],
    pattern: Annotated[
        str, typer.Argument(help="For backbones: a pattern, e.g. '*convnext*'.")
    ] = "*",
) -> None:
    """Name what a recipe can use."""
    from threefold.catalogue import catalogue

    for line in catalogue(what, pattern):
        out.print(line, markup=False)


def _show_results(run: Run) -> None:
    """The score table and the sentence that matters."""
    from threefold.terminal import score_table

    results = run.results
    out.print(score_table(results["scores"], results["chosen"]))
    out.print(f"< chosen: {results['chosen']} ({plain(results['chosen_reason'])})")
    expected = results["expected"]
    low, high = expected["interval"]
    told = f"{expected['n']:,} {expected['told']}, protocol {results['protocol']}"
    out.print(
        f"\nExpect [bold]{expected['accuracy']:.1%}[/] of new images to be right (95 % interval {low:.1%} to {high:.1%}; {told})."
    )
    for key, what in (("optimism", "optimism of"), ("audit", "suspect labels")):
        if key == "optimism" and results["optimism"]:
            most = max(results["optimism"], key=lambda line: line["difference"])
            out.print(
                f"{what} {most['told']}: {100 * most['difference']:+.1f} points on the rows it was chosen on"
            )
        if key == "audit" and results["audit"]["n_suspects"]:
            out.print(
                f"{what}: {results['audit']['n_suspects']}, in {run.dir / results['audit']['file']}",
                markup=False,
            )


def _show_student(run: Run) -> None:
    """Student, twin and teacher on the same rows, and the verdicts."""
    from threefold.terminal import distill_tables, pair_table, verdict_line

    results = run.results
    found = results["distill"]
    *scores, costs = distill_tables(found)
    for table, part in zip(scores, found["tables"], strict=True):
        out.print(table)
        out.print(pair_table(part["comparisons"]))
        for pair in part["comparisons"]:
            out.print(f"  {plain(verdict_line(pair))}")
        out.print()
    out.print(costs)
    for note in results["notes"]:
        out.print(f"[yellow]note[/] {plain(note)}", highlight=False)


def _show_places(run: Run, *next_commands: str) -> None:
    """Where things are, and what to type next."""
    out.print()
    for name, path in (
        ("report", "report.html"),
        ("model", "model.onnx"),
        ("scores", "results.json"),
        ("run", ""),
    ):
        if (run.dir / path).exists():
            out.print(f"{name:7}{run.dir / path}", markup=False)
    for command in next_commands:
        out.print(f"next   {command}", markup=False)


register_saved(app)
register_data(app)
