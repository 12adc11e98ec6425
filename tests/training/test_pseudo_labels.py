"""Pseudo labels come from networks that never saw what their fold scores."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.frozen_runs import GATED, PROBE, frozen_tree
from support.remedies import advice, follow, halve
from support.stages import build_tiny, make_rows, make_task
from support.tiny_runs import COLOURS, hash_files, paint
from torch import nn
from torch.nn import functional

from threefold import api
from threefold.errors import DataError, RunError
from threefold.models.pipeline import Predictor, predict_probs
from threefold.npz_files import read_arrays
from threefold.recipe.recipe import Job, Recipe
from threefold.recipe.schema import PseudoLabelSpec
from threefold.training import head_jobs
from threefold.training import job as job_module
from threefold.training.features.heads import HeadNetwork, head_probs
from threefold.training.features.probe import Targets, choose_l2, fit_linear
from threefold.training.jobs import train_members
from threefold.training.pixel_cache import PixelCache
from threefold.training.pseudo_labels import (
    Caches,
    PseudoLabels,
    find_pseudo_labels,
    pseudo_label_counts,
    pseudo_label_ledger,
)
from threefold.training.run import Run
from threefold.training.stages.loop import train_stage
from threefold.training.stages.task import StageOutcome, StageTask
from threefold.training.steps.losses import smooth_targets
from threefold.training.student_recipe import student_recipe

PSEUDO = {**PROBE, "name": "pseudo"}
TUNED = {"name": "tuned", "starts_from": "probe"}
DEEP = {"name": "deep", "starts_from": "pseudo"}


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unlabelled images in a folder and a subfolder of it."""
    folder = tmp_path_factory.mktemp("more")
    for i in range(18):
        place = folder / "later" if i % 2 else folder
        paint(place / f"{i:02d}.png", list(COLOURS.values())[i % 3], 900 + i)
    return folder


def make_recipe(images: Path, more: Path, *sets: str, **changes: Any) -> Recipe:
    """A probe and a network tuned from it teach a probe and a network."""
    stages = [
        {"name": "head", "kind": "head", "members": ["probe", "pseudo"]},
        {"name": "tune", "epochs": 1, "lr": 1e-3, "members": ["tuned", "deep"]},
    ]
    tree = {
        "stages": stages,
        "members": [PROBE, TUNED, PSEUDO, DEEP],
        "pseudo_labels": {
            "images": str(more),
            "members": ["pseudo", "deep"],
            "threshold": 0.98,
        },
    }
    return Recipe.parse(
        frozen_tree(images, **{**tree, **changes}), ["features.engine=torch", *sets]
    )


def make_probes(images: Path, more: Path, *sets: str) -> Recipe:
    """One probe teaches another."""
    stages = [{"name": "head", "kind": "head"}]
    sets = (*sets, 'pseudo_labels.members=["pseudo"]')
    return make_recipe(images, more, *sets, stages=stages, members=[PROBE, PSEUDO])


