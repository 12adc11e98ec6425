"""A run: every row is scored once, resumed equals uninterrupted, another recipe is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.tiny_runs import hash_files, make_folder, tiny_tree
from torch import nn

from threefold import api
from threefold.errors import RunError
from threefold.evaluation.saved import read_sources
from threefold.recipe.recipe import Job, Recipe
from threefold.training import job as job_module
from threefold.training.jobs import train_members
from threefold.training.run import Run
from threefold.training.stages.loop import train_stage
from threefold.training.stages.task import StageOutcome, StageTask


def small(images: Path, *sets: str) -> Recipe:
    """One member, one epoch per stage."""
    tree = tiny_tree(images)
    tree["members"] = tree["members"][:1]
    return Recipe.parse(tree, ["stages.one.epochs=1", *sets])


def test_rows_are_scored_by_a_fold_that_never_saw_them(finished: Run) -> None:
    oof = finished.predictions("oof")

    assert oof.ids == finished.sources.train.ids
    assert oof.folds is not None
    for fold, roles in finished.roles.items():
        rows = np.flatnonzero(oof.folds == fold)
        assert set(rows) == set(roles.score)
        assert not set(rows) & (set(roles.fit) | set(roles.select))
        stored = np.load(finished.folder.job_folder(Job("plain", fold, "two")) / "probs.npz")
        np.testing.assert_array_equal(oof.probs[0, stored["rows"]], stored["score"][0])


def test_test_rows_are_the_mean_of_the_fold_models(finished: Run) -> None:
    parts = [
        np.load(finished.folder.job_folder(Job("gated", fold, "two")) / "probs.npz")["test"][0]
        for fold in (0, 1)
    ]

    probs = finished.predictions("test").probs[1]

    np.testing.assert_allclose(probs, np.mean(parts, axis=0), atol=1e-7)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small run that nothing interrupts."""
    run = Run.create(small(images), tmp_path_factory.mktemp("runs") / "whole")
    train_members(run)
    return run


