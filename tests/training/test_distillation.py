"""No label of a row reaches the student that is scored on it, or its score is called apparent."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.tiny_runs import make_folder, tiny_tree
from torch import nn

from threefold import api
from threefold.errors import DataError, RecipeError, RunError
from threefold.evaluation.compare import compare_saved
from threefold.evaluation.saved import evaluate_saved, score_saved
from threefold.models.member import Member, create_backbone
from threefold.models.pipeline import Predictor, predict_probs
from threefold.predictions.ledger import FIT, SCORE, TEACH
from threefold.predictions.predictions import Predictions
from threefold.predictions.results_schema import ShortScore
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import MemberSpec
from threefold.training import job as job_module
from threefold.training.distillation import Distillation, open_teacher, teacher_answers
from threefold.training.jobs import train_members
from threefold.training.run import Run
from threefold.training.stages.loop import train_stage
from threefold.training.stages.task import StageOutcome, StageTask
from threefold.training.student_recipe import student_recipe


def features_of(member: Member, pixels: np.ndarray) -> np.ndarray:
    """What the head sees (n, d), with a column of ones."""
    with torch.no_grad():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        maps = member.backbone.forward_features((images - member.mean) / member.std)
        features = member.backbone.forward_head(maps, pre_logits=True).double().numpy()
    return np.concatenate([features, np.ones((len(features), 1))], 1)


def solve_stage(member: Member, task: StageTask) -> StageOutcome:
    """Memorise: solve the head for labels, or a teacher's log-probabilities, on the fit rows."""
    x = features_of(member.eval(), task.fit.pixels[:])
    if task.teacher_probs is None:
        y = np.eye(task.num_classes)[task.fit.labels]
    else:
        y = np.log(task.teacher_probs.astype(np.float64))
    y = y - y.mean(1, keepdims=True)
    scale = np.abs(y).max()  # the targets of an uninformed teacher are nearly flat
    ridge = 1e-7 * np.trace(x.T @ x) / x.shape[1] * np.eye(x.shape[1])
    solved = np.linalg.solve(x.T @ x + ridge, x.T @ (y / scale))
    linear = [m for m in member.head.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(solved[:-1].T))
        linear.bias.copy_(torch.from_numpy(solved[-1]))
    probs = predict_probs(Predictor(member), task.select.pixels)
    history = {
        "epochs": [],
        "accepted": True,
        "best_epoch": 0,
        "start_accuracy": 0.0,
        "reason": "solved",
    }
    state = {name: value.clone() for name, value in member.state_dict().items()}
    return StageOutcome(state, history, probs.argmax(1) == task.select.labels)


def random_labels_tree(root: Path, per_class: int = 100) -> dict[str, Any]:
    """Images of random patches with random labels, and one network with only its head fitted."""
    rng = np.random.default_rng(5)
    torch.manual_seed(5)  # else the network's weights would depend on the tests before this one
    for split, count in (("train", per_class), ("test", 10)):
        for name in ("heads", "tails"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                patches = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                image = patches.resize((32, 32), Image.Resampling.BICUBIC)
                image.save(folder / f"{i:03d}.png")
    weights = root.with_suffix(".safetensors")  # shared by all networks, as pretrained weights are
    spec = MemberSpec(name="only", backbone="test_vit", img_size=32)
    save_file(create_backbone(spec, pretrained=False).state_dict(), str(weights))
    member = {"name": "only", "backbone": "test_vit", "weights": str(weights), "img_size": 32}
    return {
        "data": {"root": str(root)},
        "folds": {"k": 2, "select": 0.1},
        "ensemble": {"methods": ["mean"]},
        "train": {"device": "cpu", "precision": "float32"},
        "stages": [{"name": "one", "epochs": 1, "lr": 0.1, "trainable": "head"}],
        "members": [{**member, "head": {"noise": 0.0}}],
    }


def accuracies(predictions: Predictions) -> dict[str, float]:
    """Accuracy by member."""
    correct = predictions.probs.argmax(-1) == predictions.labels
    return dict(zip(predictions.members, correct.mean(1).tolist(), strict=True))


@pytest.mark.parametrize(
    ("inner", "protocol"), [(0, "taught"), (2, "honest")], ids=["own teachers", "nested teachers"]
)
@pytest.mark.slow
def test_memorising_teacher_leaks_labels_unless_nested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: int, protocol: str
) -> None:
    """The labels are random, so an honest score is 0.5 +- 0.07 (two standard errors, 200 rows)."""
    monkeypatch.setattr(job_module, "train_stage", solve_stage)
    run = api.train(Recipe.parse(random_labels_tree(tmp_path / "images")), tmp_path / "run")
    sets = [f"distill.inner={inner}", "distill.alpha=1"]
    recipe = student_recipe(run, str(run.dir), "only", sets)

    student = api.train(recipe, tmp_path / "student").predictions("oof")

    assert abs(accuracies(run.predictions("oof"))["only"] - 0.5) < 0.11
    reached = accuracies(student)
    assert abs(reached["student-labels"] - 0.5) < 0.11
    assert student.protocol == protocol
    if inner:
        assert abs(reached["student"] - 0.5) < 0.11
    else:
        assert reached["student"] > 0.7, "without a large leak here this test shows nothing"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of two small networks without test images."""
    root = tmp_path_factory.mktemp("flat")
    tree = tiny_tree(make_folder(root / "images", 12)) | {
        "ensemble": {"methods": ["mean", "pruned"]}
    }
    tree["members"] = [tree["members"][0], {**tree["members"][0], "name": "other"}]
    return api.train(Recipe.parse(tree, ["stages.one.epochs=1"]), root / "run")


@pytest.fixture(scope="module")
def student(teacher: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A student of it with alpha = 0, so that it must equal its twin."""
    recipe = student_recipe(teacher, str(teacher.dir), "plain", ["distill.alpha=0"])
    return api.train(recipe, tmp_path_factory.mktemp("student") / "run")


