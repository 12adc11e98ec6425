"""The verb `search`."""

from __future__ import annotations

from typing import Annotated

import typer

from threefold.arguments import parse_minutes
from threefold.cli.console import out, plain
from threefold.cli.options import RunOut, Sets, Verbose, WallTime
from threefold.cli.output import resume_command, show_next_steps, show_results, watch_training


def search(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a packaged recipe's name.")],
    out_dir: RunOut,
    space: Annotated[
        list[str],
        typer.Option(
            "--space",
            metavar="PATH=VALUES",
            help="A key and what to try: a,b,c or low..high; may be repeated.",
        ),
    ],
    trials: Annotated[
        int, typer.Option("--trials", min=2, help="How many, with the recipe as it is.")
    ] = 20,
    budget: WallTime = "0",
    sets: Sets = None,
    verbose: Verbose = False,
) -> None:
    """Search over recipe keys with Optuna; the test is opened for the chosen trial only."""
    from threefold.recipe.lookup import resolve

    parse_minutes(budget, "--budget")  # before torch is imported, so that a typo fails at once
    loaded = resolve(recipe, sets or ())
    from threefold.search import search as search_keys

    words: list[object] = ["search", recipe, "--out", out_dir, "--trials", trials]
    for text in space:
        words += ["--space", text]
    if budget != "0":
        words += ["--budget", budget]
    with watch_training(verbose, resume_command(*words, sets=sets)) as watcher:
        result = search_keys(loaded, out_dir, space, trials=trials, budget=budget, watcher=watcher)
    out.print("trial  log loss  accuracy %  changes")
    for trial in result.trials:
        mark = "<" if trial.number == result.chosen else " "
        changes = ", ".join(trial.overrides) or "the recipe as it is"
        out.print(
            f"{trial.number:5d}{mark} {trial.loss:8.4f}  {100 * trial.accuracy:10.2f}  "
            f"{plain(changes)}"
        )
    if result.optimism is not None:
        out.print(
            f"accuracy out of fold {result.optimism.apparent:.4f}, and "
            f"{result.optimism.honest:.4f} where the choice has not seen the rows"
        )
    show_results(result.run)
    model = result.run.dir / "model.onnx"
    show_next_steps(result.run, f"threefold predict {model} IMAGE...")
