"""Head jobs: honest, resumable, equal to the network's own answers, and a start for tuning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.frozen_runs import GATED, PROBE, frozen_tree
from support.tiny_runs import hash_files
from torch import nn

from threefold import api
from threefold.errors import RecipeError
from threefold.files import sha256
from threefold.json_files import read_json
from threefold.models.pipeline import Predictor, predict_probs
from threefold.npz_files import read_arrays
from threefold.predictions.ledger import FIT, SCORE, SELECT
from threefold.recipe.recipe import Job, Recipe
from threefold.training import head_jobs
from threefold.training import job as job_module
from threefold.training.checks import check_trainable
from threefold.training.features import compute as feature_pass
from threefold.training.features.engines import compute
from threefold.training.features.heads import HeadNetwork, head_probs
from threefold.training.features.probe import L2_GRID, Targets, fit_linear
from threefold.training.jobs import train_members
from threefold.training.pixel_cache import PixelCache
from threefold.training.results.diagnostics import inspect_data
from threefold.training.run import Run
from threefold.training.stages.loop import train_stage
from threefold.training.stages.task import StageOutcome, StageTask

TUNED = {"name": "tuned", "starts_from": "probe", "img_size": 32}


def make_recipe(images: Path, *sets: str, **changes: Any) -> Recipe:
    """Two probes, and one that is tuned from the first."""
    stages = [
        {"name": "head", "kind": "head", "epochs": 2, "lr": 1e-2, "members": ["probe", "gated"]},
        {"name": "tune", "epochs": 1, "lr": 1e-3, "members": ["tuned"]},
    ]
    members = [PROBE, GATED, TUNED]
    tree = frozen_tree(images, **{"stages": stages, "members": members, **changes})
    return Recipe.parse(tree, ["features.engine=torch", *sets])


def make_probe(images: Path, *sets: str) -> Recipe:
    """The linear probe alone."""
    return make_recipe(images, *sets, stages=[{"name": "head", "kind": "head"}], members=[PROBE])


@pytest.fixture(scope="module")
def probed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run. Tests read it, none changes it."""
    return api.train(make_recipe(images), tmp_path_factory.mktemp("probed") / "run")


@pytest.mark.parametrize(
    ("changes", "pictures"),
    [
        ({}, 0),
        ({"augment": {"hflip": True}}, 0),  # which heads without copies never see
        ({"augment": {"hflip": True}, "features": {"copies": 1}}, 16),
    ],
)
def test_the_report_shows_augmented_images_if_heads_see_them(
    images: Path, tmp_path: Path, changes: dict[str, Any], pictures: int
) -> None:
    run = Run.create(Recipe.parse(frozen_tree(images, **changes)), tmp_path / "run")
    cache = PixelCache(run.all_sources, run.all_views, run.dir / "cache")

    assert len(inspect_data(run, cache).augmented) == pictures


def test_rows_are_scored_once_by_heads_that_never_saw_them(probed: Run) -> None:
    oof = probed.predictions("oof")

    assert oof.ids == probed.sources.train.ids
    assert oof.folds is not None
    assert oof.roles is not None
    for fold, roles in probed.roles.items():
        np.testing.assert_array_equal(np.flatnonzero(oof.folds == fold), roles.score)
        assert (oof.roles[fold, roles.fit] == FIT).all()
        assert (oof.roles[fold, roles.select] == FIT + SELECT).all()
        assert (oof.roles[fold, roles.score] == SCORE).all()
        for row, name in enumerate(("probe", "gated")):
            stored = read_arrays(probed.folder.job_folder(Job(name, fold, "head")) / "probs.npz")
            np.testing.assert_array_equal(oof.probs[row, roles.score], stored["score"][0])


@pytest.mark.parametrize("name", ["probe", "gated"])
def test_cached_answers_are_those_of_the_whole_network(probed: Run, name: str) -> None:
    spec = probed.recipe.member(name)
    pixels = PixelCache(probed.sources, probed.all_views, probed.dir / "cache")
    for fold, roles in probed.roles.items():
        stored = read_arrays(probed.folder.job_folder(Job(name, fold, "head")) / "probs.npz")
        network = Predictor(probed.load_member(spec, fold, 3))

        for split, part, rows in (
            ("train", "score", roles.score),
            ("test", "test", np.arange(len(probed.sources.test or ()))),
        ):
            expected = predict_probs(network, pixels.rows(split, spec, rows).pixels)
            np.testing.assert_allclose(stored[part][0], expected, atol=5e-3)


