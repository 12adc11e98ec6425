"""The verb `demo`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from threefold.cli.console import out
from threefold.cli.options import RunOut, Verbose
from threefold.cli.output import resume_command, show_next_steps, show_results, watch_training
from threefold.errors import ExportError
from threefold.lazy import importing_for_good

if TYPE_CHECKING:
    from threefold.training.run import Run


def demo(
    out_dir: RunOut = Path("runs/demo"),
    verbose: Verbose = False,
) -> None:
    """Train, ensemble, export and predict on real images, in minutes."""
    with importing_for_good():
        from threefold import api
    from threefold.recipe.lookup import packaged

    with watch_training(verbose, resume_command("demo", "--out", out_dir)) as watcher:
        out.print(
            "threefold demo: 3 pretrained networks, 3,000 training images of Fashion-MNIST, "
            "1,000 sealed test images"
        )
        run = api.train(packaged("demo"), out_dir, watcher)
        api.finish(run)
    model = run.dir / "model.onnx"
    image, label = write_sample_image(run)
    show_results(run)
    out.print(f"\nThe exported file's answer to {image.name} (a {label}), from a new process:")
    out.print(predict_in_new_process(model, image).rstrip())
    show_next_steps(run, f"threefold serve {model}", "threefold fit FOLDER_OF_YOUR_IMAGES")


def write_sample_image(run: Run) -> tuple[Path, str]:
    """Write one test image as sample.png into the run folder; return its path and class."""
    from PIL import Image

    sources = run.sources
    dataset = sources.test if sources.test is not None else sources.train
    row = len(dataset) // 3
    path = run.dir / "sample.png"
    Image.fromarray(dataset.pixels(row)).save(path)
    return path, dataset.classes[int(dataset.labels[row])]


def predict_in_new_process(model: Path, image: Path) -> str:
    """Run `threefold predict` in a new process and return what it prints.

    Raises:
        ExportError: it fails.
    """
    command = [sys.executable, "-m", "threefold", "predict", str(model), str(image)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise ExportError(
            "the exported file does not answer in a fresh process",
            where=model,
            got=process.stderr.strip()[-200:],
        )
    return process.stdout
