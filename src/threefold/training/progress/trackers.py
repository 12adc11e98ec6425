"""Experiment trackers: what a run reports also goes to TensorBoard, MLflow or Weights & Biases.

Each library is optional and imported only when it is asked for, and configured as its own users
configure it: by `MLFLOW_TRACKING_URI`, `WANDB_MODE` and so on. A tracker that fails is left out
from there on; training never waits for it and never stops because of it.
"""

from __future__ import annotations

import importlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from threefold.errors import RecipeError, RunError
from threefold.extras import require_package
from threefold.json_files import read_json, write_json
from threefold.predictions.multilabel_results import MultilabelResults
from threefold.predictions.run_results import AnyResults
from threefold.recipe.recipe import Job, Recipe, fold_name
from threefold.training.progress.watcher import Watcher

if TYPE_CHECKING:
    from collections.abc import Iterator

ID_FILE: Final = "trackers.json"
"""In the run folder: the trackers' own names of the run, by which a resumed run goes on there."""
FILES: Final = ("recipe.toml", "results.json", "report.html", "model.onnx")
"""Files of the run folder that trackers which keep files receive at the end."""
PATIENCE: Final = 30.0
"""Seconds that the end of a run waits for what trackers have not sent yet."""


class Tracker:
    """One experiment tracker; subclasses call their library.

    Args:
        folder: the run folder.
        name: of the run.
        settings: of the recipe, by dotted keys.
        run_id: what `run_id` was in an earlier part of this run; empty for a new one.
    """

    run_id: str = ""

    def __init__(
        self, folder: Path, name: str, settings: dict[str, object], run_id: str = ""
    ) -> None:
        raise NotImplementedError

    def log(self, group: str, step: int, values: dict[str, float]) -> None:
        """Send the values of one epoch.

        Args:
            group: member, fold and stage, such as `lite0/fold0/tune`.
            step: number of the epoch.
            values: by name.
        """
        raise NotImplementedError

    def summarize(self, values: dict[str, float]) -> None:
        """Send the scores of the whole run."""
        raise NotImplementedError

    def keep(self, files: Sequence[Path]) -> None:
        """Send the files of a finished run, where the tracker keeps files."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard."""

    def __init__(
        self, folder: Path, name: str, settings: dict[str, object], run_id: str = ""
    ) -> None:
        tensorboard: Any = importlib.import_module("torch.utils.tensorboard")
        _silence_writer_threads()
        self.writer = tensorboard.SummaryWriter(str(folder / "tensorboard"))
        rows = "\n".join(f"    {key} = {value}" for key, value in settings.items())
        self.writer.add_text("recipe", rows)

    def log(self, group: str, step: int, values: dict[str, float]) -> None:
        """Send the values of one epoch."""
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)
        self.writer.flush()

    def summarize(self, values: dict[str, float]) -> None:
        """Send the scores of the whole run, as scalars at step 0."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, 0)
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


@cache
def _silence_writer_threads() -> None:
    """Let TensorBoard's threads print no traceback of a full disk; `flush` raises the error."""
    usual = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        is_writer = type(failure.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(failure.exc_value, OSError)):
            usual(failure)

    threading.excepthook = hook


class MLflow(Tracker):
    """A run of the experiment `MLFLOW_EXPERIMENT_NAME`, or `threefold`."""

    def __init__(
        self, folder: Path, name: str, settings: dict[str, object], run_id: str = ""
    ) -> None:
        # Its client tries a dead server again and again, for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        mlflow: Any = importlib.import_module("mlflow.tracking")
        self.client = mlflow.MlflowClient()
        if run_id:
            self.client.update_run(run_id, "RUNNING")
        else:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "threefold")
            known = self.client.get_experiment_by_name(experiment)
            number = known.experiment_id if known else self.client.create_experiment(experiment)
            run_id = self.client.create_run(number, run_name=name).info.run_id
            for key, value in settings.items():
                self.client.log_param(run_id, key, str(value)[:500])
        self.run_id = run_id

    def log(self, group: str, step: int, values: dict[str, float]) -> None:
        """Send the values of one epoch."""
        for name, value in values.items():
            self.client.log_metric(self.run_id, f"{group}/{name}", value, step=step)

    def summarize(self, values: dict[str, float]) -> None:
        """Send the scores of the whole run."""
        for name, value in values.items():
            self.client.log_metric(self.run_id, name, value)

    def keep(self, files: Sequence[Path]) -> None:
        """Store the files as artifacts."""
        for file in files:
            self.client.log_artifact(self.run_id, str(file))

    def close(self) -> None:
        """Mark the run as finished."""
        self.client.set_terminated(self.run_id)