def distillation_of(run: Run) -> Distillation:
    distillation = Distillation.from_run(run)
    assert distillation is not None
    return distillation


@pytest.fixture
def copies(teacher: Run, student: Run, tmp_path: Path) -> tuple[Path, Run]:
    """A copy of the teacher's folder, and a copy of the student that names it."""
    folder = tmp_path / "teacher"
    shutil.copytree(teacher.dir, folder)
    shutil.copytree(student.dir, tmp_path / "student")
    recipe = student.recipe.model_dump(exclude_none=True)
    recipe["distill"]["run"] = str(folder)
    return folder, Run(RunFolder(tmp_path / "student", Recipe.parse(recipe)))


@pytest.mark.slow
@pytest.mark.parametrize("fold", [0, 1, -1])
def test_targets_never_saw_their_row_or_scored_rows(teacher: Run, student: Run, fold: int) -> None:
    roles, ids = student.roles[fold], student.sources.train.ids
    source = student.dir / "teachers" / f"fold{fold}" if fold >= 0 else teacher.dir
    method = None if fold >= 0 else teacher.results.chosen

    targets = distillation_of(student).targets(fold)

    assert set(targets.rows) >= set(roles.fit)
    assert not set(np.flatnonzero(targets.seen)) & set(roles.score)
    oof = Predictions.load(source / "oof.npz")  # loading checks that no row was seen by its network
    assert oof.protocol == "honest"
    assert {ids[i] for i in targets.rows} == set(oof.ids)
    probs = teacher_answers(Run.open(source), method).probs
    row_of = {name: i for i, name in enumerate(oof.ids)}
    order = [row_of[ids[i]] for i in roles.fit]
    np.testing.assert_allclose(targets.probs_of(roles.fit), probs[order], atol=1e-6)


@pytest.mark.slow
def test_missing_target_is_an_error(student: Run) -> None:
    targets = distillation_of(student).targets(0)

    with pytest.raises(RunError, match=r"the teacher has no answer: row \d"):
        targets.probs_of(student.roles[0].score)


@pytest.mark.slow
def test_student_and_twin_share_start_and_batches(student: Run) -> None:
    oof = student.predictions("oof")

    assert student.recipe.distill is not None
    assert student.recipe.distill.alpha == 0
    assert oof.members == ("student", "student-labels")
    np.testing.assert_array_equal(oof.probs[0], oof.probs[1])


