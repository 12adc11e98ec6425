"""Images with any number of labels: exact heads, sigmoids, resumed bit for bit, honest rows."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler
from support.multilabel_runs import multilabel_recipe
from support.stages import build_tiny, interrupt, make_rows, make_task
from support.tiny_runs import hash_files
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from threefold.data.shapes import SHAPES, write_shapes
from threefold.errors import RecipeError
from threefold.json_files import read_json
from threefold.models.pipeline import Predictor, predict_probs
from threefold.predictions.ledger import FIT, SCORE, SELECT
from threefold.predictions.multilabel import MultilabelPredictions
from threefold.recipe.recipe import Job, Recipe
from threefold.recipe.schema import TrainSpec
from threefold.training import job as job_module
from threefold.training.checkpoints import Checkpoint, accept_stage
from threefold.training.features.probe import Targets, choose_l2, fit_linear
from threefold.training.jobs import train_members
from threefold.training.pixel_cache import PixelRows
from threefold.training.planning.measure import cross_validated_probe, spread_over_classes
from threefold.training.results.diagnostics import make_label_thumbnails
from threefold.training.results.multilabel import evaluate_multilabel_run
from threefold.training.run import Run
from threefold.training.squares import resize_images
from threefold.training.stages.loop import train_stage
from threefold.training.stages.task import StageOutcome, StageTask
from threefold.training.steps.losses import BatchLoss


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), 48, test=16, size=32)


@pytest.fixture(scope="module")
def trained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose jobs are done. Tests read it, none changes it."""
    run = Run.create(multilabel_recipe(table), tmp_path_factory.mktemp("trained") / "run")
    train_members(run)
    return run