@pytest.mark.parametrize("stop_after", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted_bit_for_bit(
    whole: Run, images: Path, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages_done = []

    def interrupt(member: nn.Module, task: StageTask) -> StageOutcome:
        if len(stages_done) == stop_after:
            raise KeyboardInterrupt
        stages_done.append(task.stage.name)
        return train_stage(member, task)

    monkeypatch.setattr(job_module, "train_stage", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_members(Run.create(small(images), tmp_path / "cut"))
    monkeypatch.setattr(job_module, "train_stage", train_stage)

    resumed = Run.create(small(images), tmp_path / "cut")
    train_members(resumed)

    assert hash_files(resumed.dir) == hash_files(whole.dir)


def test_a_finished_run_is_not_trained_again(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "train_stage", None)

    again = api.train(finished.recipe, finished.dir)

    assert all(again.folder.is_done(job) for job in again.jobs)
    train_members(Run.create(finished.recipe, finished.dir))


def test_two_processes_do_not_work_in_one_run(tiny: Recipe, tmp_path: Path) -> None:
    code = (
        "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print('locked', flush=True); time.sleep(60)"
    )
    run = Run.create(tiny, tmp_path / "run")
    command = [sys.executable, "-c", code, str(run.dir / ".lock")]

    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(
            RunError, match=r"another process is at work in this run.*choose another --out"
        ):
            api.train(tiny, run.dir)
        other.kill()

    with run.folder.locked():  # the end of the process releases the lock
        assert not (run.dir / "jobs").exists()


def test_a_folder_of_another_recipe_is_refused(finished: Run) -> None:
    other = Recipe.parse(finished.recipe.model_dump(), ["train.batch_size=4", "seed=9"])

    with pytest.raises(
        RunError, match=r"another recipe.*seed.*train\.batch_size.*choose another --out"
    ):
        Run.create(other, finished.dir)

    Run.create(Recipe.parse(finished.recipe.model_dump(), ["name=renamed"]), finished.dir)


def test_a_folder_that_is_not_a_run_is_left_alone(tiny: Recipe, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")

    with pytest.raises(RunError, match="not empty and not a run"):
        Run.create(tiny, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(RunError, match=r"not a run folder.*recipe\.toml"):
        Run.open(tmp_path)


def test_a_damaged_file_of_a_finished_job_is_an_error(finished: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.dir, copy)
    path = copy / "jobs/plain/fold1/two/weights.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    run = Run.open(copy)

    with pytest.raises(
        RunError, match=r"missing or damaged: .*weights\.safetensors.*delete .*fold1 and run"
    ):
        run.load_member(run.recipe.members[0], 1, 3)
    run.load_member(run.recipe.members[0], 0, 3)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs /dev/full")
def test_a_full_disk_is_one_clear_error_and_the_run_resumes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(small(images), tmp_path / "run")
    fsync, descriptors = os.fsync, []

    def full(descriptor: int) -> None:
        descriptors.append(descriptor)
        if len(descriptors) >= 6:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        RunError, match=r"cannot write: .*No space left on device.*run the same command again"
    ):
        train_members(run)
    monkeypatch.setattr(os, "fsync", fsync)
    assert not list(run.dir.rglob("*.tmp"))

    again = Run.create(small(images), tmp_path / "run")
    train_members(again)

    assert again.predictions("oof").probs.shape == (1, 36, 3)


def test_an_output_below_a_file_is_one_clear_error(tiny: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    with pytest.raises(RunError, match="cannot write"):
        Run.create(tiny, tmp_path / "file" / "run")


@pytest.mark.slow
def test_paper_protocol_selects_on_test_and_says_so(images: Path, tmp_path: Path) -> None:
    run = api.train(small(images, "protocol=paper", "folds.k=1"), tmp_path / "paper")

    results = run.results
    assert {s.protocol for s in results.scores} == {"paper"}
    assert {s.rows for s in results.scores} == {"test"}
    assert any("selected on the scored rows" in note for note in results.notes)
    stacked = results.score("stacked", "ensemble", "test")
    assert stacked is not None
    assert stacked.fitted_on == "the scored rows"
    with pytest.raises(RunError, match=f"fix: for its test rows: threefold ensemble {run.dir}"):
        read_sources([run.dir])


def test_refit_answers_on_test_with_one_model(images: Path, tmp_path: Path) -> None:
    run = api.train(small(images, "folds.final=refit"), tmp_path / "refit")

    stored = np.load(run.folder.job_folder(Job("plain", -1, "two")) / "probs.npz")
    np.testing.assert_array_equal(run.predictions("test").probs[0], stored["test"][0])
    assert run.predictions("oof").probs.shape == (1, 36, 3)


def test_without_a_test_split_the_headline_is_out_of_fold(tmp_path: Path) -> None:
    run = api.train(small(make_folder(tmp_path / "flat", 10)), tmp_path / "run")

    assert {s.rows for s in run.results.scores} == {"oof"}
    api.report(run)
    with pytest.raises(RunError, match="no test predictions"):
        run.predictions("test")


def test_results_hold_every_score_with_interval_and_rows(finished: Run) -> None:
    results = json.loads((finished.dir / "results.json").read_text())

    names = {(s["name"], s["rows"]) for s in results["scores"]}

    assert names == {
        (n, r) for n in ("plain", "gated", "mean", "pruned", "stacked") for r in ("oof", "test")
    }
    for s in results["scores"]:
        assert 0 <= s["interval"][0] <= s["accuracy"] <= s["interval"][1] <= 1
        assert s["protocol"] == "honest"
        assert s["n"] == (12 if s["rows"] == "test" else 36)
    assert not (finished.dir / "cache").exists()


@pytest.mark.slow
def test_a_run_does_not_continue_with_other_images(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "flat", 10)
    run = api.train(small(root), tmp_path / "run")
    before = hash_files(run.dir)
    (run.dir / "results.json").unlink()
    (root / "red" / "000.png").rename(root / "blue" / "moved.png")

    with pytest.raises(
        RunError,
        match=r"images have changed since the run began.*restore them, or choose another --out",
    ):
        api.train(small(root), tmp_path / "run")
    assert hash_files(run.dir) == before
