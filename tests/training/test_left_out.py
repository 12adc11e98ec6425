"""Members that do not fit into memory: left out loudly, for good, and with the bits of the rest."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.frozen_runs import GATED, PROBE, frozen_tree
from support.notes import Notes
from support.tiny_runs import hash_files, make_folder, tiny_tree
from torch import nn

from threefold import api
from threefold.errors import OutOfMemoryError
from threefold.json_files import read_json
from threefold.models.pipeline import predict_probs
from threefold.predictions.run_check import check_run
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Job, Recipe
from threefold.recipe.subset import with_dependents
from threefold.training import job as job_module
from threefold.training.execution import Execution
from threefold.training.executors.worker import CLAIMS_FOLDER
from threefold.training.features.cache import FeatureCache
from threefold.training.jobs import train_members
from threefold.training.run import Run

STAGES = [{"name": "one", "epochs": 1, "lr": 3e-3}]
TUNED: dict[str, Any] = {"name": "tuned", "img_size": 32, "starts_from": "probe"}
HEAD_AND_TUNE = [
    {"name": "head", "kind": "head", "members": ["probe", "gated"]},
    {"name": "tune", "epochs": 1, "lr": 1e-3},
]
SHORTAGE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def starve(patch: pytest.MonkeyPatch, *names: str, times: int = 1000) -> None:
    """Let the training of some members run out of memory, whatever its parts; a number of times."""
    start_stage, train_head, left = job_module.start_stage, job_module.train_head, [times]

    def fail(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training and left[0] > 0:
            left[0] -= 1
            raise SHORTAGE

    def start(run: Run, job: Job, *rest: Any, **more: Any) -> Any:
        begun = start_stage(run, job, *rest, **more)
        if job.member in names:
            begun.member.get_submodule("head").register_forward_pre_hook(fail)
        return begun

    def head(run: Run, job: Job, *rest: Any) -> Any:
        if job.member in names:
            raise SHORTAGE
        return train_head(run, job, *rest)

    patch.setattr(job_module, "start_stage", start)
    patch.setattr(job_module, "train_head", head)


def two_members(images: Path, **changes: Any) -> Recipe:
    """The recipe of two networks, `plain` and `gated`, in one stage."""
    tree = tiny_tree(images, stages=STAGES, ensemble={"methods": ["mean"]}, **changes)
    return Recipe.parse(tree)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THREEFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), 8)


@pytest.fixture(scope="module")
def left(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose second member did not fit; only to be read."""
    with pytest.MonkeyPatch.context() as patch:
        starve(patch, "gated")
        out = tmp_path_factory.mktemp("left") / "run"
        return api.train(two_members(images), out, Notes())


@pytest.mark.slow
def test_the_run_goes_on_without_it(left: Run) -> None:
    reason = "not enough memory in fold0, stage one (not even for 3 images at once)"
    saved = RunFolder(left.dir)

    assert [member.name for member in saved.results.members] == ["plain"]
    assert saved.is_whole
    assert saved.left_out == {"gated": reason}
    assert saved.results.notes[0] == f"LEFT OUT: member gated, {reason}"
    assert not (left.dir / "jobs" / "gated").exists()
    watcher = left.watcher
    assert isinstance(watcher, Notes)
    assert watcher.has("member gated, fold0, stage one is tried once more, alone")
    assert watcher.has("LEFT OUT: member gated")
    assert watcher.has("the run goes on with 1 member: plain")
    assert check_run(left.dir).faults == ()


@pytest.mark.slow
def test_the_others_have_the_same_bits(left: Run, images: Path, tmp_path: Path) -> None:
    alone = Run.create(two_members(images).without(["gated"]), tmp_path / "run")

    train_members(alone)

    assert hash_files(left.dir / "jobs") == hash_files(alone.dir / "jobs")
    assert np.array_equal(left.predictions().probs, alone.predictions().probs)


