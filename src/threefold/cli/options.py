"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change one recipe value, e.g. train.batch_size=64; may be repeated.",
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print a line per job and epoch.")]
Trackers = Annotated[
    str,
    typer.Option(
        "--log",
        metavar="NAMES",
        help="Also log to tensorboard, mlflow or wandb, separated by commas.",
    ),
]
Processes = Annotated[
    int,
    typer.Option(
        "--processes",
        min=1,
        help="Processes that train each member together, each with a GPU of its own; torchrun "
        "starts them on several machines.",
    ),
]
Executor = Annotated[
    Literal["local", "ray"],
    typer.Option("--executor", help="Where the work is done: here, or on a Ray cluster."),
]
Address = Annotated[
    str,
    typer.Option(
        "--address",
        help="The Ray cluster: HOST:PORT, ray://HOST:PORT or auto; without it one of this machine.",
    ),
]
RunOut = Annotated[Path, typer.Option("--out", help="The run folder.")]
WallTime = Annotated[
    str, typer.Option("--budget", help="Limit on the wall time: 90s, 20m, 2h; 0 = none.")
]
Backbones = Annotated[
    str,
    typer.Option(
        "--members",
        help="timm names of the backbones, separated by commas; auto = choose by measurement.",
    ),
]
QualityOption = Annotated[
    Literal["fast", "good", "best"],
    typer.Option(
        "--quality",
        help="fast = heads only; good; best = larger images, more epochs and folds.",
    ),
]
Devices = Annotated[
    str,
    typer.Option(
        "--devices",
        help="Jobs to train at the same time: a number, or all GPUs (default train.devices).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
ModelFile = Annotated[Path, typer.Argument(help="An exported model file.")]
Mode = Annotated[
    str,
    typer.Option(
        "--mode", help="full: run every member; fast: stop once the first members are sure."
    ),
]
ImageTime = Annotated[
    str,
    typer.Option(
        "--budget",
        help="Time per image, e.g. 15ms: run as many members as fit, measured on this machine.",
    ),
]
