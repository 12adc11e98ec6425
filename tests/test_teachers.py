"""What reaches a student: never the label of a row that it is scored on, or the score is called apparent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_folder, tiny_tree
from PIL import Image
from safetensors.torch import save_file

from threefold import jobs, workflow
from threefold.compare import compare_saved
from threefold.errors import DataError, RecipeError, RunError
from threefold.jobs import train_members
from threefold.ledger import FIT, SCORE, TEACH
from threefold.models__member import Member, create_backbone
from threefold.models__pipeline import Predictor, predict_probs
from threefold.predictions import Predictions
from threefold.predictions__results_schema import ShortScore
from threefold.recipe import Recipe
from threefold.recipe_schema import MemberSpec
from threefold.run import Run
from threefold.saved import evaluate_saved, score_saved
from threefold.stages import StageOutcome, StageTask
from threefold.student import student_recipe
from threefold.teachers import Teaching, answers, teacher_run

Solver = Callable[[Member, StageTask], StageOutcome]


def features(member: Member, pixels: np.ndarray) -> np.ndarray:
    """What the head sees (n, d), with a column of ones."""
    with torch.no_grad():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        maps = member.backbone.forward_features((images - member.mean) / member.std)
        found = member.backbone.forward_head(maps, pre_logits=True).double().numpy()
    return np.concatenate([found, np.ones((len(found), 1))], 1)


def least_squares(member: Member, task: StageTask) -> StageOutcome:
    """In place of a stage: the head that is nearest to labels, or to a teacher's logarithms, on the fit rows. It memorises."""
    x = features(member.eval(), task.fit[0])
    y = (
        np.eye(task.num_classes)[task.fit[1]]
        if task.soft is None
        else np.log(task.soft.astype(np.float64))
    )
    y = y - y.mean(1, keepdims=True)
    scale = np.abs(y).max()  # targets of a teacher that knows nothing are nearly flat
    solved = np.linalg.solve(
        x.T @ x + 1e-7 * np.trace(x.T @ x) / x.shape[1] * np.eye(x.shape[1]), x.T @ (y / scale)
    )
    linear = [m for m in member.head.modules() if isinstance(m, torch.nn.Linear)][-1]
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(solved[:-1].T))
        linear.bias.copy_(torch.from_numpy(solved[-1]))
    hits = predict_probs(Predictor(member), task.select[0], "float32").argmax(1) == task.select[1]
    history = {"epochs": [], "kept": True, "best_epoch": 0, "started_from": 0.0, "reason": "solved"}
    return StageOutcome({k: v.clone() for k, v in member.state_dict().items()}, history, hits)