class WeightsAndBiases(Tracker):
    """A run of the project `WANDB_PROJECT`, or `threefold`; offline without an API key."""

    def __init__(
        self, folder: Path, name: str, settings: dict[str, object], run_id: str = ""
    ) -> None:
        wandb: Any = importlib.import_module("wandb")
        mode = os.environ.get("WANDB_MODE")
        if not mode:  # without a key the library would ask for one and wait
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "threefold"),
            name=name,
            dir=os.environ.get("WANDB_DIR", str(folder)),
            id=run_id or None,
            resume="allow",
            config=dict(settings),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.run_id = self.run.id
        self.groups: set[str] = set()

    def log(self, group: str, step: int, values: dict[str, float]) -> None:
        """Send the values of one epoch; each job has its own axis of epochs."""
        axis = f"{group}/epoch"
        if group not in self.groups:
            self.groups.add(group)
            self.run.define_metric(axis)
            self.run.define_metric(f"{group}/*", step_metric=axis)
        self.run.log({axis: step} | {f"{group}/{name}": value for name, value in values.items()})

    def summarize(self, values: dict[str, float]) -> None:
        """Send the scores of the whole run to its summary."""
        self.run.summary.update(values)

    def keep(self, files: Sequence[Path]) -> None:
        """Store copies of the files with the run."""
        for file in files:
            self.run.save(str(file), base_path=str(file.parent), policy="now")

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


TRACKERS: Final[dict[str, tuple[type[Tracker], str]]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "mlflow": (MLflow, "mlflow"),
    "wandb": (WeightsAndBiases, "wandb"),
}
"""By the name that users type: the class, and the package that it needs."""


class TrackedWatcher(Watcher):
    """Passes what a run reports on to another watcher and to trackers.

    Trackers work in a thread of their own, in order.

    Args:
        watcher: the other watcher, which also decides when training stops.
        names: keys of `TRACKERS`.

    Raises:
        RecipeError: a name is unknown.
        MissingExtraError: a package is not installed.
    """

    def __init__(self, watcher: Watcher, names: Sequence[str]) -> None:
        for name in names:
            _check(name)
        self.watcher = watcher
        self.names = tuple(dict.fromkeys(names))
        self._open: dict[str, Tracker] = {}
        self._folder: Path | None = None
        self._group = ""
        self._failures: list[tuple[str, Exception]] = []
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def __enter__(self) -> TrackedWatcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Send the files of a run that has ended well, and close it."""
        folder = self._folder
        if kind is None and folder is not None:
            files = [folder / name for name in FILES if (folder / name).exists()]
            self._send_all(lambda tracker: tracker.keep(files))
        self.finish()

    @property
    def stop(self) -> BaseException | None:  # type: ignore[override]
        """What training raises at its next safe point, as the other watcher says."""
        return self.watcher.stop

    @contextmanager
    def deferring_stop(self) -> Iterator[None]:
        """Defer a stop, as the other watcher does."""
        with self.watcher.deferring_stop():
            yield

    @property
    def defers_stop(self) -> bool:
        """Whether training will soon raise what `stop` is set to."""
        return self.watcher.defers_stop

    @defers_stop.setter
    def defers_stop(self, value: bool) -> None:
        """Tell the other watcher."""
        self.watcher.defers_stop = value

    def begin(self, folder: Path, recipe: Recipe) -> None:
        """Open the run in every tracker; what follows in the same folder belongs to it, too."""
        self.watcher.begin(folder, recipe)
        if folder == self._folder:
            return
        self.finish()
        self._folder, self._failures = folder, []
        self._thread = ThreadPoolExecutor(1, "trackers")
        ids = _read_ids(folder)
        settings = flatten(recipe.model_dump(mode="json", exclude_none=True))
        for name in self.names:
            self._send(name, partial(self._start, name, folder, recipe.name, settings, ids))

    def _start(
        self,
        name: str,
        folder: Path,
        title: str,
        settings: dict[str, object],
        ids: dict[str, str],
    ) -> None:
        kind, _ = TRACKERS[name]
        self._open[name] = tracker = kind(folder, title, settings, ids.get(name, ""))
        if tracker.run_id and tracker.run_id != ids.get(name):
            ids[name] = tracker.run_id
            write_json(folder / ID_FILE, ids)

    def plan(self, jobs: Sequence[Job], images: Sequence[int]) -> None:
        """Receive the jobs to come."""
        self.watcher.plan(jobs, images)

    def job(self, job: Job, skipped: bool) -> None:
        """A job begins, or is skipped."""
        self._group = _group_of(job)
        self.watcher.job(job, skipped)

    def focus(self, job: Job) -> None:
        """What follows is about one of several jobs."""
        self._group = _group_of(job)
        self.watcher.focus(job)

    def ended(self, job: Job, done: bool = True) -> None:
        """A job is done, or waits again."""
        self.watcher.ended(job, done)

    def batch(self, images: int) -> None:
        """Training has advanced."""
        self.watcher.batch(images)

    def features(self, done: int, total: int) -> None:
        """Frozen backbones have answered some of the images."""
        self.watcher.features(done, total)

    def note(self, text: str) -> None:
        """Receive a message for the user."""
        self.watcher.note(text)

    def epoch(self, record: dict[str, Any]) -> None:
        """Send the numbers of an epoch."""
        self.watcher.epoch(record)
        values = {name: float(value) for name, value in record.items() if _is_number(value)}
        step, group = int(values.pop("epoch")), self._group
        self._send_all(lambda tracker: tracker.log(group, step, values))

    def scored(self, results: AnyResults) -> None:
        """Send the scores of all members and ensembles."""
        self.watcher.scored(results)
        values = summary(results)
        self._send_all(lambda tracker: tracker.summarize(values))

    def finish(self) -> None:
        """Close the run in every tracker, and wait a while for what is not sent yet."""
        if self._thread is None:
            return
        self._send_all(lambda tracker: tracker.close())
        thread, self._thread, self._folder = self._thread, None, None
        pending = [] if self._last is None else [self._last]
        late = wait(pending, timeout=PATIENCE).not_done
        self._tell_failures()
        if late:
            names = ", ".join(self._open)
            self.watcher.note(f"{names}: the last records were not sent within {PATIENCE:.0f} s")
        thread.shutdown(wait=False, cancel_futures=True)
        self._open.clear()

    def _send_all(self, call: Callable[[Tracker], None]) -> None:
        for name in self.names:
            self._send(name, partial(self._call, name, call))

    def _call(self, name: str, call: Callable[[Tracker], None]) -> None:
        if name in self._open:
            call(self._open[name])

    def _send(self, name: str, work: Callable[[], None]) -> None:
        """Do something in the trackers' thread; a tracker that fails is left out afterwards."""
        self._tell_failures()
        if self._thread is None:
            return

        def guarded() -> None:
            try:
                work()
            except Exception as error:  # each library has its own errors
                self._open.pop(name, None)
                self._failures.append((name, error))

        self._last = self._thread.submit(guarded)

    def _tell_failures(self) -> None:
        while self._failures:
            name, error = self._failures.pop(0)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self.watcher.note(f"{name} receives nothing from here on ({reason}); training goes on")