def test_answer_is_fitted_on_select_rows_and_start_is_not(probed: Run) -> None:
    cache, labels = head_jobs.open_features(probed), probed.sources.train.labels
    spec = probed.recipe.member("probe")
    everything = cache.rows("train", spec, np.arange(len(labels))).features
    for fold, roles in probed.roles.items():
        job = Job("probe", fold, "head")
        l2 = read_json(probed.folder.job_folder(job) / "history.json")["l2"]
        both = np.concatenate([roles.fit, roles.select])
        expected = {
            file: fit_linear(everything[rows], Targets(labels[rows], 3), l2).probs(everything)
            for file, rows in (("start.safetensors", roles.fit), ("weights.safetensors", both))
        }

        for file, probs in expected.items():
            head = HeadNetwork(probed.load_job(job, 3, file).head)
            np.testing.assert_allclose(head_probs(head, everything), probs, atol=2e-3)
            names = load_file(probed.folder.job_folder(job) / file).keys()
            assert names == {"head.classifier.weight", "head.classifier.bias"}

        start, answer = expected.values()
        assert np.abs(start - answer).max() > 2e-2


def test_choices_are_reported_for_the_start_head(probed: Run) -> None:
    cache, spec = head_jobs.open_features(probed), probed.recipe.member("probe")
    for fold, roles in probed.roles.items():
        folder = probed.folder.job_folder(Job("probe", fold, "head"))
        network = probed.load_job(Job("probe", fold, "head"), 3, "start.safetensors")
        for name, rows in (("select", roles.select), ("score", roles.score)):
            part = cache.rows("train", spec, rows)
            with torch.inference_mode():
                answers = network.head(torch.from_numpy(part.features).float()).argmax(1).numpy()
            stored = read_arrays(folder / "choice.npz")[name]
            np.testing.assert_array_equal(stored, answers == part.labels)
    record = read_json(folder / "history.json")
    assert (record["accepted"], record["best_epoch"], len(record["epochs"])) == (True, 0, 1)
    assert record["l2"] == min(record["l2_losses"], key=lambda pair: pair[1])[0]


