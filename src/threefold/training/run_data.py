"""Where a fit from Python runs: the run folder, and the images in it if they are in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from threefold.data.in_memory import store_data, store_in_new_run
from threefold.errors import DataError, RunError
from threefold.predictions.run_folder import RunFolder, default_run_folder


def place_data(data: Any, labels: Any, out: str | Path | None) -> tuple[Path, str | Path]:
    """Choose the run folder of a fit, and write what is in memory into it.

    Args:
        data: a path, or as `in_memory.store_data` takes it.
        labels: of what is in memory, as there.
        out: the run folder; by default runs/NAME for a path and runs/memory-HASH else.

    Returns:
        The run folder, and a path to the images.

    Raises:
        RunError: `out` is no folder, or the folder has other files or a run on other data.
        DataError: images or labels cannot be used.
    """
    if out is not None and not isinstance(out, str | Path):
        raise RunError(
            "the second argument is the run folder",
            got=type(out).__name__,
            fix="give the labels by name: labels=...",
        )
    if not isinstance(data, str | Path):
        if out is None:
            return store_in_new_run(data, labels, Path("runs"))
        folder = Path(out)
        if not (folder / "recipe.toml").exists():
            RunFolder(folder).check_new()  # before anything is written there
        return folder, store_data(data, labels, folder)
    if labels is not None:
        raise DataError(
            "labels are given for images in memory only",
            got=data,
            fix="leave out labels: a folder has them as names of folders, a table as a column",
        )
    return (Path(out) if out is not None else default_run_folder(Path(data))), data