@pytest.mark.slow
def test_a_resumed_run_stays_without_it(left: Run, images: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(left.dir, tmp_path / "run")
    (folder / "results.json").unlink()
    state = folder / "jobs/gated/fold0/one/.resume"  # the process was killed before it was deleted
    state.parent.mkdir(parents=True)
    state.touch()
    notes = Notes()

    resumed = api.train(two_members(images), folder, notes)  # now there would be enough memory

    assert notes.has("member gated stays left out", "another --out would try it again")
    assert not (folder / "jobs/gated").exists()
    changing = {"created", "seconds"}
    assert resumed.results.model_dump(exclude=changing) == left.results.model_dump(exclude=changing)
    assert read_json(folder / "run.json")["digest"] == left.folder.info.digest


@pytest.mark.slow
def test_a_member_that_fits_alone_stays(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starve(monkeypatch, "gated", times=3)  # parts of 8, 4 and 2 images
    notes = Notes()
    run = Run.create(two_members(images), tmp_path / "run", notes)

    train_members(run)

    assert notes.has("member gated, fold0, stage one is tried once more, alone")
    assert run.folder.left_out == {}
    assert run.predictions().members == ("plain", "gated")


@pytest.mark.slow
def test_the_only_member_is_an_error(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starve(monkeypatch, "plain", "gated")
    run = Run.create(two_members(images), tmp_path / "run")
    line = "not enough memory: member gated, fold0, stage one; got not even for 3 images at once"

    with pytest.raises(OutOfMemoryError, match=line):
        train_members(run)

    assert list(run.folder.left_out) == ["plain"]


def test_what_needs_it_goes_too(tmp_path: Path) -> None:
    tree = frozen_tree(tmp_path, stages=HEAD_AND_TUNE, members=[PROBE, GATED, TUNED])
    joint = {"name": "joint", "joins": ["gated", "tuned"], "img_size": 32}
    tree["members"] = [*tree["members"], joint]
    recipe = Recipe.parse(tree)

    assert with_dependents(recipe, ["probe"]) == {"probe", "tuned", "joint"}
    assert with_dependents(recipe, ["tuned", "unknown"]) == {"tuned", "joint"}
    assert with_dependents(recipe, []) == set()


def fit(images: Path, out: Path, patch: pytest.MonkeyPatch) -> tuple[RunFolder, Notes]:
    """Fit with two probes, one of them tuned from its head on; nothing is exported."""
    tree = frozen_tree(images, stages=HEAD_AND_TUNE, members=[PROBE, GATED, TUNED])
    RunFolder.create(out, Recipe.parse(tree))  # the plan
    notes = Notes()
    patch.setattr(api, "export", lambda run: run.folder.add_results("export", 0.0))
    patch.setattr(api, "report", lambda run: (run.dir / "report.html").touch())
    api.fit(images, out, budget=0, watcher=notes)
    return RunFolder(out), notes


@pytest.mark.slow
def test_the_probe_stays_if_its_tuning_does_not_fit(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starve(monkeypatch, "tuned")

    saved, notes = fit(images, tmp_path / "run", monkeypatch)

    assert [member.name for member in saved.results.members] == ["probe", "gated"]
    assert saved.is_finished
    assert notes.has("the run goes on with 2 members: probe, gated")


@pytest.mark.slow
def test_a_first_answer_without_a_probe(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starve(monkeypatch, "probe")

    saved, notes = fit(images, tmp_path / "run", monkeypatch)

    assert [member.name for member in saved.results.members] == ["gated"]
    assert saved.is_finished
    assert list(saved.left_out) == ["probe", "tuned"]
    assert notes.has("LEFT OUT: member probe")
    assert notes.has("LEFT OUT: member tuned, it needs probe")
    assert sum("is tried once more" in note for note in notes.notes) == 1


@pytest.mark.slow
def test_features_are_computed_one_by_one_if_memory_is_short(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare: Callable[..., None] = FeatureCache.prepare

    def fail(self: FeatureCache, split: str, specs: Sequence[Any], *rest: Any, **more: Any) -> None:
        if len(specs) > 1:
            raise SHORTAGE
        prepare(self, split, specs, *rest, **more)

    monkeypatch.setattr(FeatureCache, "prepare", fail)
    notes = Notes()
    run = Run.create(Recipe.parse(frozen_tree(images)), tmp_path / "run", notes)

    train_members(run)

    assert notes.has("each member computes its own")
    assert run.predictions().members == ("probe", "gated")


def test_answers_that_do_not_fit_come_in_smaller_batches() -> None:
    class Limited(nn.Linear):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            if len(pixels) > 3:
                raise SHORTAGE
            return super().forward(pixels.mean((2, 3)))

    network, pixels = Limited(3, 2), np.arange(20 * 12, dtype=np.uint8).reshape(20, 2, 2, 3)

    probs = predict_probs(network, pixels)

    assert np.array_equal(probs, predict_probs(network, pixels, 2))
    assert len(probs) == 20


SHORT_WORKER = """
from threefold.training.executors import worker

run_job = worker.run_job


def run_short(run, job, *rest):
    if job.member == "tuned":
        raise MemoryError
    run_job(run, job, *rest)


worker.run_job = run_short
"""


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
def test_workers_go_on_without_it(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SHORT_WORKER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    starve(monkeypatch, "tuned")  # in this process, too, which tries it alone
    tree = frozen_tree(images, stages=HEAD_AND_TUNE, members=[PROBE, GATED, TUNED])
    notes = Notes()
    two = Execution(devices=2)
    run = Run.create(Recipe.parse(tree), tmp_path / "run", notes, execution=two)

    train_members(run)

    assert run.predictions().members == ("probe", "gated")
    assert list(run.folder.left_out) == ["tuned"]
    assert notes.has("LEFT OUT: member tuned")
    assert not (run.dir / CLAIMS_FOLDER).exists()
