"""Damage to a run: each remedy that a message names is followed, and brings back the same bits."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_runs import fake_export
from support.frozen_runs import PROBE, frozen_tree
from support.remedies import advice, follow, halve
from support.tiny_runs import hash_files, make_folder

from threefold import api
from threefold.errors import OutOfMemoryError, RunError
from threefold.evaluation.saved import evaluate_saved
from threefold.exporting import targets
from threefold.exporting.export import chosen_ensemble, export
from threefold.files import write_bytes
from threefold.models import member as members
from threefold.npz_files import read_arrays, write_arrays
from threefold.predictions.export_schema import ExportReport
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Job, Recipe
from threefold.report.pages import write_report
from threefold.training.features.frozen import frozen_digest
from threefold.training.jobs import train_members
from threefold.training.pixel_cache import PixelCache
from threefold.training.results.diagnostics import inspect_data
from threefold.training.results.out_of_fold import assemble, choices_optimism
from threefold.training.run import Run


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged, without the exported file."""
    ignored = shutil.ignore_patterns("model.onnx")
    return Path(shutil.copytree(finished.dir, tmp_path / "a copy", ignore=ignored))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_digit(path: Path) -> None:
    """Change the last digit of a text."""
    text = path.read_text()
    position = max(i for i, letter in enumerate(text) if letter in "0123456789")
    path.write_text(text[:position] + str((int(text[position]) + 1) % 10) + text[position + 1 :])


JOB = Job("gated", 0, "one")

JOBS: dict[str, tuple[Callable[[Path], None], Callable[[Run], object]]] = {
    "plain/fold1/two/weights.safetensors": (flip, lambda r: r.load_job(Job("plain", 1, "two"), 3)),
    "gated/fold0/two/probs.npz": (flip, assemble),
    "gated/fold1/two/choice.npz": (halve, choices_optimism),
    "plain/fold0/two/done.json": (halve, assemble),
    "plain/fold0/two/history.json": (change_digit, lambda r: r.folder.histories()),
    "gated/fold0/one/done.json": (change_digit, lambda r: r.folder.job_record(JOB)),
}


def test_damaged_jobs_come_back_as_they_were(copy: Path, finished: Run) -> None:
    advised = []
    for name, (damage, action) in JOBS.items():
        kept = (copy / "jobs" / name).read_bytes()
        damage(copy / "jobs" / name)
        advised.append(advice(partial(action, Run.open(copy))))
        (copy / "jobs" / name).write_bytes(kept)

    deletions = [path for paths, _ in advised for path in paths]
    assert {str(path.relative_to(copy)) for path in deletions} == {
        "jobs/plain/fold1",
        "jobs/gated/fold0",
        "jobs/gated/fold1",
        "jobs/plain/fold0",
    }
    follow(deletions[:2], advised[0][1])
    assert hash_files(copy) == hash_files(finished.dir)


def test_a_missing_record_of_choices_is_not_passed_over(copy: Path) -> None:
    path = copy / "jobs" / "gated" / "fold1" / "two" / "choice.npz"
    path.unlink()

    deletions, _ = advice(lambda: choices_optimism(Run.open(copy)))

    assert deletions == [copy / "jobs" / "gated" / "fold1"]


DERIVED: dict[str, Callable[[Run], object]] = {
    "thumbs.npz": lambda r: write_report([r.folder]),
    "oof.npz": lambda r: r.folder.oof,
    "test.npz": lambda r: r.folder.all_test,
    "chosen.npz": lambda r: r.folder.chosen,
    "ensemble.npz": chosen_ensemble,
    "run.json": lambda r: r.folder.info,
    "results.json": lambda r: r.results,
}


@pytest.mark.slow
def test_damaged_summaries_are_written_again(copy: Path, finished: Run) -> None:
    for name, action in DERIVED.items():
        kept = (copy / name).read_bytes()
        halve(copy / name)
        deletions, command = advice(partial(action, Run.open(copy)))
        (copy / name).write_bytes(kept)
        assert deletions == [copy / name]
        (copy / name).unlink()
        assert not RunFolder(copy).is_whole

    follow([], command)

    assert hash_files(copy) == hash_files(finished.dir)


@pytest.mark.slow
def test_a_lost_record_of_a_backbone_trains_its_heads_again(tmp_path: Path) -> None:
    recipe = Recipe.parse(
        frozen_tree(make_folder(tmp_path / "images"), members=[PROBE]), ["features.engine=torch"]
    )
    run = api.train(recipe, tmp_path / "run")
    before = hash_files(run.dir)
    (record,) = (run.dir / "backbones").glob("*.json")

    record.write_text("{}")
    with pytest.raises(RunError, match=r"as in manifest.json.*fix: delete .*json"):
        frozen_digest(RunFolder(run.dir), recipe.members[0])
    record.unlink()
    deletions, command = advice(lambda: frozen_digest(RunFolder(run.dir), recipe.members[0]))
    follow(deletions, command)

    assert deletions == [record, run.dir / "jobs" / "probe"]
    assert hash_files(run.dir) == before


