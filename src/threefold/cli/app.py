"""The command line: verbs that call functions and print.

No logic lives here. A training option is a recipe key, never a flag.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from threefold.arguments import parse_devices, parse_minutes, split_names
from threefold.cli import STARTED
from threefold.cli.console import err, out
from threefold.cli.data import register as register_data
from threefold.cli.demo import demo
from threefold.cli.doctor import register as register_doctor
from threefold.cli.explain import register as register_explain
from threefold.cli.export import export
from threefold.cli.hub import register as register_hub
from threefold.cli.images import register as register_images
from threefold.cli.lr_find import lr_find
from threefold.cli.options import (
    Address,
    Backbones,
    Devices,
    Executor,
    ImageTime,
    Mode,
    ModelFile,
    Processes,
    QualityOption,
    RunOut,
    Sets,
    Trackers,
    Verbose,
    WallTime,
)
from threefold.cli.output import (
    executor_words,
    resume_command,
    show_next_steps,
    show_results,
    show_student,
    watch_training,
)
from threefold.cli.progress import count_bars
from threefold.cli.reproduce import register as register_reproduce
from threefold.cli.saved import register as register_saved
from threefold.cli.search import search
from threefold.cli.ui import ui
from threefold.cli.verb_group import VerbGroup
from threefold.errors import RecipeError, refuse_address
from threefold.lazy import importing_for_good
from threefold.machine import is_one_of_several
from threefold.object_store import url_of

app = typer.Typer(
    cls=VerbGroup,
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
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Handle the options that belong to no verb."""
    if context.invoked_subcommand != "train" and is_one_of_several():
        raise RecipeError(
            "only `threefold train` runs in several processes",
            got=f"`threefold {context.invoked_subcommand}` in {os.environ['WORLD_SIZE']} of them",
            fix="start it without torchrun; `threefold plan FOLDER` prints a recipe to train",
        )


app.command()(demo)


@app.command()
def fit(
    folder: Annotated[
        Path,
        typer.Argument(
            help="One folder per class, or train/, val/, test/ with class folders inside, or an "
            "archive of them; a CSV, TSV, parquet or npz file; shards such as "
            "'train-{000..146}.tar'; or OWNER/NAME on the Hugging Face hub "
            "(hf://datasets/OWNER/NAME streams it)."
        ),
    ],
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="The run folder (default runs/NAME).")
    ] = None,
    budget: WallTime = "20m",
    quality: QualityOption = "good",
    members: Backbones = "",
    sets: Sets = None,
    log: Trackers = "",
    executor: Executor = "local",
    address: Address = "",
    devices: Devices = "",
    verbose: Verbose = False,
) -> None:
    """Plan, train, ensemble, report and export: images to one file."""
    from threefold.predictions.run_folder import default_run_folder

    parse_minutes(budget, "--budget")  # before torch is imported, so that a typo fails at once
    parse_devices(devices)
    target = out_dir or default_run_folder(folder)
    with importing_for_good():
        from threefold import api
        from threefold.training.execution import Execution

    words: list[object] = ["fit", url_of(folder) or folder, "--out", url_of(target) or target]
    for option, value, default in (
        ("--budget", budget, "20m"),
        ("--quality", quality, "good"),
        ("--members", members, ""),
        ("--devices", devices, ""),
    ):
        if value != default:
            words += [option, value]
    words += executor_words(executor, address)
    command = resume_command(*words, sets=sets, log=log)
    with watch_training(verbose, command, split_names(log)) as watcher:
        run = api.fit(
            folder,
            target,
            budget=budget,
            members=members,
            overrides=sets or (),
            quality=quality,
            devices=devices,
            watcher=watcher,
            execution=Execution(executor, address),
            began=STARTED,
        )
    model = run.dir / "model.onnx"
    show_results(run)
    show_next_steps(run, f"threefold predict {model} IMAGE...", f"threefold serve {model}")