def canary_tree(root: Path, per_class: int = 100) -> dict[str, Any]:
    """Images of random patches whose labels are drawn from nothing, and one network whose head alone is fitted."""
    rng = np.random.default_rng(5)
    for split, count in (("train", per_class), ("test", 10)):
        for name in ("heads", "tails"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                patches = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                patches.resize((32, 32), Image.Resampling.BICUBIC).save(
                    root / split / name / f"{i:03d}.png"
                )
    weights = root.with_suffix(
        ".safetensors"
    )  # all networks begin from the same, as pretrained ones do
    spec = MemberSpec(name="only", backbone="test_vit", img_size=32)
    save_file(create_backbone(spec, pretrained=False).state_dict(), str(weights))
    return {
        "data": {"root": str(root)},
        "folds": {"k": 2, "select": 0.1},
        "ensemble": {"methods": ["mean"]},
        "train": {"device": "cpu", "precision": "float32"},
        "stages": [{"name": "one", "epochs": 1, "lr": 0.1, "trainable": "head"}],
        "members": [
            {
                "name": "only",
                "backbone": "test_vit",
                "weights": str(weights),
                "img_size": 32,
                "head": {"noise": 0.0},
            }
        ],
    }


@pytest.mark.parametrize(
    "inner", [0, 2], ids=["the run's own answers", "teachers without the scored rows"]
)
def test_a_memorising_teacher_hands_on_the_labels_of_scored_rows_unless_it_never_saw_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: int
) -> None:
    """The canary: labels have nothing to do with images, so an honest score is chance, 0.5 +- 0.07 (two standard errors of 200 rows)."""
    monkeypatch.setattr(jobs, "train_stage", least_squares)
    run = workflow.train(Recipe.parse(canary_tree(tmp_path / "images")), tmp_path / "run")
    oof = run.predictions("oof")
    assert (
        abs(float((oof.probs[0].argmax(1) == oof.labels).mean()) - 0.5) < 0.11
    )  # the teacher itself is out of fold
    recipe = student_recipe(
        run, str(run.dir), "only", [f"distill.inner={inner}", "distill.alpha=1"]
    )
    student = workflow.train(recipe, tmp_path / "student").predictions("oof")
    right = {
        name: float((p.argmax(1) == student.labels).mean())
        for name, p in zip(student.members, student.probs, strict=True)
    }
    assert abs(right["student-labels"] - 0.5) < 0.11
    if inner:
        assert abs(right["student"] - 0.5) < 0.11
        assert student.protocol == "honest"
    else:
        assert right["student"] > 0.7, (
            "the leak is large where it can be, or this test could not see one"
        )
        assert student.protocol == "taught"


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of one small network without test images."""
    root = tmp_path_factory.mktemp("flat")
    tree = tiny_tree(make_folder(root / "images", 12)) | {
        "ensemble": {"methods": ["mean", "pruned"]}
    }
    tree["members"] = [tree["members"][0], {**tree["members"][0], "name": "other"}]
    return workflow.train(Recipe.parse(tree, ["stages.one.epochs=1"]), root / "run")


@pytest.fixture(scope="module")
def nested(flat: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A student of it; alpha = 0, so that it must be its twin."""
    recipe = student_recipe(flat, str(flat.dir), "plain", ["distill.alpha=0"])
    return workflow.train(recipe, tmp_path_factory.mktemp("student") / "run")


def test_every_row_has_a_target_by_networks_that_never_saw_it_nor_any_scored_row(
    flat: Run, nested: Run
) -> None:
    teaching = Teaching.of(nested)
    assert teaching is not None
    for fold, roles in nested.roles.items():
        targets = teaching.targets(fold)
        assert set(targets.rows) >= set(roles.fit)
        assert not set(np.flatnonzero(targets.seen)) & set(roles.score)
        source = nested.dir / "teachers" / f"fold{fold}" if fold >= 0 else flat.dir
        oof = Predictions.load(
            source / "oof.npz"
        )  # its roles are checked on the way in: no row is answered by what saw it
        assert oof.protocol == "honest"
        assert {nested.sources.train.ids[i] for i in targets.rows} == set(oof.ids)
        _, probs, _ = answers(Run.open(source), None if fold >= 0 else flat.results.chosen)
        at = {name: i for i, name in enumerate(oof.ids)}
        order = [at[nested.sources.train.ids[i]] for i in roles.fit]
        np.testing.assert_allclose(targets.of(roles.fit), probs[order], atol=1e-6)
    with pytest.raises(RunError, match=r"the teacher has no answer: row \d"):
        teaching.targets(0).of(nested.roles[0].score)


def test_student_and_twin_begin_alike_and_see_the_same_batches(nested: Run) -> None:
    oof = nested.predictions("oof")
    assert oof.members == ("student", "student-labels")
    np.testing.assert_array_equal(oof.probs[0], oof.probs[1])  # alpha = 0