@pytest.mark.slow
def test_results_compare_student_twin_and_teacher(teacher: Run, student: Run) -> None:
    results, chosen = student.results.distill, teacher.results.chosen
    headline = next(s for s in teacher.results.scores if s.name == chosen)
    assert results is not None

    (table,) = results.tables

    names = ["student", "student-labels", f"{chosen} of {teacher.dir.name}"]
    assert [s.name for s in table.scores] == names == [c.name for c in results.costs]
    assert table.scores[2] == ShortScore(
        name=names[2],
        accuracy=headline.accuracy,
        interval=headline.interval,
        log_loss=headline.log_loss,
        ece=headline.ece,
        n=headline.n,
    )
    pairs = {(c.a, c.b): c for c in table.comparisons}
    assert set(pairs) == {(names[0], names[1]), (names[0], names[2]), (names[1], names[2])}
    gap = table.scores[0].accuracy - table.scores[2].accuracy
    pair = pairs[names[0], names[2]]
    assert pair.difference == pytest.approx(gap)
    assert pair.only_a is not None
    assert pair.only_b is not None
    assert (pair.only_a - pair.only_b) / 36 == pytest.approx(gap)
    assert {t.fold for t in results.targets} == {0, 1, -1}
    assert all(s.protocol == "honest" and not s.apparent for s in student.results.scores)