@app.command()
def plan(
    recipe: Annotated[
        str,
        typer.Argument(help="Images as for fit, a recipe file, or a packaged recipe's name."),
    ],
    budget: WallTime = "20m",
    quality: QualityOption = "good",
    members: Backbones = "",
    sets: Sets = None,
) -> None:
    """Print the recipe that would run, with the reasons for its values."""
    from threefold.data.detect_source import seems_data
    from threefold.predictions.run_folder import default_run_folder
    from threefold.recipe.lookup import packaged_names, resolve

    path = Path(recipe)
    is_data = recipe not in packaged_names() and seems_data(recipe)
    if not path.exists() and not is_data and recipe not in packaged_names():
        refuse_address(recipe)
        raise RecipeError(
            "no such folder, table or recipe",
            got=recipe,
            expected="a folder or table of images, a .toml file, or a name that "
            "`threefold list recipes` shows",
        )
    if path.is_dir() or is_data:
        with importing_for_good():
            from threefold.training.planning.plan import plan_folder

        with count_bars():
            planned = plan_folder(
                recipe,
                parse_minutes(budget, "--budget"),
                split_names([members]),
                tuple(sets or ()),
                quality,
                group_file=Path(f"{default_run_folder(path).name}-groups.csv"),
                began=STARTED,
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
    log: Trackers = "",
    executor: Executor = "local",
    address: Address = "",
    devices: Devices = "",
    verbose: Verbose = False,
    processes: Processes = 1,
) -> None:
    """Train, ensemble and score a recipe; run it again to resume."""
    from threefold.recipe.lookup import resolve

    loaded = resolve(recipe, sets or ())  # before torch is imported, so that a typo fails at once
    if executor == "ray" and (processes > 1 or is_one_of_several()):
        raise RecipeError(
            "a job on a cluster is trained by one process",
            where="--executor ray",
            fix="leave --processes and torchrun out",
        )
    if parse_devices(devices) not in (None, 1) and processes > 1:
        raise RecipeError("give --devices or --processes, not both", got=f"{devices}, {processes}")
    if processes > 1:
        _train_in(processes, recipe, out_dir, sets, log, verbose)
    if is_one_of_several():  # torch warns of what the search for unused parameters costs
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with importing_for_good():
        from threefold import api
        from threefold.predictions.remote_run import run_folder_at
        from threefold.training.distributed.follow import follow
        from threefold.training.distributed.ranks import join_ranks
        from threefold.training.execution import Execution

    words = ["train", recipe, "--out", url_of(out_dir) or out_dir]
    words += executor_words(executor, address)
    words += ["--devices", devices] if devices else []
    command = resume_command(*words, sets=sets, log=log)
    with join_ranks(loaded.train.device) as ranks:
        if ranks.rank:
            follow(ranks)
            return
        with (
            watch_training(verbose, command, split_names(log)) as watcher,
            run_folder_at(out_dir) as (place, url),
        ):
            execution = Execution(executor, address, url)
            run = api.train(loaded, place or out_dir, watcher, devices=devices, execution=execution)
            api.report(run)
    show_results(run)
    show_next_steps(run, f"threefold export {run.dir} --out model.onnx")


def _train_in(
    processes: int,
    recipe: str,
    out_dir: Path,
    sets: list[str] | None,
    log: str,
    verbose: bool,
) -> NoReturn:
    """Run the same command in several processes, and end as they do."""
    if is_one_of_several():
        raise RecipeError("torchrun has started the processes already; leave out --processes")
    from threefold.training.distributed.launch import launch

    words = ["train", recipe, "--out", str(url_of(out_dir) or out_dir)]
    words += [word for text in sets or () for word in ("--set", text)]
    words += ["--log", log] if log else []
    raise SystemExit(launch(processes, [*words, "--verbose"] if verbose else words))


app.command("lr-find")(lr_find)
app.command()(search)
app.command()(export)


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
    log: Trackers = "",
    executor: Executor = "local",
    address: Address = "",
    verbose: Verbose = False,
) -> None:
    """Train one small network on an ensemble's answers.

    A twin that learns from the labels alone is trained beside it.
    """
    with importing_for_good():
        from threefold.api import default_folder
        from threefold.api import distill as distill_run
        from threefold.training.execution import Execution

    target = out_dir or default_folder(run_dir, student)
    words = ["distill", run_dir, "--student", student, "--out", target]
    words += executor_words(executor, address)
    command = resume_command(*words, sets=sets, log=log)
    with watch_training(verbose, command, split_names(log)) as watcher:
        run = distill_run(
            run_dir,
            student,
            target,
            overrides=sets or (),
            watcher=watcher,
            execution=Execution(executor, address),
        )
    show_student(run)
    show_next_steps(
        run,
        f"threefold predict {run.dir / 'model.onnx'} IMAGE...",
        f"threefold report {run_dir} {run.dir} --out both.html",
    )


register_images(app)
register_explain(app)


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
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes that answer on the port.")
    ] = 1,
) -> None:
    """Serve a web page to drop images on, POST /predict and POST /explain."""
    with importing_for_good():
        from threefold.runtime.predict import parse_policy
        from threefold.serving.app import run_server
        from threefold.serving.limits import ServerLimits
        from threefold.serving.listen import LOOPBACK

    def announce(address: str) -> None:
        out.print(f"{address}   a page for people (Ctrl-C stops)", markup=False)
        out.print(f"curl -F files=@IMAGE {address}/predict", markup=False)
        if host not in LOOPBACK and not api_key:
            err.print("[yellow]note[/] no API key: anyone who reaches this address can predict")

    policy = parse_policy(mode, budget)
    bounds = ServerLimits().override(limits or ())
    run_server(model, host, port, api_key, bounds, announce, policy, workers)


app.command()(ui)


@app.command("list")
def list_(
    what: Annotated[
        str, typer.Argument(help="backbones, heads, ensembles, data, recipes or presets.")
    ],
    pattern: Annotated[
        str, typer.Argument(help="For backbones: a pattern, e.g. '*convnext*'.")
    ] = "*",
) -> None:
    """List what there is to choose from: names for recipes, and ready-made presets."""
    from threefold.cli.catalog import catalogue

    for line in catalogue(what, pattern):
        out.print(line, markup=False)


register_saved(app)
register_data(app)
register_hub(app)
register_doctor(app)
register_reproduce(app)
