"""The child process of `threefold ui`: check, plan or fit one run, and report in a file.

`python -m threefold.cli.ui_worker TASK STATE_FOLDER RUN_FOLDER`
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from threefold.arguments import parse_minutes
from threefold.cli import STARTED
from threefold.cli.signals import catch_signals
from threefold.errors import RunError, ThreefoldError, is_out_of_memory, out_of_memory
from threefold.extras import missing_extra
from threefold.files import write_bytes
from threefold.json_files import read_json, write_json
from threefold.lazy import importing_for_good
from threefold.serving.ui_jobs import EVENTS, LOCK, LOG, PROCESS, UNWRITTEN
from threefold.training.progress.event_watcher import EventLog, EventWatcher

LISTED: Final = 50
"""Images that stand out which the page shows."""


def main() -> None:
    """Do the task that the command line names; exits with `UNWRITTEN` if its end is not in the log.

    Raises:
        SystemExit: with that code.
    """
    task, state_folder, run_folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    try:
        is_written = _work(task, state_folder, run_folder)
    except Timeout:
        raise
    except (OSError, RunError) as error:  # the folder of the page cannot be written
        with suppress(OSError):  # standard error is a file there
            print(error, file=sys.stderr)
        is_written = False
    if not is_written:
        raise SystemExit(UNWRITTEN)


def _work(task: str, state_folder: Path, run_folder: Path) -> bool:
    """Do a task; returns whether the log says how it ended."""
    with FileLock(state_folder / LOCK, timeout=20):  # the server may look at it just now
        write_bytes(state_folder / PROCESS, str(os.getpid()).encode())
        log = EventLog(state_folder / EVENTS)
        log.write("task", task=task)
        watcher = EventWatcher(log)
        try:
            with catch_signals(watcher):
                TASKS[task](state_folder, run_folder, watcher)
        except KeyboardInterrupt:
            return log.write("stopped", task=task)
        except Exception as error:
            return log.write("failed", task=task, message=_one_line(error, state_folder / LOG))
        return log.write("done", task=task)


def _one_line(error: Exception, log: Path) -> str:
    """Say what went wrong; what only a developer can mend is in the log, too."""
    if isinstance(error, ThreefoldError):
        return str(error)
    if is_out_of_memory(error):
        return str(out_of_memory("threefold ui", error))
    if isinstance(error, ModuleNotFoundError):
        missing = missing_extra(error, "all", "threefold ui")
        if missing is not None:
            return str(missing)
    with suppress(OSError):
        traceback.print_exc()
    if isinstance(error, OSError):
        return str(RunError("cannot use the file", where=error.filename or "", got=error))
    return str(RunError(f"this is a fault of threefold: {type(error).__name__}", where=log))


def _settings(state_folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the data of a run, and what its page has chosen."""
    state = read_json(state_folder / "state.json")
    return state["data"], state.get("settings", {})


def check(state_folder: Path, run_folder: Path, watcher: EventWatcher) -> None:
    """Look at all images, and write check.json."""
    with importing_for_good():
        from threefold.data.check import check_data, find_spec

    data, _ = _settings(state_folder)
    spec = find_spec(data).model_copy(update={"bad_images": "skip"})
    report = check_data(spec)
    tree = {
        "classes": report.classes,
        "sizes": dict(list(report.sizes.items())[:LISTED]),
        "skipped": len(report.skipped),
        "findings": [finding._asdict() for finding in report.findings],
        "quality": [finding._asdict() for finding in report.quality[:LISTED]],
        "usable": report.usable,
    }
    write_json(state_folder / "check.json", tree)


def plan(state_folder: Path, run_folder: Path, watcher: EventWatcher) -> None:
    """Write the recipe into the run folder, where `fit` takes it up, and plan.json."""
    with importing_for_good():
        from threefold.data.group_file import GROUP_FILE
        from threefold.predictions.run_folder import RunFolder
        from threefold.training.planning.plan import plan_folder

    data, settings = _settings(state_folder)
    if (run_folder / "run.json").exists():
        raise RunError("training has begun with its plan", where=run_folder)
    if (state_folder / "plan.json").exists():  # an earlier plan of this page
        for path in (run_folder / "recipe.toml", run_folder / GROUP_FILE):
            path.unlink(missing_ok=True)
    RunFolder(run_folder).check_new()
    overrides = ("data.bad_images=skip",) if settings.get("skip_bad") else ()
    planned = plan_folder(
        data,
        parse_minutes(settings["budget"]),
        (),
        overrides,
        settings["quality"],
        watcher,
        run_folder / GROUP_FILE,
        began=STARTED,
    )
    decisions = [[d.key, str(d.value), d.reason] for d in planned.decisions]
    recipe = planned.recipe
    tree = {
        "decisions": decisions,
        "members": [[member.name, member.backbone, member.img_size] for member in recipe.members],
        "stages": [stage.name for stage in recipe.stages],
        "settings": settings,
    }
    write_json(state_folder / "plan.json", tree)
    RunFolder.create(run_folder, recipe, planned.explain())


def fit(state_folder: Path, run_folder: Path, watcher: EventWatcher) -> None:
    """Train by the recipe in the run folder; what is finished is kept."""
    with importing_for_good():
        from threefold.api import fit as fit_data
    from threefold.recipe.recipe import Recipe

    _, settings = _settings(state_folder)
    # A folder with a table inside has the table as its root.
    data = Recipe.load(run_folder / "recipe.toml").data.root
    fit_data(
        data,
        run_folder,
        budget=settings["budget"],
        quality=settings["quality"],
        watcher=watcher,
        began=STARTED,
    )


TASKS: Final[dict[str, Callable[[Path, Path, EventWatcher], None]]] = {
    "check": check,
    "plan": plan,
    "fit": fit,
}

if __name__ == "__main__":
    main()
