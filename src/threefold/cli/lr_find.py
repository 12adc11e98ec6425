"""The verb `lr-find`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from threefold.arguments import parse_minutes
from threefold.cli.console import out, plain, print_json
from threefold.cli.options import Backbones, Json, QualityOption, Sets, WallTime
from threefold.lazy import importing_for_good

if TYPE_CHECKING:
    from threefold.training.planning.lr_finder import FoundLearningRate

_ROWS = 13
"""Lines of the table of losses."""

_BAR = 40
"""Characters of its longest bar."""


def lr_find(
    source: Annotated[
        str,
        typer.Argument(
            help="A recipe file, a packaged recipe's name, a run folder, or images as for fit."
        ),
    ],
    member: Annotated[
        str, typer.Option("--member", help="Name of the member (default: the first tuned one).")
    ] = "",
    stage: Annotated[
        str, typer.Option("--stage", help="Name of the stage (default: the first with a rate).")
    ] = "",
    target: Annotated[Path, typer.Option("--out", help="The chart to write: .png or .svg.")] = Path(
        "lr.png"
    ),
    steps: Annotated[int, typer.Option("--steps", min=20, help="Steps, a batch each.")] = 100,
    low: Annotated[float, typer.Option("--low", help="The lowest learning rate.")] = 1e-7,
    high: Annotated[float, typer.Option("--high", help="The highest learning rate.")] = 10.0,
    budget: WallTime = "20m",
    quality: QualityOption = "good",
    members: Backbones = "",
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Find a learning rate: steps at growing rates, and where the loss falls.

    This range test works on a copy of the network that the stage starts from. If the source is
    images, --budget, --quality and --members shape their plan.
    """
    parse_minutes(budget, "--budget")  # before torch is imported, so that a typo fails at once
    from threefold.report.lr_chart import check_chart_name

    check_chart_name(target)
    with importing_for_good():
        from threefold.cli.console import err
        from threefold.training.planning.lr_finder import find_learning_rate
        from threefold.training.progress.terminal_watcher import TerminalWatcher

    with TerminalWatcher(err) as watcher:
        found = find_learning_rate(
            source,
            member=member,
            stage=stage,
            overrides=sets or (),
            budget=budget,
            members=members,
            quality=quality,
            steps=steps,
            low=low,
            high=high,
            watcher=watcher,
        )
    found.save(target)
    if as_json:
        print_json(_as_tree(found))
        return
    _print(found)
    out.print(f"chart          {target}", markup=False)
    if found.override:
        out.print(f"to use it      --set {found.override}", markup=False)


def _print(found: FoundLearningRate) -> None:
    """Print a table of losses, and what they suggest."""
    test, member, stage = found.test, plain(found.member), plain(found.stage)
    end = "then the loss diverged" if test.diverged else "and the loss did not diverge"
    out.print(
        f"member {member}, stage {stage}, fold {found.fold}: "
        f"{len(test.rates)} of {found.planned} steps, {end}"
    )
    out.print("[dim]     rate      loss  (smoothed)[/]")
    shown = range(len(test.rates) - 1, -1, -max(1, -(-len(test.rates) // _ROWS)))
    top = max(test.smoothed[: int(test.smoothed.argmin()) + 1])  # bars beyond it are cut
    for i in reversed(shown):
        bar = "#" * max(1, min(_BAR, round(_BAR * float(test.smoothed[i] / top))))
        out.print(f"{test.rates[i]:9.2e}  {test.smoothed[i]:8.4f}  {bar}")
    for name, rate in (("steepest", found.steepest), ("minimum / 10", found.minimum_tenth)):
        out.print(f"{name:15}{'-' if rate is None else f'{rate:.2g}'}")
    out.print(f"the recipe has {found.recipe_rate:.2g} ({found.schedule})")
    if found.suggestion is None:
        out.print("no suggestion: the loss falls by no more than its noise; try --steps 300")
    else:
        out.print(f"suggestion     {found.suggestion:.2g}, the lower of the two")


def _as_tree(found: FoundLearningRate) -> dict[str, object]:
    """Return what --json prints."""
    test = found.test
    return {
        "member": found.member,
        "stage": found.stage,
        "fold": found.fold,
        "recipe_lr": found.recipe_rate,
        "schedule": found.schedule,
        "suggestion": found.suggestion,
        "steepest": found.steepest,
        "minimum_tenth": found.minimum_tenth,
        "diverged": test.diverged,
        "planned": found.planned,
        "rates": test.rates.tolist(),
        "losses": test.losses.tolist(),
        "smoothed": test.smoothed.tolist(),
    }