def test_a_damaged_ledger_can_be_restored_or_left(copy: Path) -> None:
    path = copy / "ledger.json"
    kept = path.read_bytes()
    halve(path)

    with pytest.raises(RunError, match=r"changed since.*fix: restore it; or run `threefold doctor"):
        RunFolder(copy).test_opened()
    path.unlink()
    with pytest.raises(RunError, match=r"missing.*ledger\.json; fix: restore it"):
        RunFolder(copy).test_opened()
    path.write_bytes(kept)
    assert RunFolder(copy).test_opened() is not None


def test_damaged_copies_are_searched_again(copy: Path) -> None:
    run = Run.open(copy)
    cache = PixelCache(run.sources, run.all_views, copy / "cache")
    before = inspect_data(run, cache).copies
    path = copy / "duplicates.json"
    text = path.read_text()

    for damaged in (text.replace('"pairs"', '"pears"'), text[:9], "[]", '{"count": "x"}'):
        path.write_text(damaged)
        assert inspect_data(run, cache).copies == before
        assert path.read_text() == damaged or path.read_text() == text


def test_the_files_of_another_job_are_refused(copy: Path) -> None:
    shutil.rmtree(copy / "jobs/gated/fold0")
    shutil.copytree(copy / "jobs/gated/fold1", copy / "jobs/gated/fold0")

    deletions, _ = advice(partial(assemble, Run.open(copy)))

    assert deletions == [copy / "jobs/gated/fold0"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["results.json", "chosen.npz", "oof.npz"])
def test_a_pipe_in_a_run_is_not_waited_for(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)

    deletions, _ = advice(partial(DERIVED[name], Run.open(copy)))

    assert deletions == [copy / name]