def test_honest_scores_of_a_student_stand_beside_twin_and_teacher(flat: Run, nested: Run) -> None:
    found = nested.results.distill
    assert found is not None
    (table,) = found.tables
    chosen = flat.results.chosen
    names = ["student", "student-labels", f"{chosen} of {flat.dir.name}"]
    assert [s.name for s in table.scores] == names == [c.name for c in found.costs]
    headline = next(s for s in flat.results.scores if s.name == chosen)
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
    line = pairs[names[0], names[2]]
    assert line.difference == pytest.approx(gap)
    assert line.only_a is not None
    assert line.only_b is not None
    assert (line.only_a - line.only_b) / 36 == pytest.approx(gap)
    assert {t.fold for t in found.targets} == {0, 1, -1}
    assert all(s.protocol == "honest" and not s.apparent for s in nested.results.scores)


def test_what_leaks_is_stamped_everywhere_and_cannot_be_called_honest(
    finished: Run, tmp_path: Path
) -> None:
    shutil.copytree(
        finished.dir, tmp_path / "teacher"
    )  # its ledger will be told that the test rows were opened again
    recipe = student_recipe(finished, str(tmp_path / "teacher"), "plain", ["stages.one.epochs=1"])
    assert recipe.distill is not None
    assert recipe.distill.inner == 0  # there are test rows
    run = workflow.train(recipe, tmp_path / "student")
    oof, scores = run.predictions("oof"), run.results.scores
    assert oof.protocol == "taught"
    assert {(s.rows, s.apparent, s.protocol) for s in scores} == {
        ("oof", True, "taught"),
        ("test", False, "honest"),
    }
    assert any("out-of-fold scores are apparent" in note for note in run.results.notes)
    assert any(
        line.step == "teachers of the student" and line.overlap == 36 for line in run.results.ledger
    )
    assert run.results.distill is not None
    assert [t.rows for t in run.results.distill.tables] == ["test"]
    assert run.results.optimism == ()
    assert {s.protocol for s in evaluate_saved(run.dir, ["mean"]).scores if s.rows == "oof"} == {
        "taught"
    }
    for tree, _ in (score_saved([run.dir]), compare_saved([str(run.dir / "oof.npz")])):
        assert all(s.apparent for s in tree.scores)
        assert any(line.startswith("apparent") for line in tree.warnings)
    arrays = dict(np.load(run.dir / "oof.npz"))
    arrays["provenance"] = np.array(json.dumps({"protocol": "honest", "kind": "oof"}))
    np.savez(tmp_path / "lie.npz", **arrays)
    with pytest.raises(DataError, match="rows are scored by what was fitted on them"):
        Predictions.load(tmp_path / "lie.npz")


def test_the_bit_alone_makes_a_score_apparent() -> None:
    rng = np.random.default_rng(0)
    roles = np.array([[SCORE, FIT], [FIT + TEACH, SCORE]], np.int8)
    values: dict[str, Any] = {
        "probs": rng.dirichlet(np.ones(2), (1, 2)),
        "labels": np.array([0, 1]),
        "ids": ("a", "b"),
        "classes": ("x", "y"),
        "members": ("m",),
        "kind": "oof",
        "folds": np.array([0, 1]),
    }
    assert Predictions(**values, roles=roles).ledger().table()[-1].step == "teachers of the student"
    with pytest.raises(DataError, match="fitted on them: teachers of the student"):
        Predictions(**values, roles=roles + np.array([[TEACH, 0], [0, 0]], np.int8))
    Predictions(**values, roles=roles + np.array([[TEACH, 0], [0, 0]], np.int8), protocol="taught")