@pytest.fixture(scope="module")
def taught(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A student that is scored on rows whose labels its teachers saw."""
    root = tmp_path_factory.mktemp("taught")
    shutil.copytree(finished.dir, root / "teacher")  # its ledger will record that test was opened
    recipe = student_recipe(finished, str(root / "teacher"), "plain", ["stages.one.epochs=1"])
    assert recipe.distill is not None
    assert recipe.distill.inner == 0  # there are test rows
    return api.train(recipe, root / "student")


@pytest.mark.slow
def test_leaking_scores_are_marked_as_apparent(taught: Run) -> None:
    results = taught.results

    assert taught.predictions("oof").protocol == "taught"
    assert {(s.rows, s.apparent, s.protocol) for s in results.scores} == {
        ("oof", True, "taught"),
        ("test", False, "honest"),
    }
    assert any("out-of-fold scores are apparent" in note for note in results.notes)
    assert any(line.step == TEACHERS and line.overlap == 36 for line in results.ledger)
    assert results.distill is not None
    assert [t.rows for t in results.distill.tables] == ["test"]
    assert results.optimism == ()


TEACHERS = "teachers of the student"


@pytest.mark.slow
def test_leaking_predictions_are_apparent_everywhere(taught: Run) -> None:
    evaluation = evaluate_saved(taught.dir, ["mean"])
    assert {s.protocol for s in evaluation.scores if s.rows == "oof"} == {"taught"}

    for tree, _ in (score_saved([taught.dir]), compare_saved([str(taught.dir / "oof.npz")])):
        assert all(s.apparent for s in tree.scores)
        assert any(line.startswith("apparent") for line in tree.warnings)


@pytest.mark.slow
def test_leaking_predictions_cannot_be_called_honest(taught: Run, tmp_path: Path) -> None:
    arrays = dict(np.load(taught.dir / "oof.npz"))
    arrays["provenance"] = np.array(json.dumps({"protocol": "honest", "kind": "oof"}))
    np.savez(tmp_path / "false.npz", **arrays)

    with pytest.raises(DataError, match="rows are scored by what was fitted on them"):
        Predictions.load(tmp_path / "false.npz")


def test_teach_bit_alone_makes_a_score_apparent() -> None:
    roles = np.array([[SCORE, FIT], [FIT + TEACH, SCORE]], np.int8)
    predictions = Predictions(
        probs=np.random.default_rng(0).dirichlet(np.ones(2), (1, 2)),
        labels=np.array([0, 1]),
        ids=("a", "b"),
        classes=("x", "y"),
        members=("m",),
        kind="oof",
        folds=np.array([0, 1]),
        roles=roles,
    )
    leaking = roles + np.array([[TEACH, 0], [0, 0]], np.int8)

    assert predictions.ledger().table()[-1].step == TEACHERS
    with pytest.raises(DataError, match="fitted on them: teachers of the student"):
        replace(predictions, roles=leaking)
    replace(predictions, roles=leaking, protocol="taught")


@pytest.mark.slow
def test_interrupted_teachers_resume_to_the_same_bits(
    student: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, stages_done = tmp_path / "cut", []

    def interrupt(member: nn.Module, task: StageTask) -> StageOutcome:
        if len(stages_done) == 10:  # fold 0's teachers are done, one of fold 1's is
            raise KeyboardInterrupt
        stages_done.append(task.stage.name)
        return train_stage(member, task)

    monkeypatch.setattr(job_module, "train_stage", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_members(Run.create(student.recipe, out))
    assert (out / "targets/fold0.npz").exists()
    assert not (out / "targets/fold1.npz").exists()

    monkeypatch.setattr(job_module, "train_stage", train_stage)
    train_members(Run.create(student.recipe, out))

    for name in ("oof.npz", "teachers/fold1/oof.npz"):
        resumed, whole = Predictions.load(out / name), Predictions.load(student.dir / name)
        np.testing.assert_array_equal(resumed.probs, whole.probs)


@pytest.mark.slow
def test_targets_of_another_teacher_are_refused(copies: tuple[Path, Run]) -> None:
    _, student = copies

    with pytest.raises(RunError, match=r"targets come from another teacher.*choose another --out"):
        distillation_of(student).targets(0)


@pytest.mark.slow
def test_teacher_of_other_images_is_refused(copies: tuple[Path, Run]) -> None:
    folder, student = copies
    oof = Predictions.load(folder / "oof.npz")
    RunFolder(folder).write_predictions(oof.rows(np.arange(len(oof))[::-1]))

    with pytest.raises(
        RunError,
        match=r"student's training images are not those of its teacher.*restore the images",
    ):
        _ = distillation_of(student).teacher


@pytest.mark.slow
def test_teacher_without_oof_predictions_is_refused(copies: tuple[Path, Run]) -> None:
    folder, _ = copies
    (folder / "oof.npz").unlink()

    with pytest.raises(RunError, match=r"a file of the run is missing.*oof\.npz"):
        open_teacher(folder)
    RunFolder(folder).forget(["oof.npz"])
    with pytest.raises(RunError, match="no out-of-fold predictions"):
        open_teacher(folder)


def test_folder_without_a_run_cannot_teach(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        open_teacher(tmp_path)


@pytest.mark.slow
def test_unfinished_run_cannot_teach(copies: tuple[Path, Run]) -> None:
    folder, _ = copies
    (folder / "results.json").unlink()

    with pytest.raises(RunError, match=r"not complete.*threefold train"):
        open_teacher(folder)


@pytest.mark.slow
def test_run_of_protocol_paper_cannot_teach(copies: tuple[Path, Run]) -> None:
    folder, _ = copies
    recipe = RunFolder(folder).recipe.model_copy(update={"protocol": "paper"})
    RunFolder(folder).replace_recipe(recipe)

    with pytest.raises(RunError, match=r"protocol paper cannot teach.*protocol=honest"):
        open_teacher(folder)


@pytest.mark.slow
def test_student_cannot_teach(student: Run) -> None:
    with pytest.raises(RunError, match=r"a student cannot teach.*use its teacher"):
        open_teacher(student.dir)


@pytest.mark.slow
def test_student_without_honest_rows_is_refused(teacher: Run, tmp_path: Path) -> None:
    recipe = student_recipe(teacher, str(teacher.dir), "plain", ["distill.inner=0"])

    with pytest.raises(
        RunError, match=r"no row would be left for an honest score.*distill\.inner = 2"
    ):
        api.train(recipe, tmp_path / "leaky")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["distill.inner=1"], "a single inner fold has no out-of-fold rows"),
        (["distill.alpha=2"], "less than or equal to 1"),
        (["distill.temprature=2"], "did you mean temperature"),
        (["distill.student=nobody"], "distill.student names an unknown member, nobody"),
        (["protocol=paper"], "distill needs protocol = honest"),
        (["members.student.folds=[0]", "folds.final=average"], "all folds"),
    ],
)
def test_invalid_student_recipes_are_refused(teacher: Run, sets: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        student_recipe(teacher, str(teacher.dir), "plain", sets)


@pytest.mark.slow
def test_twin_must_equal_the_student(student: Run) -> None:
    tree = student.recipe.model_dump(mode="json", exclude_none=True)

    with pytest.raises(
        RecipeError, match=r"distill\.twin may differ from student in its name only"
    ):
        Recipe.parse(tree, ["members.student-labels.img_size=48"])


@pytest.mark.slow
def test_digest_without_a_student_ignores_distill(teacher: Run) -> None:
    saved = json.loads((teacher.dir / "run.json").read_text())["digest"]

    assert "distill" not in teacher.recipe.dump()
    assert Recipe.load(teacher.dir / "recipe.toml").digest() == teacher.recipe.digest() == saved


@pytest.mark.slow
def test_student_recipe_survives_its_file(teacher: Run, tmp_path: Path) -> None:
    text = student_recipe(teacher, str(teacher.dir), "plain").dump()
    (tmp_path / "student.toml").write_text(text)

    assert "[distill]" in text
    assert Recipe.load(tmp_path / "student.toml").distill is not None