def test_tuning_starts_from_the_head_that_saw_fit_rows_only(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[tuple[dict[str, Any], bool]] = []

    def watch(member: nn.Module, task: StageTask) -> StageOutcome:
        state = {name: tensor.clone() for name, tensor in member.state_dict().items()}
        starts.append((state, task.first))
        return train_stage(member, task)

    monkeypatch.setattr(job_module, "train_stage", watch)
    run = Run.create(make_recipe(images), tmp_path / "run")
    train_members(run)

    for fold, (state, first) in enumerate(starts):
        head = load_file(run.folder.job_folder(Job("probe", fold, "head")) / "start.safetensors")
        assert first  # its probe has an answer of its own: a first stage need not beat it
        for name, values in head.items():
            np.testing.assert_array_equal(state[name].numpy(), values)
    tuned = run.load_member(run.recipe.member("tuned"), 0, 3)
    assert len(starts) == 2
    assert len(tuned.state_dict()) == len(starts[0][0])


@pytest.mark.slow
def test_tuning_on_the_last_level_starts_from_a_probe_on_several(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[nn.Module] = []

    def watch(member: nn.Module, task: StageTask) -> StageOutcome:
        starts.append(copy.deepcopy(member.head))
        return train_stage(member, task)

    monkeypatch.setattr(job_module, "train_stage", watch)
    probe = {**PROBE, "head": {"kind": "linear", "sequence": "levels"}}
    tuned = {**TUNED, "head": {"kind": "linear", "sequence": "pooled"}}
    stages = [
        {"name": "head", "kind": "head", "members": ["probe"]},
        {"name": "tune", "epochs": 1, "lr": 1e-3, "members": ["tuned"]},
    ]
    run = Run.create(make_recipe(images, stages=stages, members=[probe, tuned]), tmp_path / "run")

    train_members(run)

    cache = head_jobs.open_features(run)
    fit = cache.rows("train", run.recipe.member("tuned"), run.roles[0].fit)
    start = head_probs(HeadNetwork(starts[0]), fit.features)
    heads = [fit_linear(fit.features, Targets(fit.labels, 3), l2) for l2 in L2_GRID]
    assert min(np.abs(head.probs(fit.features) - start).max() for head in heads) < 0.01


def test_a_tuned_member_has_the_kind_of_head_of_its_probe(images: Path) -> None:
    tuned = {**TUNED, "head": {"kind": "gru", "units": 8}}

    with pytest.raises(RecipeError, match=r"another head; remove them from tuned"):
        make_recipe(images, members=[PROBE, GATED, tuned])


@pytest.mark.slow
def test_one_member_can_tune_after_its_head_stage(images: Path, tmp_path: Path) -> None:
    stages = [{"name": "head", "kind": "head"}, {"name": "tune", "epochs": 1, "lr": 1e-3}]
    run = Run.create(make_recipe(images, stages=stages, members=[PROBE]), tmp_path / "run")

    train_members(run)

    assert all(run.folder.is_done(job) for job in run.jobs)
    roles = run.predictions("oof").roles
    assert roles is not None
    assert (roles[0, run.roles[0].select] == SELECT).all()


@pytest.mark.parametrize("stop_after", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted_bit_for_bit(
    probed: Run,
    images: Path,
    tmp_path: Path,
    stop_after: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "cache"))
    done: list[Job] = []

    def interrupt(run: Run, job: Job, *rest: Any) -> Any:
        if len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(job)
        return head_jobs.train_head(run, job, *rest)

    monkeypatch.setattr(job_module, "train_head", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_members(Run.create(make_recipe(images), tmp_path / "cut"))
    monkeypatch.setattr(job_module, "train_head", head_jobs.train_head)

    resumed = Run.create(make_recipe(images), tmp_path / "cut")
    train_members(resumed)

    assert {name: hash_files(probed.dir)[name] for name in hash_files(resumed.dir)} == hash_files(
        resumed.dir
    )


@pytest.mark.slow
def test_another_run_and_seeded_folds_read_the_same_features(
    probed: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counting(*_: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(feature_pass, "compute", counting)

    train_members(Run.create(make_recipe(images, "folds.k=3"), tmp_path / "run"))

    monkeypatch.setattr(feature_pass, "compute", compute)


@pytest.mark.slow
def test_views_are_answered_through_the_network(images: Path, tmp_path: Path) -> None:
    run = Run.create(make_probe(images, "views.kind=flip"), tmp_path / "run")
    train_members(run)
    spec = run.recipe.member("probe")
    pixels = PixelCache(run.sources, run.all_views, tmp_path / "pixels")
    rows = run.roles[0].score

    stored = read_arrays(run.folder.job_folder(Job("probe", 0, "head")) / "probs.npz")

    network = run.load_member(spec, 0, 3)
    squares = pixels.rows("train", spec, rows).pixels[:]
    both = [predict_probs(Predictor(network), part) for part in (squares, squares[:, :, ::-1])]
    np.testing.assert_allclose(stored["score"][0], np.mean(both, axis=0), atol=1e-5)


def test_paper_protocol_never_fits_the_rows_that_it_scores(images: Path, tmp_path: Path) -> None:
    run = Run.create(make_probe(images, "protocol=paper"), tmp_path / "run")

    train_members(run)

    folder = run.folder.job_folder(Job("probe", 0, "head"))
    assert sha256(folder / "start.safetensors") == sha256(folder / "weights.safetensors")


@pytest.mark.slow
def test_heads_see_copies_of_fit_rows(images: Path, tmp_path: Path) -> None:
    plain = Run.create(make_probe(images), tmp_path / "plain")
    more = Run.create(
        make_probe(images, "features.copies=2", "augment.hflip=true"), tmp_path / "more"
    )

    for run in (plain, more):
        train_members(run)

    name = "jobs/probe/fold0/head/weights.safetensors"
    assert sha256(plain.dir / name) != sha256(more.dir / name)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["augment.hflip=true"], r"see augmented images only as copies.*set features\.copies"),
        (["features.copies=2"], r"copies that are not augmented.*set hflip"),
        (
            ["features.copies=2", "augment.hflip=true", "augment.mixup=0.2"],
            r"neither mixed nor erased.*mixup",
        ),
        (
            ["stages.head.kind=tune", "stages.head.epochs=1", "stages.head.lr=1e-3"],
            r"only stages of kind head read features.*remove the features table",
        ),
    ],
)
def test_settings_without_effect_are_refused(sets: list[str], message: str) -> None:
    recipe = make_probe(Path("x"), *sets)

    with pytest.raises(RecipeError, match=message):
        check_trainable(recipe)


def test_transformer_starts_at_the_image_size_of_its_base() -> None:
    base = {**PROBE, "backbone": "vit_tiny_patch16_224"}
    members = [base, GATED, {**TUNED, "img_size": 48}]

    with pytest.raises(RecipeError, match=r"fixed grid of tokens.*tuned.*expected img_size = 32"):
        check_trainable(make_recipe(Path("x"), members=members))


def test_probes_without_tuned_members_are_trainable(images: Path) -> None:
    recipe = make_recipe(images, "augment.hflip=true")

    check_trainable(recipe)
    check_trainable(recipe.without(["tuned"]))
