"""An interrupted fit goes on to the same bits, and opens the test rows once, at its end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from support.tiny_runs import hash_files, make_folder

from threefold import api
from threefold.errors import RunError
from threefold.evaluation.saved import evaluate_saved
from threefold.json_files import read_json
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Job
from threefold.report.pages import write_report
from threefold.training.planning import tuning as plan_tuning
from threefold.training.progress.watcher import Watcher
from threefold.training.run import Run

MEMBERS = ("test_resnet",)
SETS = (
    "stages.tune1.epochs=2",
    "stages.tune2.epochs=1",
    "members.0.weights=none",
    "members.0.img_size=32",
    "train.device=cpu",
    "train.precision=float32",
    "features.engine=torch",
    "folds.k=2",
)


class Stopped(Exception):
    """A person or the machine stops the program."""


class Stopper(Watcher):
    """Stops a fit at the event for which `stops` is true: a note, or a job with its epochs."""

    def __init__(self, stops: Callable[[str, Job | None, int], bool]) -> None:
        self.stops = stops
        self.current: Job | None = None
        self.jobs, self.epochs = 0, 0

    def note(self, text: str) -> None:
        self.check(text)

    def job(self, job: Job, skipped: bool) -> None:
        self.current, self.epochs = job, 0
        self.check("job")

    def epoch(self, record: dict[str, Any]) -> None:
        self.epochs += 1
        self.check("epoch")

    def check(self, text: str) -> None:
        if self.stops(text, self.current, self.epochs):
            raise Stopped


def fit(images: Path, out: Path, watcher: Watcher | None = None) -> Run:
    """Fit one tiny network in an unlimited time, so that nothing depends on the clock."""
    return api.fit(images, out, budget=0, members=MEMBERS, overrides=SETS, watcher=watcher)


def openings(folder: Path) -> list[str]:
    """Which verbs have opened the test rows."""
    ledger = folder / "ledger.json"
    opened = read_json(ledger)["test_opened"] if ledger.exists() else []
    return [opening["by"] for opening in opened]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THREEFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), 8, test=4)


@pytest.fixture(scope="module")
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(images, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def sealed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first answer; only to be read."""
    folder = tmp_path_factory.mktemp("sealed") / "run"
    stopper = Stopper(lambda text, *_: text.startswith("a first answer"))
    with pytest.raises(Stopped):
        fit(images, folder, stopper)
    return folder


def check_resumed(images: Path, folder: Path, uninterrupted: Run) -> None:
    """Resume a stopped run, and compare it with an uninterrupted one."""
    resumed = fit(images, folder)

    changing = {"created", "seconds", "test_opened", "export"}
    assert hash_files(folder) == hash_files(uninterrupted.dir)
    left, right = (run.results.model_dump(exclude=changing) for run in (resumed, uninterrupted))
    assert left == right
    assert openings(folder) == openings(uninterrupted.dir) == ["train", "export"]
    export, whole = resumed.results.export, uninterrupted.results.export
    assert export is not None
    assert whole is not None
    assert (export.bytes, export.max_difference) == (whole.bytes, whole.max_difference)


@pytest.mark.slow
def test_after_the_first_answer(
    images: Path, sealed: Path, tmp_path: Path, uninterrupted: Run
) -> None:
    folder = shutil.copytree(sealed, tmp_path / "run")
    assert RunFolder(folder).is_sealed
    assert openings(folder) == []

    check_resumed(images, folder, uninterrupted)


@pytest.mark.slow
def test_before_the_first_answer_is_exported(
    images: Path, tmp_path: Path, uninterrupted: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopper = Stopper(lambda text, *_: text.startswith("a first answer"))
    with monkeypatch.context() as patch:
        patch.setattr(api, "export", Mock(side_effect=Stopped))
        with pytest.raises(Stopped):
            fit(images, tmp_path / "run")
    with pytest.raises(Stopped):
        fit(images, tmp_path / "run", stopper)
    assert (tmp_path / "run" / "model.onnx").exists()

    check_resumed(images, tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "fold", "epochs"),
    [pytest.param("tune1", 1, 0, marks=pytest.mark.long), ("tune1", 0, 1), ("tune2", 0, 0)],
)
def test_while_tuning(
    images: Path, tmp_path: Path, uninterrupted: Run, stage: str, fold: int, epochs: int
) -> None:
    def stops(text: str, job: Job | None, done: int) -> bool:
        return job is not None and job[1:] == (fold, stage) and done == epochs

    with pytest.raises(Stopped):
        fit(images, tmp_path / "run", Stopper(stops))

    assert RunFolder(tmp_path / "run").is_sealed
    assert openings(tmp_path / "run") == []
    check_resumed(images, tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_without_time_to_tune_the_probes_are_final(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "LEAST_TUNING_SECONDS", 1e9)
    sets = (*SETS, "stages.tune1.lr=0.002")

    def call() -> Run:
        members = ("test_resnet",)
        return api.fit(images, tmp_path / "run", budget=60, members=members, overrides=sets)

    run, again = call(), call()

    assert len(run.recipe.members) == 1
    assert run.folder.is_finished
    assert openings(run.dir) == ["train", "export"]
    assert (run.dir / "model.onnx").exists()
    assert again.results.scores == run.results.scores


def test_a_sealed_run_is_evaluated_out_of_fold(sealed: Path) -> None:
    evaluation = evaluate_saved(sealed, ["mean"])

    assert {score.rows for score in evaluation.scores} == {"oof"}
    assert RunFolder(sealed).chosen_predictions().kind == "oof"
    with pytest.raises(RunError, match="sealed until all members are trained"):
        evaluate_saved(sealed, ["mean"], reopen=True)
    with pytest.raises(RunError, match="no test predictions"):
        RunFolder(sealed).predictions("test")
    assert openings(sealed) == []


def test_the_report_says_that_members_follow(sealed: Path, tmp_path: Path) -> None:
    page = write_report([sealed], tmp_path / "page.html").read_text()

    first, *_ = page.partition("Measured on")
    assert "a first answer" in first
    assert "m0-test_resnet-tuned" in first
    assert "the test set stays sealed" in first


@pytest.mark.slow
def test_many_images_are_fitted_on_one_split(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_tuning, "HOLDOUT_FROM", 10)
    sets = tuple(text for text in SETS if text != "folds.k=2")
    table = tmp_path / "photos.csv"
    rows = [(path, path.parent.name) for path in sorted((images / "train").rglob("*.png"))]
    table.write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in rows))

    run = api.fit(table, tmp_path / "run", budget=0, members=MEMBERS, overrides=sets)

    assert run.recipe.data.source == "csv"
    assert run.recipe.folds.scheme == "holdout"
    assert set(run.roles) == {0}
    oof = run.predictions("oof")
    assert oof.ids == tuple(run.sources.train.ids[row] for row in run.roles[0].score)
    assert run.results.export is not None
    assert run.final_folds == [0]
