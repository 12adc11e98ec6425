"""The verb `ui`: a local page from images to a trained model."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from threefold.cli.console import err, out
from threefold.files import real_path

if TYPE_CHECKING:
    from threefold.predictions.multilabel_results import MultilabelScore
    from threefold.predictions.results_schema import Score


def ui(
    runs: Annotated[Path, typer.Option("--runs", help="The folder of runs.")] = Path("runs"),
    port: Annotated[
        int,
        typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 = any free one."),
    ] = 0,
    show: Annotated[bool, typer.Option("--open", help="Open the page in your browser.")] = False,
) -> None:
    """Open a local page: drop images, check them, plan, train, read the report, try the model.

    Only this machine is answered, and only with the key in the address. Closing the page stops
    nothing; Ctrl-C here saves what is being trained, and the page resumes it next time.
    """
    import timm  # noqa: F401  what is missing is better said now than after the images were sent
    import torch  # noqa: F401

    from threefold.serving.ui import run_ui
    from threefold.serving.ui_jobs import STATE_FOLDER, Workbench
    from threefold.serving.ui_uploads import Uploads

    def announce(address: str) -> None:
        out.print(f"{address}   (Ctrl-C stops)", markup=False)
        if show:
            webbrowser.open(address)

    command = [sys.executable, "-m", "threefold.cli.ui_worker"]
    workbench = Workbench(runs, command, resolve_data, describe_run)
    uploads = Uploads(runs.absolute() / STATE_FOLDER / "uploads")
    for name in run_ui(workbench, uploads, port, announce):
        err.print(f"[yellow]stopped[/] {name}; `threefold ui` resumes it", highlight=False)


def resolve_data(name: str) -> str:
    """Return the full path of what a person names, or its name on the hub.

    Raises:
        DataError: there is no such folder, archive or table.
    """
    from threefold.data.detect_source import detect_source
    from threefold.errors import DataError

    if not name.strip():
        raise DataError("no images were named", expected="a folder, an archive or a table")
    spec = detect_source(name.strip())
    if spec.source in ("huggingface", "webdataset"):
        return spec.root
    return str(real_path(Path(name.strip()).expanduser()))


def describe_run(folder: Path) -> dict[str, Any]:
    """Return what the page shows of a run's results, as plain values.

    `metric` is "accuracy", or "mAP" (mean average precision) of several labels per image; every
    score and what is expected have its `value` and `interval`.

    Args:
        folder: with a recipe; without results there is only the metric.

    Raises:
        RunError: results.json or the recipe is damaged.
    """
    path, recipe = folder / "results.json", folder / "recipe.toml"
    if path.exists():
        return dict(_describe(folder, path.stat().st_mtime_ns))
    return {"classes": 0, "metric": _metric(folder, recipe.stat().st_mtime_ns)}


@lru_cache(maxsize=256)
def _metric(folder: Path, _: int) -> str:
    """The metric that the page shows; the recipe is read once as long as it does not change."""
    from threefold.predictions.run_folder import RunFolder

    return "mAP" if RunFolder(folder).is_multilabel else "accuracy"


@lru_cache(maxsize=256)
def _describe(folder: Path, _: int) -> dict[str, Any]:
    """Read the results once as long as they do not change."""
    from threefold.predictions.multilabel_results import MultilabelResults
    from threefold.predictions.run_folder import RunFolder

    results = RunFolder(folder).any_results
    is_multilabel = isinstance(results, MultilabelResults)
    scores: Sequence[Score | MultilabelScore] = results.scores
    found: dict[str, Any] = {
        "metric": "mAP" if is_multilabel else "accuracy",
        "classes": len(results.classes),
        "pending": len(results.pending),
        "finished": not results.pending,
        "chosen": results.chosen,
        "reason": results.chosen_reason,
        "notes": list(results.notes),
        "scores": [
            {
                "name": score.name,
                "kind": score.kind,
                "rows": score.rows,
                "n": score.n,
                **_headline(score),
                "log_loss": score.log_loss,
                "chosen": score.kind == "ensemble" and score.name == results.chosen,
            }
            for score in sorted(scores, key=lambda s: (s.rows != "test", -_headline(s)["value"]))
        ],
    }
    if results.expected is not None:
        found["expected"] = {
            **_headline(results.expected),
            "n": results.expected.n,
            "basis": results.expected.basis,
        }
    return found


def _headline(record: Any) -> dict[str, Any]:
    """Return the metric of a score, or of what is expected, with its interval."""
    if hasattr(record, "accuracy"):
        return {"value": record.accuracy, "interval": list(record.interval)}
    interval = list(record.mean_average_precision_interval)
    return {"value": record.mean_average_precision, "interval": interval}