@pytest.fixture(scope="module")
def taught(images: Path, more: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run. Tests read it, none changes it."""
    return api.train(make_recipe(images, more), tmp_path_factory.mktemp("taught") / "run")


def stored(run: Run, fold: int) -> dict[str, np.ndarray]:
    return read_arrays(run.dir / "pseudo_labels" / f"fold{fold}.npz")


@pytest.mark.slow
def test_each_fold_is_taught_by_its_own_networks(taught: Run) -> None:
    features = head_jobs.open_features(taught)
    pixels = PixelCache(taught.all_sources, taught.all_views, taught.dir / "cache")
    probe, tuned = taught.recipe.member("probe"), taught.recipe.member("tuned")
    rows = np.arange(18)
    for fold in (0, 1):
        start = HeadNetwork(
            taught.load_job(Job("probe", fold, "head"), 3, "start.safetensors").head
        )
        network = Predictor(taught.load_member(tuned, fold, 3))

        expected = (
            head_probs(start, features.rows("unlabelled", probe, rows).features)
            + predict_probs(network, pixels.rows("unlabelled", tuned, rows).pixels)
        ) / 2

        arrays = stored(taught, fold)
        np.testing.assert_allclose(arrays["probs"], expected, atol=1e-6)
        np.testing.assert_array_equal(
            arrays["rows"], np.flatnonzero(arrays["probs"].max(1) >= 0.98)
        )
        assert 0 < len(arrays["rows"]) < 18


@pytest.mark.slow
def test_labels_that_a_fold_scores_do_not_reach_what_it_learns(taught: Run, tmp_path: Path) -> None:
    """Other labels of fold 0's score rows change no bit of its pseudo labels and networks."""
    score, train = taught.roles[0].score, taught.sources.train
    labels = train.labels.copy()
    labels[score] = (labels[score] + 1) % 3
    sources = replace(taught.sources, train=replace(train, labels=labels))
    poisoned = Run.create(taught.recipe, tmp_path / "run", sources=sources)
    poisoned.roles = taught.roles

    train_members(poisoned)

    before, after = hash_files(taught.dir), hash_files(poisoned.dir)
    own = [name for name in before if "fold0" in name and "choice" not in name]
    assert any("pseudo_labels" in name for name in own)
    assert any("jobs/deep" in name for name in own)
    assert [name for name in own if before[name] != after[name]] == []
    assert before["pseudo_labels/fold1.npz"] != after["pseudo_labels/fold1.npz"]


@pytest.mark.slow
def test_the_exact_head_learns_soft_targets(taught: Run) -> None:
    features = head_jobs.open_features(taught)
    spec, labels = taught.recipe.member("pseudo"), taught.sources.train.labels
    for fold, roles in taught.roles.items():
        arrays, job = stored(taught, fold), Job("pseudo", fold, "head")
        answer = HeadNetwork(taught.load_job(job, 3).head)
        both = np.concatenate([roles.fit, roles.select])
        own = features.rows("train", spec, both).features
        extra = features.rows("unlabelled", spec, arrays["rows"]).features
        probs = np.concatenate([np.eye(3)[labels[both]], arrays["probs"][arrays["rows"]]])
        l2 = jobs_l2(taught, job)

        expected = fit_linear(
            np.concatenate([own, extra]), Targets(probs.argmax(1), 3, probs=probs), l2
        )

        everything = np.concatenate([own, extra])
        np.testing.assert_allclose(
            head_probs(answer, everything), expected.probs(everything), atol=2e-3
        )


def jobs_l2(run: Run, job: Job) -> float:
    return float(run.folder.histories()[job]["l2"])


@pytest.mark.slow
def test_ledger_and_results_count_what_each_fold_learns(taught: Run) -> None:
    counts = taught.results.pseudo_labels
    lines = [line for line in taught.results.ledger if "pseudo labels" in line.step]

    assert [part.fold for part in counts] == [0, 1]
    for part, line in zip(counts, lines, strict=True):
        arrays, roles = stored(taught, part.fold), taught.roles[part.fold]
        classes = np.bincount(arrays["probs"][arrays["rows"]].argmax(1), minlength=3)
        assert part.classes == dict(zip(("blue", "green", "red"), classes, strict=True))
        assert (part.images, part.used) == (18, len(arrays["rows"]))
        assert part.teachers == ("probe", "tuned")
        assert f"{part.used} of 18 unlabelled images" in line.step
        assert line.fitted_on == f"{len(roles.fit) + len(roles.select)} of 36 oof rows"
        assert line.scored == f"{len(roles.score)} oof rows"
        assert line.overlap == 0


@pytest.mark.slow
def test_the_ledger_refuses_networks_that_saw_scored_rows(taught: Run) -> None:
    run = Run(taught.folder, sources=taught.sources)
    roles = taught.roles[0]
    run.roles = {0: roles._replace(fit=np.union1d(roles.fit, roles.score[:1]))}

    with pytest.raises(DataError, match="rows are scored by what was fitted on them"):
        pseudo_label_ledger(run)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_bit_for_bit(
    taught: Run,
    images: Path,
    more: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = job_module.find_pseudo_labels

    def interrupt(run: Run, member: str, fold: int, *rest: Any) -> Any:
        found = find(run, member, fold, *rest)
        if (member, fold) == ("pseudo", 1):
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(job_module, "find_pseudo_labels", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_members(Run.create(make_recipe(images, more), tmp_path / "cut"))
    monkeypatch.setattr(job_module, "find_pseudo_labels", find)

    resumed = Run.create(make_recipe(images, more), tmp_path / "cut")
    train_members(resumed)

    whole = hash_files(taught.dir)
    assert {name: whole[name] for name in hash_files(resumed.dir)} == hash_files(resumed.dir)


@pytest.mark.slow
def test_changed_unlabelled_images_stop_a_resumed_run(taught: Run) -> None:
    run = Run(taught.folder, sources=taught.sources)
    fewer = taught.unlabelled.subset(np.arange(17))
    run.all_sources = replace(taught.sources, unlabelled=fewer)
    pixels = PixelCache(run.all_sources, run.all_views, run.dir / "cache")

    with pytest.raises(RunError, match="the unlabelled images have changed"):
        find_pseudo_labels(run, "deep", 0, Caches(pixels, head_jobs.open_features(run)))


@pytest.mark.slow
def test_other_members_learn_from_labels_only(taught: Run, tmp_path: Path) -> None:
    """The members that teach have the same bits in a run without pseudo labels."""
    alone = Run.create(taught.recipe.without(["pseudo", "deep"]), tmp_path / "alone")

    train_members(alone)

    assert alone.recipe.pseudo_labels is None
    whole, jobs_alone = hash_files(taught.dir), hash_files(alone.dir / "jobs")
    assert {name: whole[f"jobs/{name}"] for name in jobs_alone} == jobs_alone


def test_no_image_above_the_threshold_leaves_the_labels(
    images: Path, more: Path, tmp_path: Path
) -> None:
    run = Run.create(make_probes(images, more, "pseudo_labels.threshold=1.0"), tmp_path / "run")

    train_members(run)

    for fold in (0, 1):
        assert len(stored(run, fold)["rows"]) == 0
        same = [run.folder.job_folder(Job(name, fold, "head")) for name in ("probe", "pseudo")]
        first, second = (read_arrays(folder / "probs.npz")["score"] for folder in same)
        np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_a_refitted_network_is_taught_by_refitted_ones(
    images: Path, more: Path, tmp_path: Path
) -> None:
    run = Run.create(make_probes(images, more, "folds.final=refit"), tmp_path / "run")

    train_members(run)

    answers = read_arrays(run.dir / "pseudo_labels" / "refit.npz")["probs"]
    probe = run.load_job(Job("probe", -1, "head"), 3, "start.safetensors")
    features = head_jobs.open_features(run)
    rows = features.rows("unlabelled", run.recipe.member("probe"), np.arange(18)).features
    np.testing.assert_allclose(answers, head_probs(HeadNetwork(probe.head), rows), atol=1e-6)


@pytest.mark.slow
def test_copies_of_unlabelled_images_share_their_weight(
    images: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kinds of heads see the image and its copy, with the targets of that image."""
    tasks: list[StageTask] = []
    fits: list[tuple[np.ndarray, Targets]] = []

    def watch(network: nn.Module, task: StageTask) -> StageOutcome:
        tasks.append(task)
        return train_stage(network, task)

    def watch_fit(rows: np.ndarray, targets: Targets, *rest: Any) -> Any:
        fits.append((rows, targets))
        return choose_l2(rows, targets, *rest)

    monkeypatch.setattr(head_jobs, "train_stage", watch)
    monkeypatch.setattr(head_jobs, "choose_l2", watch_fit)
    gated = {**GATED, "name": "gated"}
    recipe = make_recipe(
        images,
        more,
        "augment.hflip=true",
        "features.copies=1",
        "pseudo_labels.weight=0.5",
        'pseudo_labels.members=["pseudo", "gated"]',
        stages=[{"name": "head", "kind": "head", "epochs": 1, "lr": 1e-3}],
        members=[PROBE, PSEUDO, gated],
    )
    run = Run.create(recipe, tmp_path / "run")

    train_members(run)

    cache, spec = head_jobs.open_features(run), recipe.member("pseudo")
    for fold, (task, (rows, targets)) in enumerate(zip(tasks, fits[2:], strict=True)):
        arrays, own = stored(run, fold), run.roles[fold].fit
        used, labels = arrays["rows"], run.sources.train.labels[own]
        expected = cache.rows("unlabelled", spec, used, 1).features
        probs = np.tile(arrays["probs"][used], (2, 1))
        np.testing.assert_array_equal(rows[2 * len(own) :], expected)
        np.testing.assert_array_equal(task.fit[0][2 * len(own) :], expected)
        one_hot = np.eye(3)[np.tile(labels, 2)]
        assert task.targets is not None
        np.testing.assert_allclose(task.targets, np.concatenate([one_hot, 0.5 * probs]))
        np.testing.assert_allclose(targets.probs, np.concatenate([one_hot, probs]), atol=1e-6)
        weights = np.repeat([0.5, 0.25], [2 * len(own), 2 * len(used)])
        # A weight holds the sum of probabilities in float32, which is 1 up to their rounding.
        np.testing.assert_allclose(targets.weights, weights, rtol=1e-6)


@pytest.mark.parametrize("where", ["train/red/000.png", "test/blue/001.png"])
def test_labelled_images_are_refused_before_any_work(
    images: Path, more: Path, tmp_path: Path, where: str
) -> None:
    folder = tmp_path / "more"
    shutil.copytree(more, folder)
    shutil.copy(images / where, folder / "other-name.png")

    with pytest.raises(DataError, match=f"got 1 of 19: other-name.png = {where}"):
        api.train(make_probes(images, folder), tmp_path / "run")
    assert not (tmp_path / "run" / "jobs").exists()


def make_pseudo(**changes: Any) -> PseudoLabels:
    spec = PseudoLabelSpec(images="x", members=("m",), **changes)
    probs = np.array([[0.1, 0.8, 0.1], [0.6, 0.2, 0.2]], np.float32)
    return PseudoLabels(np.array([3, 5]), probs, spec)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_targets_are_weighted_probabilities_or_classes(kind: str) -> None:
    pseudo = make_pseudo(targets=kind, weight=0.5)

    targets = pseudo.targets_after(np.array([2]), copies=1)

    own = pseudo.probs if kind == "soft" else np.eye(3)[[1, 0]]
    np.testing.assert_allclose(targets, np.concatenate([[[0, 0, 1]], 0.5 * own, 0.5 * own]))


def test_smoothing_agrees_with_torch_and_keeps_weights() -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.eye(3)[[0, 2, 1, 1]]

    whole = functional.cross_entropy(logits, smooth_targets(targets, 0.3))
    half = functional.cross_entropy(logits, smooth_targets(0.5 * targets, 0.3))

    torch.testing.assert_close(
        whole, functional.cross_entropy(logits, targets, label_smoothing=0.3)
    )
    torch.testing.assert_close(half, 0.5 * whole)


@pytest.mark.parametrize("sets", [(), ("augment.mixup=0.4",)])
def test_a_stage_with_one_hot_targets_learns_the_labels(sets: tuple[str, ...]) -> None:
    sets = (*sets, "train.label_smoothing=0.1")
    task = make_task(*sets, fit=make_rows(24, 0))
    targets = np.eye(3, dtype=np.float32)[task.fit.labels]

    labels = train_stage(build_tiny(), task).state
    same = train_stage(build_tiny(), replace(task, targets=targets)).state

    for name, tensor in labels.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_cached_stage_reads_unlabelled_activations(
    images: Path, more: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[StageTask] = []

    def watch(member: nn.Module, task: StageTask) -> StageOutcome:
        tasks.append(task)
        return train_stage(member, task)

    monkeypatch.setattr(job_module, "train_stage", watch)
    tune = {
        "name": "tune",
        "epochs": 1,
        "lr": 1e-3,
        "frozen": r"backbone\.(conv1|bn1|layer1)\.",
        "cached": True,
        "members": ["tuned"],
    }
    stages = [{"name": "head", "kind": "head", "members": ["probe"]}, tune]
    sets = ('pseudo_labels.members=["tuned"]',)
    recipe = make_recipe(images, more, *sets, stages=stages, members=[PROBE, TUNED])
    run = Run.create(recipe, tmp_path / "run")

    train_members(run)

    for fold, task in enumerate(tasks):
        assert task.activations is not None
        assert task.targets is not None
        used = stored(run, fold)["rows"]
        own = len(run.roles[fold].fit)
        spec, count = recipe.member("tuned"), task.activations.count
        cache = head_jobs.open_features(run)
        expected = cache.blocks("unlabelled", spec, used, count, copy=1)
        np.testing.assert_array_equal(task.activations.fit(0)[own:], expected)
        assert len(task.targets) == len(task.fit.labels) == own + len(used)


@pytest.mark.slow
def test_a_student_of_such_a_run_learns_from_the_run(taught: Run) -> None:
    student = student_recipe(taught, str(taught.dir), "tuned")

    assert student.pseudo_labels is None
    assert student.distill is not None


@pytest.mark.slow
def test_damaged_pseudo_labels_are_made_again(taught: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(taught.dir, tmp_path / "run"))
    path = folder / "pseudo_labels" / "fold0.npz"
    halve(path)

    deletions, command = advice(lambda: pseudo_label_counts(Run.open(folder)))
    follow(deletions, command)

    names = ("pseudo", "deep")
    assert deletions == [path, *(folder / "jobs" / name / "fold0" for name in names)]
    assert hash_files(folder) == hash_files(taught.dir)
