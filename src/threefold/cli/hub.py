"""Verbs about the Hugging Face hub: push, pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from threefold.cli.console import out
from threefold.lazy import importing_for_good

Repository = Annotated[
    str, typer.Argument(metavar="USER/NAME", help="A model repository on the Hugging Face hub.")
]
Licence = Annotated[
    str, typer.Option("--licence", help="Licence of the model, as the hub names it: apache-2.0.")
]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (push, pull):
        app.command()(verb)


def push(
    run_dir: Annotated[Path, typer.Argument(help="A finished run folder with its model.onnx.")],
    repository: Repository,
    private: Annotated[
        bool, typer.Option("--private", help="Only you can see a new repository.")
    ] = False,
    licence: Licence = "",
) -> None:
    """Publish a run on the Hugging Face hub: model, weights, scores, README.md; no images."""
    with importing_for_good():
        from threefold.exporting.hub_upload import push as push_run

    out.print(push_run(run_dir, repository, private=private, licence=licence), markup=False)
    out.print(f"next   threefold predict hf://{repository} IMAGE...", markup=False)


def pull(
    repository: Repository,
    folder: Annotated[
        Path | None, typer.Option("--out", help="The folder to write (default NAME).")
    ] = None,
    revision: Annotated[
        str, typer.Option("--revision", help="A branch, a tag or a commit (default: the newest).")
    ] = "",
) -> None:
    """Fetch a published model from the Hugging Face hub; needs no torch."""
    from threefold.runtime.hub import pull as pull_model

    model = pull_model(repository, folder, revision)
    out.print(f"{model}: {model.stat().st_size / 1e6:.1f} MB", markup=False)
    out.print(f"next   threefold predict {model} IMAGE...", markup=False)