def test_lack_of_memory_is_not_called_damage(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(members, "load_file", refuse)

    with pytest.raises(OutOfMemoryError, match="not enough memory") as error:
        Run.open(copy).load_job(Job("plain", 1, "two"), 3)

    assert "delete" not in str(error.value)
    monkeypatch.setattr(np, "load", refuse)
    with pytest.raises(OutOfMemoryError, match="not enough memory"):
        read_arrays(copy / "ensemble.npz")


def test_an_edited_recipe_goes_no_further(copy: Path, finished: Run) -> None:
    recipe = copy / "recipe.toml"
    text = recipe.read_text()
    recipe.write_text(text.replace("seed = 0", "seed = 1", 1))
    edited = "edited after the run began.*fix: undo the change, or train the new"

    with pytest.raises(RunError, match=edited):
        api.train(Recipe.load(recipe), copy)
    with pytest.raises(RunError, match=edited):
        export(Run.open(copy))
    with pytest.raises(RunError, match=edited):
        write_report([copy])
    with pytest.raises(RunError, match=edited):
        evaluate_saved(copy, ["mean"])
    (copy / "results.json").unlink()
    with pytest.raises(RunError, match=edited):
        api.train(Recipe.load(recipe), copy)

    assert hash_files(copy) == hash_files(finished.dir)
    recipe.write_text(text.replace('name = "tiny"', 'name = "other"', 1))
    Run.create(Recipe.load(recipe), copy)  # the name and the budget may change


def test_a_run_of_a_version_that_lacked_a_key_is_still_known(copy: Path) -> None:
    folder = RunFolder(copy)
    text = (copy / "recipe.toml").read_text()
    older = text.replace("sync_batchnorm = false\n", "")
    assert older != text
    (copy / "recipe.toml").write_text(older)
    folder.record(["recipe.toml"])
    folder.write_info(
        folder.info.replace(digest=Recipe.load(copy / "recipe.toml").digest(as_given=True))
    )

    folder.check_recipe()
    (copy / "recipe.toml").write_text(older.replace("gate = true", "gate = false", 1))

    with pytest.raises(RunError, match="edited after the run began"):
        folder.check_recipe()


def test_answers_on_other_rows_are_refused(copy: Path) -> None:
    run, job = Run.open(copy), Job("gated", 1, "two")
    path = run.folder.job_folder(job) / "probs.npz"
    arrays = read_arrays(path)
    write_arrays(path, **{**arrays, "rows": arrays["rows"][::-1]})
    run.folder.finish_job(job, 0.0)

    deletions, _ = advice(lambda: assemble(run))

    assert deletions == [copy / "jobs" / "gated" / "fold1"]


def test_a_note_lost_with_the_process_is_made_up_for(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process was killed after the exported file was written, and before results.json."""
    folder, recipe = RunFolder(copy), Recipe.load(copy / "recipe.toml")
    folder.write_results(folder.results.replace(export=None))
    (copy / "model.onnx").write_bytes(b"written")
    exported = []

    def note_only(run: Run) -> None:
        exported.append(run)
        run.folder.add_results("export", 1.0, export=fake_export())

    monkeypatch.setattr(api, "export", note_only)

    run = api.train(recipe, copy)
    api.train(recipe, copy)

    assert RunFolder(copy).results.export == fake_export()
    assert exported == [run]


def test_a_circle_of_links_is_exported_over(copy: Path) -> None:
    model = copy / "model.onnx"
    model.symlink_to(model.name)

    export(Run.open(copy), model)

    assert not model.is_symlink()
    assert RunFolder(copy).is_intact("model.onnx")


@pytest.mark.parametrize("inside", [False, True])
def test_an_export_elsewhere_needs_no_writable_run(
    copy: Path, tmp_path: Path, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, notes = Run.open(copy), []
    monkeypatch.setattr(run.watcher, "note", notes.append)
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if Path(target).suffix == ".json":
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    def write(_: object, path: Path, *__: object, **___: object) -> ExportReport:
        path.write_bytes(b"a program")
        return fake_export()

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(targets, "export", write)
    target = (copy if inside else tmp_path) / "m.pt2"

    if inside:
        with pytest.raises(RunError, match="cannot write"):
            export(run, target)
        unrecorded = []
    else:
        assert export(run, target).path == str(target)
        unrecorded = [note for note in notes if "does not record this export" in note]
        assert len(unrecorded) == 1
    assert set(notes) - set(unrecorded) == {note for note in notes if "cascade" in note}
    assert target.exists()


def test_what_killed_processes_left_is_deleted(copy: Path) -> None:
    dead, alive = 2**22 + 1, os.getpid()  # the first is beyond any process of Linux
    left = [copy / f".x.json.{dead}.1.tmp", copy / "jobs" / "plain" / f".y.npz.{dead}.77.tmp"]
    folder = copy / f".model.onnx.{dead}.abc.tmp"
    kept = [copy / f".x.json.{alive}.1.tmp", copy / ".mine.tmp", copy / "7.tmp"]
    folder.mkdir()
    for path in [*left, *kept, folder / "data"]:
        path.write_text("part")

    with RunFolder(copy).locked():
        pass

    assert not any(path.exists() for path in [*left, folder])
    assert all(path.exists() for path in kept)


def test_a_kill_behind_the_end_of_a_job_leaves_nothing(copy: Path) -> None:
    run, before = Run.open(copy), hash_files(copy)
    first, last = (run.folder.job_folder(Job("plain", 0, stage)) for stage in ("one", "two"))
    left = [last / ".resume", first / "weights.safetensors"]
    for path in left:
        path.write_bytes((last / "weights.safetensors").read_bytes())

    train_members(run)

    assert not any(path.exists() for path in left)
    assert hash_files(copy) == before


def test_what_other_machines_write_stays_for_a_day(tmp_path: Path) -> None:
    """Their processes cannot be asked for, and the numbers of processes repeat."""
    new, old = tmp_path / ".a.0123abcd-1.2.tmp", tmp_path / ".b.0123abcd-1.2.tmp"
    for path in (new, old):
        path.write_text("part")
    os.utime(old, (0, 0))

    write_bytes(tmp_path / "c", b"whole")

    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, "c"]


def test_a_lock_that_cannot_be_written_is_one_line(copy: Path) -> None:
    (copy / ".lock").unlink(missing_ok=True)
    (copy / ".lock").mkdir()

    with (
        pytest.raises(RunError, match=r"cannot write: .*\.lock.*fix: make the run folder"),
        RunFolder(copy).locked(),
    ):
        pass


@pytest.mark.slow
def test_a_resumed_run_makes_damaged_squares_again(copy: Path, finished: Run) -> None:
    shutil.rmtree(copy / "jobs" / "plain" / "fold0")
    (copy / "results.json").unlink()
    run = Run.open(copy)
    cache = PixelCache(run.sources, run.all_views, copy / "cache")
    cache.rows("train", run.recipe.members[0], np.arange(3))
    for path in (copy / "cache").glob("*.npy"):
        flip(path)

    train_members(run)

    assert hash_files(copy / "jobs") == hash_files(finished.dir / "jobs")
