"""Members whose networks do not fit into memory: the run goes on without them, and says so.

The record is `left_out` in run.json, and the recipe in the run folder stays whole: whoever reads or
resumes the run takes the recipe without these members (`RunFolder.without_left_out`). So a resumed
run never tries them again; another run folder does.
"""

from __future__ import annotations

import gc
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from threefold.errors import (
    OutOfMemoryError,
    RecipeError,
    RunError,
    ThreefoldError,
    is_out_of_memory,
    out_of_memory,
)
from threefold.names import count_of
from threefold.recipe.recipe import Job, Recipe, fold_name
from threefold.recipe.subset import with_dependents
from threefold.training.checks import check_trainable
from threefold.training.run import Run, stand_ins


class JobMemoryError(OutOfMemoryError):
    """A job does not fit into memory, not even with the smallest parts of its batches.

    Attributes:
        job: which one.
    """

    job: Job


@contextmanager
def naming_job(job: Job) -> Iterator[None]:
    """Turn any error of exhausted memory into one that names the job, and free its tensors.

    Raises:
        JobMemoryError: in place of the error.
    """
    try:
        yield
    except Exception as error:
        shortage = shortage_of(job, error)
        if shortage is None:
            raise
        traceback.clear_frames(error.__traceback__)  # which keep the tensors of the step
        raise shortage from None


def shortage_of(job: Job, error: Exception) -> JobMemoryError | None:
    """Return an error of exhausted memory as one that names the job; None for any other error."""
    if not isinstance(error, OutOfMemoryError) and not is_out_of_memory(error):
        return None
    cause = error if isinstance(error, ThreefoldError) else out_of_memory("", error)
    where = f"member {job.member}, {fold_name(job.fold)}, stage {job.stage}"
    named = JobMemoryError(cause.what, where=where, got=cause.got, fix=cause.fix)
    named.job = job
    return named


def free_memory() -> None:
    """Give back what an attempt has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def leave_out(run: Run, error: JobMemoryError) -> None:
    """Let a run go on without the member of a job, and without those that need it.

    It is recorded before anything is deleted, so that a killed run stays without it, too.

    Args:
        run: the run; from now on its recipe has only the other members.
        error: of the job.

    Raises:
        JobMemoryError: no run would be left.
    """
    # `fit` trains the probes of its recipe first, whose tuning needs them.
    whole, member = Recipe.load(run.dir / "recipe.toml"), error.job.member
    before = run.folder.left_out
    names = with_dependents(whole, [*before, member])
    smaller = _smaller_recipe(run, names)
    if smaller is None:
        raise error
    place = f"{fold_name(error.job.fold)}, stage {error.job.stage}"
    reasons = dict.fromkeys(names, f"it needs {member}")
    reasons[member] = f"{error.what} in {place} ({error.got})"
    new = [m.name for m in whole.members if m.name in names and m.name not in before]
    added = {name: reasons[name] for name in new}
    info = run.folder.info.replace(digest=smaller.digest(), left_out={**before, **added})
    run.folder.write_info(info)
    run.folder.recipe = smaller
    _delete_jobs(run, names)
    _forget_pseudo_labels(run, whole, names)
    for note in left_out_notes(added):
        run.watcher.note(note)
    left = ", ".join(m.name for m in smaller.members)
    run.watcher.note(f"the run goes on with {count_of(len(smaller.members), 'member')}: {left}")


def stay_without(run: Run) -> None:
    """Say which members a resumed run stays without, and delete what is left of their jobs."""
    for name, reason in run.folder.left_out.items():
        run.watcher.note(
            f"member {name} stays left out: {reason}; another --out would try it again"
        )
    _delete_jobs(run, set(run.folder.left_out))


def left_out_notes(left_out: Mapping[str, str]) -> list[str]:
    """Return a note about each member that a run goes on without.

    Args:
        left_out: why, by member, as in run.json.
    """
    return [f"LEFT OUT: member {name}, {reason}" for name, reason in left_out.items()]


def _smaller_recipe(run: Run, names: set[str]) -> Recipe | None:
    """The recipe without some members; None if that is no run.

    Each fold needs a member that ensembles combine, and a student its twin.
    """
    whole = run.recipe
    if whole.distill is not None or names.issuperset(whole.combined):
        return None
    try:
        smaller = whole.without(names)
        for fold in run.roles:
            stand_ins(smaller, fold)
        check_trainable(smaller)
    except (ValueError, RunError, RecipeError):
        return None
    return smaller


def _delete_jobs(run: Run, names: set[str]) -> None:
    """Delete the jobs of some members, and their hashes in the manifest first."""
    folders = tuple(f"jobs/{name}/" for name in names)
    run.folder.forget([name for name in run.folder.manifest if name.startswith(folders)])
    for folder in folders:
        shutil.rmtree(run.dir / folder, ignore_errors=True)


def _forget_pseudo_labels(run: Run, whole: Recipe, names: set[str]) -> None:
    """Delete pseudo labels that a member has given, and what has learned from them."""
    if names.isdisjoint(whole.teachers):
        return
    files = [name for name in run.folder.manifest if name.startswith("pseudo_labels/")]
    run.folder.forget(files)
    shutil.rmtree(run.dir / "pseudo_labels", ignore_errors=True)
    _delete_jobs(run, {m.name for m in whole.members if whole.uses_pseudo_labels(m.name)})
