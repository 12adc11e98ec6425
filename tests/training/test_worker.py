"""Workers: the jobs of a run in other processes, with the bits of one process."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.frozen_runs import PROBE, frozen_tree
from support.tiny_runs import hash_files, make_folder

from threefold.errors import RunError
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Job, Recipe
from threefold.training.executors.claims import Claims
from threefold.training.executors.order import Schedule, jobs_before
from threefold.training.executors.worker import CLAIMS_FOLDER, WorkOrder, open_worker
from threefold.training.jobs import train_members
from threefold.training.run import Run

TUNED: dict[str, Any] = {"name": "tuned", "starts_from": "probe", "img_size": 32}
STAGES = [
    {"name": "head", "kind": "head", "members": ["probe"]},
    {"name": "warm", "epochs": 1, "lr": 1e-3},
    {"name": "tune", "epochs": 1, "lr": 1e-3},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A probe and a member that is tuned from it in two stages, trained in one process."""
    folder = tmp_path_factory.mktemp("trained")
    tree = frozen_tree(make_folder(folder / "images"), stages=STAGES, members=[PROBE, TUNED])
    run = Run.create(Recipe.parse(tree), folder / "run")
    train_members(run)
    return run


def restart(trained: Run, folder: Path) -> Run:
    """Return a copy of the run without its jobs."""
    shutil.copytree(trained.dir, folder, ignore=shutil.ignore_patterns("jobs", "*.npz"))
    return Run(RunFolder(folder), sources=trained.sources)


def test_a_worker_does_the_jobs_of_a_run(trained: Run, tmp_path: Path) -> None:
    run = restart(trained, tmp_path / "again")
    schedule = Schedule(run, run.jobs, slots=2)

    while not schedule.is_over:
        job = schedule.start()
        assert job is not None
        worker = open_worker(WorkOrder.of(run))  # each time with nothing but the folder
        assert worker.run(job) == "done"
        schedule.finish(job)

    assert hash_files(run.dir / "jobs") == hash_files(trained.dir / "jobs")
    assert all(run.folder.is_done(job) for job in run.jobs)


def test_a_claimed_job_is_left_to_its_owner(trained: Run, tmp_path: Path) -> None:
    run = restart(trained, tmp_path / "again")
    job = run.jobs[0]
    claim = Claims(run.dir / CLAIMS_FOLDER).claim(job)
    worker = open_worker(WorkOrder.of(run), run.all_sources)
    assert claim is not None

    assert worker.run(job) == "claimed"
    assert not run.folder.is_done(job)

    claim.release()
    assert worker.run(job) == "done"
    assert worker.run(job) == "done"
    assert len([*(run.dir / CLAIMS_FOLDER).glob(f"*.{job.stage}.*")]) == 2


def test_a_worker_refuses_other_images(trained: Run, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "others", per_class=9)
    order = WorkOrder(str(trained.dir), trained.recipe.model_dump_json(), images=str(other))

    with pytest.raises(RunError, match="other images than the run began with"):
        open_worker(order)


def test_jobs_wait_for_those_before_them(trained: Run, tmp_path: Path) -> None:
    run = restart(trained, tmp_path / "again")
    head, warm, tune = (Job("probe", 0, "head"), Job("tuned", 0, "warm"), Job("tuned", 0, "tune"))
    schedule = Schedule(run, run.jobs, slots=3)

    assert jobs_before(run, tune) == [head, warm]
    assert schedule.width == 4
    assert [schedule.start() for _ in range(3)] == [head, head._replace(fold=1), None]
    schedule.finish(head)
    assert schedule.start() == warm
    assert schedule.put_back(warm, lost=True) == 1
    assert schedule.put_back(schedule.start() or tune, lost=True) == 2
    assert schedule.start() == warm
    assert schedule.start() is None


def test_two_slots_share_a_time_budget(trained: Run, tmp_path: Path) -> None:
    recipe = trained.recipe.model_copy(update={"budget_minutes": 10.0})
    run = Run(RunFolder(tmp_path, recipe), sources=trained.sources)
    shares = {}
    for slots in (1, 2):
        schedule = Schedule(run, run.jobs, slots)
        job = schedule.start()
        assert job is not None
        shares[slots] = schedule.seconds(job) / 600

    assert shares[1] == pytest.approx(1 / 6, abs=0.01)  # six jobs with one epoch each
    assert shares[2] == pytest.approx(1 / 3, abs=0.01)  # but never more than the chain allows


def test_without_a_budget_no_job_has_a_limit(trained: Run, tmp_path: Path) -> None:
    schedule = Schedule(
        Run(RunFolder(tmp_path, trained.recipe), sources=trained.sources), trained.jobs
    )

    job = schedule.start()

    assert job is not None
    assert math.isinf(schedule.seconds(job))