@pytest.mark.parametrize("export", ["mean", "best"])
def test_the_recipe_decides_and_pictures_show_errors(
    trained: Run, tmp_path: Path, export: str
) -> None:
    recipe = trained.recipe.model_copy(
        update={"ensemble": trained.recipe.ensemble.model_copy(update={"export": export})}
    )
    run = Run.open(shutil.copytree(trained.dir, tmp_path / "run"))
    run.folder.recipe = recipe

    evaluation = evaluate_multilabel_run(run)
    thumbs = make_label_thumbnails(run, evaluation)

    wrong = (evaluation.decided != evaluation.rows.targets).any(1)
    assert (evaluation.chosen, evaluation.reason) == (export, "named, not chosen")
    shown = [evaluation.rows.ids.index(name) for name in thumbs["ids"]]
    assert len(shown) == min(24, wrong.sum()) > 0
    assert wrong[shown].all()
    for row, picture in zip(shown, thumbs["images"], strict=True):
        test = run.sources.test
        assert test is not None
        image = Image.fromarray(test.pixels(row)).resize((96, 96), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(picture, np.asarray(image))


def draw_features(n: int = 60, d: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Features, and three labels that depend on them."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n, d)).astype(np.float32) * [1, 2, 3, 1, 1]
    noise = rng.normal(size=(n, 3))
    return features.astype(np.float32), (features[:, :3] + noise > [0, 1, 2]).astype(np.uint8)


@pytest.mark.parametrize("rows", [60, 4])
def test_a_linear_head_is_one_logistic_regression_per_label(rows: int) -> None:
    features, targets = draw_features()
    features, targets = features[-rows:], targets[-rows:]

    head = fit_linear(features, Targets(targets, 3), 2.0)

    scaled = StandardScaler().fit_transform(features)
    for label in range(3):
        if 0 < targets[:, label].mean() < 1:
            expected = LogisticRegression(C=0.5, tol=1e-8).fit(scaled, targets[:, label])
            np.testing.assert_allclose(
                head.probs(features)[:, label], expected.predict_proba(scaled)[:, 1], atol=2e-3
            )


def test_the_penalty_has_the_least_log_loss_over_labels() -> None:
    features, targets = draw_features(120)
    fit, select = slice(0, 60), slice(60, 120)

    choice = choose_l2(features[fit], Targets(targets[fit], 3), features[select], targets[select])

    assert choice.head.l2 == min(choice.losses, key=lambda l2: choice.losses[l2])
    probs = choice.head.probs(features[select]).astype(np.float64)
    loss = -np.log(np.where(targets[select] == 1, probs, 1 - probs)).mean()
    assert choice.losses[choice.head.l2] == pytest.approx(loss, abs=1e-4)


def test_rows_are_scored_once_by_networks_that_never_saw_them(trained: Run) -> None:
    oof = MultilabelPredictions.load(trained.dir / "oof.npz")
    test = MultilabelPredictions.load(trained.dir / "test.npz")

    np.testing.assert_array_equal(oof.targets, trained.sources.train.targets)
    assert (oof.classes, oof.members) == (SHAPES, ("probe", "gated", "tuned"))
    assert oof.roles is not None
    for fold, roles in trained.roles.items():
        assert (oof.roles[fold, roles.fit] == FIT).all()
        assert (oof.roles[fold, roles.select] == FIT + SELECT).all()
        assert (oof.roles[fold, roles.score] == SCORE).all()
    assert np.abs(oof.probs.sum(-1) - 1).max() > 0.1
    assert test.probs.shape == (3, 16, 4)


@pytest.mark.parametrize("member", ["probe", "gated", "tuned"])
def test_stored_answers_are_the_networks_sigmoids(trained: Run, member: str) -> None:
    oof = MultilabelPredictions.load(trained.dir / "oof.npz")
    spec = trained.recipe.member(member)
    roles = trained.roles[0]
    network = trained.load_member(spec, 0, 4)
    images = [trained.sources.train.pixels(int(row)) for row in roles.score]
    pixels = resize_images(images, spec.img_size, spec.resize)

    probs = predict_probs(Predictor(network, None, "multilabel"), pixels)

    stored = oof.probs[oof.members.index(member)][roles.score]
    np.testing.assert_allclose(stored, probs, atol=2e-3)


def test_history_has_the_metric_of_the_select_rows(trained: Run) -> None:
    for name, stage in (("probe", "head"), ("gated", "head"), ("tuned", "tune")):
        history = read_json(trained.folder.job_folder(Job(name, 0, stage)) / "history.json")
        assert history["metric"] == "mean_average_precision"
        assert 0 < history["epochs"][-1]["select_metric"] <= 1


@pytest.mark.parametrize("stop_after", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted_bit_for_bit(
    table: Path, trained: Run, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def stop(member: nn.Module, task: StageTask) -> StageOutcome:
        if len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(task.stage.name)
        return train_stage(member, task)

    monkeypatch.setattr(job_module, "train_stage", stop)
    with pytest.raises(KeyboardInterrupt):
        train_members(Run.create(multilabel_recipe(table), tmp_path / "cut"))
    monkeypatch.undo()

    resumed = Run.create(multilabel_recipe(table), tmp_path / "cut")
    train_members(resumed)

    assert hash_files(resumed.dir) == hash_files(trained.dir)


def make_targets_task(*sets: str, **changes: object) -> StageTask:
    """A stage on coloured noise whose labels are: red, green, blue, and any of the first two."""
    task = make_task(*sets)
    tree = task.recipe.model_dump(mode="json", exclude_none=True)
    tree["data"] |= {"source": "csv", "task": "multilabel"}
    for key in ("ensemble",):
        del tree[key]
    tree["train"]["metric"] = "mean_average_precision"
    recipe = Recipe.parse(tree, sets)

    def rows(n: int, seed: int) -> PixelRows:
        pixels, labels = make_rows(n, seed)
        targets = np.eye(3, dtype=np.uint8)[labels]
        targets[:, 2] = labels < 2
        return PixelRows(pixels, targets)

    return replace(task, recipe=recipe, fit=rows(24, 0), select=rows(12, 1), **changes)


def test_a_stage_keeps_the_epoch_of_the_best_precision() -> None:
    member, task = build_tiny(), make_targets_task("stages.one.epochs=6")

    outcome = train_stage(member, task)

    records = outcome.history["epochs"]
    best = max(records, key=lambda r: (r["select_metric"], -r["select_loss"]))
    assert best["select_metric"] > 0.7
    assert outcome.history["best_epoch"] == best["epoch"]
    probs = predict_probs(Predictor(member, None, "multilabel"), task.select.pixels)
    expected = average_precision_score(task.select.labels, probs)
    assert best["select_metric"] == pytest.approx(expected, abs=1e-6)


def test_a_stage_resumes_between_epochs_bit_for_bit(tmp_path: Path) -> None:
    sets = ("stages.one.epochs=3", "augment.mixup=0.4", "train.ema=0.9")
    task = make_targets_task(*sets, resume_path=tmp_path / "resume", save_interval=0.0)
    whole = train_stage(build_tiny(), replace(task, resume_path=None))

    interrupt(task, 2)
    assert (tmp_path / "resume").exists()
    resumed = train_stage(build_tiny(), task)

    assert all(torch.equal(whole.state[name], value) for name, value in resumed.state.items())


def test_the_loss_is_the_mean_over_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator)
    targets = torch.randint(0, 2, (6, 4), generator=generator)
    spec = TrainSpec(metric="log_loss", label_smoothing=0.2)

    loss = BatchLoss(spec, targets.numpy(), 4, torch.device("cpu"))(logits, targets, None)

    expected = binary_cross_entropy_with_logits(logits, 0.8 * targets + 0.1)
    torch.testing.assert_close(loss, expected)


def test_the_gate_measures_the_precision_against_its_noise() -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random((200, 3)) < 0.3).astype(np.uint8)
    logits = rng.normal(size=targets.shape) + targets
    metric = "mean_average_precision"
    start = Checkpoint({}, 1 / (1 + np.exp(-logits)), targets, -1, metric)
    better = Checkpoint({}, 1 / (1 + np.exp(-logits - targets)), targets, 0, metric)
    noise = Checkpoint({}, 1 / (1 + np.exp(-logits + 0.1 * targets)), targets, 0, metric)

    verdict = accept_stage(start, better, first=False)

    assert verdict.accepted
    assert "select mean average precision +" in verdict.reason
    assert better.better_than(start)
    assert not accept_stage(start, noise, first=False).accepted


def test_probes_of_the_plan_hold_rows_of_each_label_out() -> None:
    features, targets = draw_features(90)

    probs = cross_validated_probe(features, targets, 3)
    rows = spread_over_classes(np.eye(40, 3, dtype=np.uint8), 6)

    assert average_precision_score(targets, probs) > 0.7
    assert set(range(3)) <= set(rows)
    assert len(rows) <= 9


REFUSED = [
    ("train.metric=accuracy", "train.metric = accuracy needs one class"),
    ("train.class_weights=balanced", r"train\.class_weights need one class"),
    ("train.sampler=balanced", r"train\.sampler need one class"),
    ("ensemble.methods=['mean', 'pruned']", "are the mean and the best member"),
    ("ensemble.export=pruned", "set auto, mean or best"),
    ("ensemble.calibration=temperature", "calibrated one by one"),
    ("ensemble.alpha=0.2", r"ensemble\.alpha need one class"),
    ("views.choose=true", r"views\.choose need one class"),
    ("distill={run='x'}", "distill need one class"),
    ("pseudo_labels={images='x', members=['tuned']}", "pseudo_labels need one class"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_settings_that_need_one_class_are_refused(override: str, message: str) -> None:
    sets = [override]
    if "choose" in override:
        sets.append("views.kind=flip")
    with pytest.raises(RecipeError, match=message) as error:
        multilabel_recipe(Path("x.csv"), *sets)
    assert "\n" not in str(error.value)


def test_a_recipe_completes_what_the_task_decides() -> None:
    recipe = multilabel_recipe(Path("x.csv"))

    assert recipe.train.metric == "mean_average_precision"
    assert (recipe.ensemble.methods, recipe.ensemble.calibration) == (("mean", "best"), "logistic")
    with pytest.raises(RecipeError, match="mean_average_precision needs data"):
        multilabel_recipe(
            Path("x.csv"), "data.task=multiclass", "train.metric=mean_average_precision"
        )
