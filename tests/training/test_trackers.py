"""Experiment trackers receive what a run reports, read back by their own clients."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.command_line import threefold_command
from support.notes import Notes
from support.tiny_runs import make_folder, tiny_tree

from threefold.api import train
from threefold.errors import MissingExtraError, RecipeError
from threefold.json_files import read_json
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Recipe
from threefold.training.progress import trackers
from threefold.training.progress.trackers import TrackedWatcher, Tracker, flatten
from threefold.training.progress.watcher import Watcher
from threefold.training.run import Run


class Broken(Tracker):
    """A tracker whose server is gone after the first epoch."""

    calls = 0

    def __init__(self, *_: object) -> None:
        type(self).calls = 0

    def log(self, *_: object) -> None:
        type(self).calls += 1
        raise OSError("no route to host")

    def summarize(self, values: dict[str, float]) -> None:
        raise AssertionError("called after it failed")


def tiny_recipe(images: Path) -> Recipe:
    """One member in one fold."""
    tree = tiny_tree(images, folds={"scheme": "holdout", "holdout": 0.3})
    return Recipe.model_validate(tree | {"members": tree["members"][:1]})


def train_tracked(folder: Path, *names: str, watcher: Watcher | None = None) -> Run:
    """Train while trackers listen."""
    with TrackedWatcher(watcher or Watcher(), names) as tracked:
        return train(tiny_recipe(make_folder(folder / "data")), folder / "run", tracked)


def test_unknown_tracker_is_refused() -> None:
    with pytest.raises(RecipeError, match="expected tensorboard, mlflow, wandb, got comet"):
        TrackedWatcher(Watcher(), ["comet"])


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)

    with pytest.raises(MissingExtraError, match=r"pip install .*\[mlflow\]'"):
        TrackedWatcher(Watcher(), ["mlflow"])


def test_settings_have_dotted_names() -> None:
    tree = {"train": {"lr": 0.1}, "members": [{"name": "a", "folds": [1, 2]}, {"side": 3}]}

    assert flatten(tree) == {
        "train.lr": 0.1,
        "members.a.name": "a",
        "members.a.folds": "[1, 2]",
        "members.1.side": 3,
    }


@pytest.mark.slow
def test_failing_tracker_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "broken", (Broken, "json"))
    watcher = Notes()

    run = train_tracked(tmp_path, "broken", watcher=watcher)

    assert run.folder.is_finished
    assert Broken.calls == 1
    about = [note for note in watcher.notes if note.startswith("broken receives nothing")]
    assert len(about) == 1
    assert "no route to host" in about[0]


FULL_DISK = """
import resource, sys, time
from pathlib import Path
from threefold.training.progress.trackers import TensorBoard
board = TensorBoard(Path(sys.argv[1]), "run", {"seed": 0})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    for step in range(100):
        board.log("train", step, {"loss": 1.0})
        time.sleep(0.01)  # the thread that writes has its turn
except OSError as error:
    print(error.strerror)
"""


def test_tensorboard_on_a_full_disk_prints_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("resource")

    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True
    )

    assert done.stdout == "File too large\n"
    assert "Traceback" not in done.stderr


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_holds_each_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_tracked(tmp_path, "tensorboard")

    events = EventAccumulator(str(run.dir / "tensorboard"))
    events.Reload()
    history = read_json(run.dir / "jobs" / "plain" / "fold0" / "one" / "history.json")["epochs"]
    losses = events.Scalars("plain/fold0/one/loss")
    expected = [epoch["loss"] for epoch in history if epoch["epoch"] >= 0]
    assert [event.value for event in losses][-len(expected) :] == pytest.approx(expected)
    (accuracy,) = events.Scalars("oof/plain/accuracy")
    score = run.results.score("plain", "member", "oof")
    assert score is not None
    assert accuracy.value == pytest.approx(score.accuracy)


def train_by_command(folder: Path, tracker: str, **variables: str) -> RunFolder:
    """Train by the program with a tracker; returns the run folder."""
    recipe = tiny_recipe(make_folder(folder / "data"))
    (folder / "recipe.toml").write_text(recipe.dump(), encoding="utf-8")
    words = ["train", str(folder / "recipe.toml"), "--out", str(folder / "run"), "--log", tracker]

    done = threefold_command(*words, variables=variables)

    assert done.returncode == 0, done.stderr
    assert "receives nothing" not in done.stdout
    return RunFolder.open(folder / "run")


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    """A server of MLflow on this machine; yields its address."""
    pytest.importorskip("mlflow.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            for _ in range(400):
                with suppress(OSError):
                    urllib.request.urlopen(f"{address}/health", timeout=1).close()
                    break
                time.sleep(0.5)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_server_holds_the_run(tmp_path: Path, mlflow_server: str) -> None:
    from mlflow.tracking import MlflowClient

    train_by_command(tmp_path, "mlflow", MLFLOW_TRACKING_URI=mlflow_server)
    folder = train_by_command(tmp_path, "mlflow", MLFLOW_TRACKING_URI=mlflow_server)

    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("threefold")
    assert experiment is not None
    (record,) = client.search_runs([experiment.experiment_id])  # the second call added none
    assert record.info.status == "FINISHED"
    assert record.data.params["members.plain.backbone"] == "test_resnet"
    score = folder.results.score("plain", "member", "oof")
    assert score is not None
    assert record.data.metrics["oof/plain/accuracy"] == pytest.approx(score.accuracy)
    losses = client.get_metric_history(record.info.run_id, "plain/fold0/one/loss")
    assert len(losses) >= 2
    names = {entry.path for entry in client.list_artifacts(record.info.run_id)}
    assert {"recipe.toml", "results.json", "report.html"} <= names


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_dead_mlflow_server_costs_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    watcher = Notes()

    run = train_tracked(tmp_path, "mlflow", watcher=watcher)

    assert run.folder.is_finished
    assert any(note.startswith("mlflow receives nothing") for note in watcher.notes)


@pytest.mark.slow
def test_wandb_without_a_key_writes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    folder = train_by_command(tmp_path, "wandb", NETRC=str(tmp_path / "netrc"))

    (run,) = (folder.path / "wandb").glob("offline-run-*")
    (log,) = run.glob("*.wandb")
    content = log.read_bytes()
    assert b"plain/fold0/one/loss" in content
    assert b"oof/plain/accuracy" in content
