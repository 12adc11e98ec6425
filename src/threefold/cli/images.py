"""Verbs that answer images with a trained model: predict."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from threefold.cli.console import out, print_error
from threefold.cli.options import Address, Executor, ImageTime, Json, Mode, ModelFile
from threefold.cli.output import executor_words
from threefold.cli.progress import describe_speed, progress_bar
from threefold.errors import DataError
from threefold.lazy import importing_for_good
from threefold.names import count_of

if TYPE_CHECKING:
    from threefold.runtime.model import CascadePolicy
    from threefold.runtime.predict import Engine


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(predict)


def predict(
    model: ModelFile,
    images: Annotated[
        list[str], typer.Argument(help="Files, folders, or - for a list on standard input.")
    ],
    top: Annotated[int, typer.Option("--top", min=1, help="Number of classes to name.")] = 3,
    as_json: Json = False,
    csv: Annotated[
        bool,
        typer.Option(
            "--csv", help="One row per image with every probability; `evaluate` reads it."
        ),
    ] = False,
    mode: Mode = "full",
    budget: ImageTime = "",
    target: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Write to this .csv, .jsonl or .parquet; the same command again goes on with it.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", help="cpu, cuda, coreml or openvino, as far as onnxruntime has them."
        ),
    ] = "cpu",
    batch: Annotated[
        str,
        typer.Option(
            "--batch",
            help="Images at a time: a number, or auto, which tries a few sizes. "
            "Without it auto with --out or --device, else 1.",
        ),
    ] = "",
    heat: Annotated[
        Path | None,
        typer.Option(
            "--heat",
            metavar="DIR",
            help="Also write a picture per image: what hiding parts costs the answer; 65 times "
            "slower.",
        ),
    ] = None,
    executor: Executor = "local",
    address: Address = "",
) -> None:
    """Classify images with an exported file; needs no torch."""
    with importing_for_good():
        from threefold.runtime import predict as answers
        from threefold.runtime.devices import find_device

    policy = answers.parse_policy(mode, budget)
    executor_words(executor, address)
    form = _choose_form(target, as_json=as_json, csv=csv)
    _check_target(target, heat, executor)
    if executor == "local":
        find_device(device)
    is_many = target is not None or device != "cpu"
    engine = answers.Engine(device, answers.parse_batch(batch or ("auto" if is_many else "1")))
    if target is not None:
        cluster = address if executor == "ray" else None
        _predict_to_file(target, model, images, top, policy, engine, cluster)
        return
    failed = answers.write_predictions(
        sys.stdout, print_error, model, images, top, form, policy, engine, heat
    )
    if failed:
        raise SystemExit(1)


def _choose_form(target: Path | None, *, as_json: bool, csv: bool) -> str:
    """Return the form of what is printed: text, json or csv.

    Raises:
        DataError: two forms are given, or one beside a file, whose suffix says it.
    """
    if target is not None and (csv or as_json):
        raise DataError(
            "--out says the form of the results by its suffix",
            where=target,
            fix="leave --csv and --json out",
        )
    if csv and as_json:
        raise DataError("--csv and --json are two forms of the answers", fix="give one of them")
    if as_json:
        return "json"
    return "csv" if csv else "text"


def _check_target(target: Path | None, heat: Path | None, executor: str) -> None:
    """Check that what needs a file of answers has one, and the reverse.

    Raises:
        DataError: a cluster has none, or heat maps have one.
    """
    if target is None and executor == "ray":
        raise DataError(
            "a cluster answers into a file",
            where="--executor ray",
            fix="add --out, with the name of a .csv, .jsonl or .parquet",
        )
    if target is not None and heat is not None:
        raise DataError(
            "--out writes no heat maps", where=target, fix="give --heat in a command without it"
        )


def _predict_to_file(
    target: Path,
    model: Path,
    images: list[str],
    top: int,
    policy: CascadePolicy,
    engine: Engine,
    cluster: str | None,
) -> None:
    """Write the answers into a file, with a bar, and say what it has."""
    from threefold.runtime.predict_file import predict_to_file

    with progress_bar("images", speed=True) as progress:
        done = predict_to_file(
            target, print_error, model, images, top, policy, engine, progress, cluster
        )
    answered = done.images - done.resumed
    speed = ""
    if answered:
        speed = f" ({describe_speed(answered / done.seconds)}, batch {done.batch})"
    failed = f", {done.failed:,} could not be read" if done.failed else ""
    number = count_of(done.images, "image")
    out.print(f"{target}: {number}{failed}; {answered:,} now{speed}", markup=False)
    if done.failed:
        raise SystemExit(1)