def test_interrupted_while_teachers_train_it_goes_on_to_the_same_bits(
    flat: Run, nested: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, real = [], jobs.train_stage

    def interrupted(*args: Any) -> Any:
        if len(done) == 10:  # fold 0's teachers are done, one of fold 1's is
            raise KeyboardInterrupt
        done.append(1)
        return real(*args)

    monkeypatch.setattr(jobs, "train_stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_members(Run.create(nested.recipe, tmp_path / "cut"))
    assert (tmp_path / "cut/targets/fold0.npz").exists()
    assert not (tmp_path / "cut/targets/fold1.npz").exists()
    monkeypatch.setattr(jobs, "train_stage", real)
    train_members(Run.create(nested.recipe, tmp_path / "cut"))
    for name in ("oof.npz", "teachers/fold1/oof.npz"):
        a, b = Predictions.load(tmp_path / "cut" / name), Predictions.load(nested.dir / name)
        np.testing.assert_array_equal(a.probs, b.probs)


def test_a_teacher_that_was_trained_again_or_has_other_images_is_refused(
    flat: Run, nested: Run, tmp_path: Path
) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    shutil.copytree(flat.dir, teacher)
    shutil.copytree(nested.dir, student)
    recipe = nested.recipe.model_dump(exclude_none=True)
    recipe["distill"]["run"] = str(teacher)
    moved = Run(student, Recipe.parse(recipe))
    with pytest.raises(RunError, match=r"targets are of another teacher.*choose another --out"):
        Teaching.of(moved).targets(0)  # type: ignore[union-attr]
    oof = Predictions.load(teacher / "oof.npz")
    oof.rows(np.arange(len(oof))[::-1]).save(teacher / "oof.npz")
    with pytest.raises(
        RunError,
        match=r"student's training images are not those of the run that teaches.*restore the images",
    ):
        _ = Teaching.of(moved).teacher  # type: ignore[union-attr]
    (teacher / "oof.npz").unlink()
    with pytest.raises(RunError, match="no out-of-fold answers"):
        teacher_run(teacher)


def test_what_cannot_teach_or_be_taught_is_told_in_one_line(
    flat: Run, nested: Run, finished: Run, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        teacher_run(tmp_path)
    shutil.copytree(flat.dir, tmp_path / "cut")
    (tmp_path / "cut/results.json").unlink()
    with pytest.raises(RunError, match=r"not finished.*threefold train"):
        teacher_run(tmp_path / "cut")
    shutil.copytree(flat.dir, tmp_path / "paper")
    text = (
        (tmp_path / "paper/recipe.toml")
        .read_text()
        .replace('protocol = "honest"', 'protocol = "paper"')
    )
    (tmp_path / "paper/recipe.toml").write_text(text)
    with pytest.raises(RunError, match=r"protocol paper cannot teach.*protocol=honest"):
        teacher_run(tmp_path / "paper")
    with pytest.raises(RunError, match=r"a student cannot teach.*give the run that taught it"):
        teacher_run(nested.dir)
    recipe = student_recipe(flat, str(flat.dir), "plain", ["distill.inner=0"])
    with pytest.raises(
        RunError, match=r"no row would be left for an honest score.*distill\.inner = 2"
    ):
        workflow.train(recipe, tmp_path / "leaky")
    for sets, told in (
        (["distill.inner=1"], "a single inner fold has no out-of-fold rows"),
        (["distill.alpha=2"], "less than or equal to 1"),
        (["distill.temprature=2"], "did you mean temperature"),
        (["distill.student=nobody"], "distill.student names nobody"),
        (["protocol=paper"], "distill needs protocol = honest"),
        (["members.student.folds=[0]", "folds.final=average"], "in all folds"),
    ):
        with pytest.raises(RecipeError, match=told):
            student_recipe(flat, str(flat.dir), "plain", sets)
    tree = nested.recipe.model_dump(mode="json", exclude_none=True)
    with pytest.raises(RecipeError, match=r"distill\.twin differs from student in its name only"):
        Recipe.parse(tree, ["members.student-labels.img_size=48"])


def test_recipes_without_a_student_have_the_digest_they_had(flat: Run) -> None:
    assert "distill" not in flat.recipe.dump()
    again = Recipe.load(flat.dir / "recipe.toml")
    assert (
        again.digest()
        == flat.recipe.digest()
        == json.loads((flat.dir / "run.json").read_text())["digest"]
    )
    text = nested_text = student_recipe(flat, str(flat.dir), "plain").dump()
    assert "[distill]" in nested_text
    (flat.dir.parent / "student.toml").write_text(text)
    assert Recipe.load(flat.dir.parent / "student.toml").distill is not None
