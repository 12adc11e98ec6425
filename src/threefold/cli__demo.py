"""The verb `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from threefold.cli__output import show_next_steps, show_results, watch_training
from threefold.console import out


def demo(
    out_dir: Annotated[Path, typer.Option("--out", help="The run folder.")] = Path("runs/demo"),
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print a line per job and epoch.")
    ] = False,
) -> None:
    """Train, ensemble, report, export and predict: pretrained members, real images, minutes."""
    from threefold import workflow
    from threefold.recipe import packaged

    with watch_training(verbose, f"threefold demo --out {out_dir}") as watcher:
        out.print(
            "threefold demo: 3 pretrained networks, 3,000 training images of Fashion-MNIST, "
            "1,000 sealed test images"
        )
        run = workflow.train(packaged("demo"), out_dir, watcher)
        workflow.finish(run)
    model = run.dir / "model.onnx"
    image, label = workflow.sample_image(run)
    show_results(run)
    out.print(f"\nThe exported file's answer to {image.name} (a {label}), from a new process:")
    out.print(workflow.predict_elsewhere(model, image).rstrip())
    show_next_steps(run, f"threefold serve {model}", "threefold fit FOLDER_OF_YOUR_IMAGES")