def _group_of(job: Job) -> str:
    """Member, fold and stage, as trackers name a group of curves."""
    return f"{job.member}/{fold_name(job.fold)}/{job.stage}"


def _check(name: str) -> None:
    """Refuse an unknown tracker, or one whose package is missing."""
    if name not in TRACKERS:
        raise RecipeError("unknown tracker", where="--log", got=name, expected=", ".join(TRACKERS))
    require_package(TRACKERS[name][1], f"--log {name} needs", extra=name)


def _read_ids(folder: Path) -> dict[str, str]:
    """The trackers' names of this run; none where the file is missing or damaged."""
    try:
        ids = read_json(folder / ID_FILE)
    except RunError:
        return {}
    if not isinstance(ids, dict):
        return {}
    return {name: value for name, value in ids.items() if isinstance(value, str)}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """Return the values of nested tables by dotted keys; entries of a list go by their name."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            for i, entry in enumerate(value):
                flat |= flatten(entry, f"{name}.{entry.get('name', i)}.")
        else:
            flat[name] = json.dumps(value) if isinstance(value, list) else value
    return flat


def summary(results: AnyResults) -> dict[str, float]:
    """Return accuracy and log loss of members and ensembles, and what to expect on new images.

    Of any number of labels per image, mean average precision and F1 take the place of accuracy.
    """
    if isinstance(results, MultilabelResults):
        return _label_summary(results)
    values: dict[str, float] = {}
    for score in results.scores:
        group = f"{score.rows}/{score.name}"
        values[f"{group}/accuracy"] = score.accuracy
        values[f"{group}/log_loss"] = score.log_loss
    if results.expected is not None:
        values["expected_accuracy"] = results.expected.accuracy
        low, high = results.expected.interval
        values |= {"expected_accuracy_low": low, "expected_accuracy_high": high}
    return values


def _label_summary(results: MultilabelResults) -> dict[str, float]:
    values: dict[str, float] = {}
    for score in results.scores:
        group = f"{score.rows}/{score.name}"
        values[f"{group}/mean_average_precision"] = score.mean_average_precision
        values[f"{group}/macro_f1"] = score.macro_f1
        values[f"{group}/log_loss"] = score.log_loss
    if results.expected is not None:
        low, high = results.expected.mean_average_precision_interval
        values["expected_mean_average_precision"] = results.expected.mean_average_precision
        values["expected_mean_average_precision_low"] = low
        values["expected_mean_average_precision_high"] = high
    return values


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
