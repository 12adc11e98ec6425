"""Several worker processes: the bits of one process, whoever is killed; one line where none can."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.frozen_runs import PROBE, frozen_tree
from support.tiny_runs import hash_files, make_folder

from threefold.errors import RecipeError, RunError
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Job, Recipe
from threefold.training.execution import Execution
from threefold.training.executors import devices
from threefold.training.executors.devices import count_devices, share_out
from threefold.training.executors.worker import CLAIMS_FOLDER
from threefold.training.jobs import train_members
from threefold.training.progress.watcher import Watcher
from threefold.training.run import Run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
TUNED: dict[str, Any] = {"name": "tuned", "backbone": "test_resnet", "img_size": 32}
STAGES = [
    {"name": "head", "kind": "head", "members": ["probe"]},
    {"name": "warm", "epochs": 2, "lr": 1e-3},
    {"name": "tune", "epochs": 1, "lr": 1e-3},
]
TWO = Execution(devices=2)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Train with one thread: their number decides the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Run:
    """A run of a head and a network of two stages, trained in this process."""
    folder = tmp_path_factory.mktemp("trained")
    tuned = {**TUNED, "weights": "none"}
    tree = frozen_tree(make_folder(folder / "images"), stages=STAGES, members=[PROBE, tuned])
    run = Run.create(Recipe.parse(tree), folder / "run")
    train_members(run)
    return run


def restart(trained: Run, folder: Path, watcher: Watcher | None = None) -> Run:
    """Return a copy of the run without its jobs, for two worker processes."""
    shutil.copytree(trained.dir, folder, ignore=shutil.ignore_patterns("jobs", "*.npz"))
    return Run(RunFolder(folder), watcher, trained.sources, execution=TWO)


def worker_numbers(run: Run) -> list[int]:
    """Numbers of the processes that work on a run."""
    parent = f"\nPPid:\t{os.getpid()}\n"
    children = [p.parent for p in Path("/proc").glob("[0-9]*/status") if parent in _read(p)]
    return [int(p.name) for p in children if "worker_process" in _read(p / "cmdline")]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


class Murderer(Watcher):
    """Kills all workers of a run when one of them reports an epoch; once, or each time."""

    def __init__(self, times: int = 1) -> None:
        self.times, self.notes = times, list[str]()
        self.run: Run | None = None
        self.jobs: list[Job] = []

    def job(self, job: Job, skipped: bool) -> None:
        self.jobs.append(job)

    def epoch(self, record: dict[str, Any]) -> None:
        assert self.run is not None
        if self.times:
            self.times -= 1
            for number in worker_numbers(self.run):
                os.kill(number, signal.SIGKILL)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Reports(Watcher):
    """Keeps what is reported, and stops after some epochs."""

    def __init__(self, stop_after: int = -1) -> None:
        self.planned: list[Job] = []
        self.images: dict[Job, int] = {}
        self.epochs: list[Job] = []
        self.over: list[Job] = []
        self.stop_after = stop_after

    def focus(self, job: Job) -> None:
        self.now = job

    def plan(self, jobs: Sequence[Job], images: Sequence[int]) -> None:
        self.planned = list(jobs)

    def batch(self, images: int) -> None:
        self.images[self.now] = self.images.get(self.now, 0) + images

    def epoch(self, record: dict[str, Any]) -> None:
        self.epochs.append(self.now)
        if len(self.epochs) == self.stop_after:
            self.stop = KeyboardInterrupt("a signal")

    def ended(self, job: Job, done: bool = True) -> None:
        self.over.append(job)


@pytest.mark.slow
def test_two_workers_have_the_bits_of_one_process(trained: Run, tmp_path: Path) -> None:
    reports = Reports()
    run = restart(trained, tmp_path / "two", reports)

    train_members(run)

    assert hash_files(run.dir) == hash_files(trained.dir)
    assert sorted(reports.over) == sorted(run.jobs) == sorted(reports.planned)
    fit = {job: len(run.roles[job.fold].fit) for job in run.jobs}
    epochs = {"head": 1, "warm": 2, "tune": 1}
    assert reports.images == {job: fit[job] * epochs[job.stage] for job in run.jobs}
    assert len(reports.epochs) == 2 * (1 + 2 + 1)
    assert not (run.dir / CLAIMS_FOLDER).exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_killed_workers_are_replaced(trained: Run, tmp_path: Path) -> None:
    murderer = Murderer()
    run = murderer.run = restart(trained, tmp_path / "killed", murderer)

    train_members(run)

    assert hash_files(run.dir) == hash_files(trained.dir)
    assert any("was ended by SIGKILL, perhaps for want of memory" in n for n in murderer.notes)
    assert len(murderer.jobs) > len(run.jobs)


@pytest.mark.slow
def test_a_stop_keeps_the_state_of_all_jobs(trained: Run, tmp_path: Path) -> None:
    run = restart(trained, tmp_path / "stopped", Reports(stop_after=3))
    with pytest.raises(KeyboardInterrupt, match="a signal"):
        train_members(run)
    left = sorted(path.name for path in run.dir.rglob(".resume"))
    done = [job for job in run.jobs if run.folder.is_done(job)]

    again = Run(RunFolder(run.dir), sources=trained.sources)  # one process, now
    train_members(again)

    assert not worker_numbers(run)
    assert left
    assert 0 < len(done) < len(run.jobs)
    assert hash_files(run.dir) == hash_files(trained.dir)


@pytest.mark.slow
def test_a_job_that_cannot_be_done_is_named(trained: Run, tmp_path: Path) -> None:
    run = restart(trained, tmp_path / "wrong")
    (run.dir / "jobs").mkdir()
    (run.dir / "jobs" / "tuned").write_text("in the way")

    with pytest.raises(RunError, match=r"tuned.* \(tuned fold[01] warm\); got Not a directory"):
        train_members(run)

    assert not worker_numbers(run)


def test_threads_and_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(2, 12)}, raising=False)

    three, twelve = share_out(3, "cpu"), share_out(12, "cpu")

    assert [part.cores for part in three] == [(2, 3, 4), (5, 6, 7), (8, 9, 10)]
    assert {part.threads for part in three} == {3}
    assert {(part.cores, part.threads) for part in twelve} == {((), 1)}


def test_each_worker_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")

    assert count_devices("all", "cuda") == 2
    assert [part.variables for part in share_out(2, "cuda")] == [
        {"CUDA_VISIBLE_DEVICES": "5"},
        {"CUDA_VISIBLE_DEVICES": "7"},
    ]
    with pytest.raises(RecipeError, match="at most 2, or all, got 3"):
        count_devices(3, "cuda")
    with pytest.raises(RecipeError, match="one of them by its number"):
        count_devices(2, "cuda:1")


def test_devices_belong_to_no_run(trained: Run, tmp_path: Path) -> None:
    tree = trained.recipe.model_dump(mode="json", exclude_none=True)
    other = Recipe.parse(tree, ["train.devices=all"])

    assert other.digest() == trained.recipe.digest()
    assert Run.create(other, trained.dir).dir == trained.dir
    with pytest.raises(RecipeError, match=r"train\.devices"):
        Recipe.parse(tree, ["train.devices=0"])
