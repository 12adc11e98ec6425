"""Out-of-fold assembly: members in some folds only, the choice of views, the exported file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_runs import tiny_tree

import threefold
from threefold import api
from threefold.errors import RecipeError, RunError
from threefold.exporting.export import export
from threefold.models.views import view_counts
from threefold.npz_files import read_arrays
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import ViewSpec
from threefold.training.run import Run, stand_ins


def member(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "backbone": "test_resnet", "weights": "none", "img_size": 32, **changes}


@pytest.fixture(scope="module")
def partial(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of two folds: `b` is in the first only, `joint` joins a and c."""
    joint = {
        "name": "joint",
        "joins": ["a", "c"],
        "head": {"kind": "mlp", "fc": 16},
        "img_size": 32,
    }
    tree = tiny_tree(
        images,
        members=[
            member("a"),
            member("b", folds=[0], batch_size=12),
            member("c", backbone="test_efficientnet"),
            joint,
        ],
        views={"kind": "random-crops", "n": 3, "upsample": 1.25, "choose": True},
        stages=[
            {"name": "one", "epochs": 2, "lr": 3e-3},
            {"name": "two", "epochs": 1, "lr": 3e-4},
            {"name": "heads", "epochs": 3, "lr": 1e-2, "trainable": "^head", "members": ["joint"]},
        ],
    )
    return api.train(Recipe.parse(tree), tmp_path_factory.mktemp("runs") / "partial")


def stored(run: Run, name: str, fold: int) -> dict[str, np.ndarray]:
    """Return the arrays that a member's last job in a fold has saved."""
    return read_arrays(run.folder.job_folder(run.last_job(name, fold)) / "probs.npz")


def test_jobs_follow_the_members_folds_and_stages(partial: Run) -> None:
    jobs = {(j.member, j.fold, j.stage) for j in partial.jobs}

    assert {(f, s) for m, f, s in jobs if m == "b"} == {(0, "one"), (0, "two")}
    assert {(f, s) for m, f, s in jobs if m == "joint"} == {(0, "heads"), (1, "heads")}
    assert ("a", 1, "two") in jobs
    assert ("a", 1, "heads") not in jobs


def test_mean_of_present_members_replaces_an_absent_one(partial: Run) -> None:
    oof = partial.predictions("oof")

    assert oof.folds is not None
    a, b, c, _ = oof.probs
    absent = oof.folds == 1
    np.testing.assert_allclose(b[absent], (a + c)[absent] / 2, atol=1e-6)
    assert np.abs(b[~absent] - (a + c)[~absent] / 2).max() > 1e-3
    # So the mean over all members is the mean over those present in the fold: the paper's Table 3.
    np.testing.assert_allclose(np.stack([a, b, c]).mean(0)[absent], (a + c)[absent] / 2, atol=1e-6)


def test_each_fold_answers_test_rows_with_its_members(partial: Run) -> None:
    views = json.loads((partial.dir / "views.json").read_text())["views"]
    index = view_counts(partial.recipe.views).index(views)
    first = np.mean([stored(partial, name, 0)["test"][index] for name in "abc"], axis=0)
    second = np.mean([stored(partial, name, 1)["test"][index] for name in "ac"], axis=0)

    mean = partial.predictions("test").probs[:3].mean(0)

    np.testing.assert_allclose(mean, (first + second) / 2, atol=1e-6)


@pytest.mark.slow
def test_exported_file_has_chosen_views_and_stand_ins(partial: Run, tmp_path: Path) -> None:
    report, test = export(partial, tmp_path / "model.onnx"), partial.sources.test
    model = threefold.load(report.path)
    assert test is not None

    probs = model.infer([test.pixels(i) for i in range(len(test))]).member_probs

    assert model.members == ("a", "b", "c")
    expected = partial.predictions("test").probs[:3].transpose(1, 0, 2)
    np.testing.assert_allclose(probs, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "row"), [("joint", 3), pytest.param("b", 1, marks=pytest.mark.long)]
)
def test_single_and_joint_members_can_be_exported(
    partial: Run, tmp_path: Path, name: str, row: int
) -> None:
    test = partial.sources.test
    assert test is not None

    report = export(partial, tmp_path / f"{name}.onnx", members=[name])
    model = threefold.load(report.path)
    probs = model.infer([test.pixels(i) for i in range(len(test))]).member_probs

    assert model.members == (name,)
    np.testing.assert_allclose(probs[:, 0], partial.predictions("test").probs[row], atol=1e-5)


def test_choice_of_views_is_cross_fitted(partial: Run) -> None:
    counts = view_counts(partial.recipe.views)

    choice = json.loads((partial.dir / "views.json").read_text())

    assert list(choice["accuracy"]) == [str(c) for c in counts] == ["0", "1", "3"]
    assert choice["views"] in counts
    for fold in (0, 1):  # all rows of a fold have the same number of views
        arrays = stored(partial, "a", fold)
        probs = partial.predictions("oof").probs[0, arrays["rows"]]
        assert any(np.array_equal(probs, candidate) for candidate in arrays["score"])


def test_joint_member_is_scored_but_not_combined(partial: Run) -> None:
    results = partial.results

    assert results.combined == ("a", "b", "c")
    assert {c.a for c in results.comparisons} == {"mean", "pruned", "stacked", "joint"}
    answers = partial.predictions("test").probs[:3].mean(0).argmax(1)
    score = results.score("mean", "ensemble", "test")
    assert score is not None
    assert score.accuracy == pytest.approx((answers == partial.predictions("test").labels).mean())


@pytest.mark.parametrize(
    ("spec", "counts"),
    [
        ({"kind": "random-crops", "n": 9, "upsample": 1.1}, (0, 1, 3, 5, 7, 9)),
        ({"kind": "random-crops", "n": 4, "upsample": 1.1}, (0, 1, 3, 4)),
        ({"kind": "flip"}, (1, 2)),
        ({"kind": "ten-crop", "upsample": 1.2}, (0, 1, 5, 10)),
        ({"kind": "multi-scale"}, (1, 2, 3)),
    ],
)
def test_candidate_numbers_of_views(spec: dict[str, Any], counts: tuple[int, ...]) -> None:
    assert view_counts(ViewSpec.model_validate(spec)) == counts


def test_fold_without_members_is_refused(images: Path) -> None:
    recipe = Recipe.parse(
        tiny_tree(images, members=[member("a", folds=[0]), member("b", folds=[0])])
    )

    np.testing.assert_array_equal(stand_ins(recipe, 0), np.eye(2))
    with pytest.raises(RunError, match=r"a fold has no member: members\.\*\.folds, fold 1"):
        stand_ins(recipe, 1)


JOIN = {"name": "j", "joins": ["a", "b"], "img_size": 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"members": [member("a"), member("b"), {**JOIN, "joins": ["a", "x"]}]},
            "names an unknown member, x",
        ),
        ({"members": [member("a"), JOIN, member("b")]}, "come before"),
        ({"members": [member("a"), member("b", img_size=40), JOIN]}, "same img_size"),
        ({"members": [member("a"), member("b", folds=[1]), JOIN]}, r"has only the folds \[1\]"),
        (
            {"members": [member("a"), member("b"), {**JOIN, "joins": ["a"]}]},
            "at least two different members",
        ),
        (
            {"members": [member("a"), member("b"), {**JOIN, "backbone": "resnet18"}]},
            "either backbone or joins",
        ),
        (
            {"members": [member("a"), member("b"), {**JOIN, "head": {"units": 4}}]},
            "only kind and fc",
        ),
        (
            {"members": [member("a", folds=[0])], "folds": {"k": 2, "final": "refit"}},
            "folds.final = refit ignores",
        ),
        ({"members": [member("a")], "ensemble": {"top": 2}}, "exceeds the 1 member"),
        ({"members": [member("a")], "ensemble": {"members": ["z"]}}, "names an unknown member, z"),
        (
            {
                "members": [member("a"), member("b")],
                "stages": [{"name": "s", "epochs": 1, "lr": 1, "members": ["b"]}],
            },
            "a has no stage",
        ),
        ({"members": [member("a")], "views": {"choose": True}}, "nothing to choose from"),
    ],
)
def test_inconsistent_members_are_refused(
    images: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(tiny_tree(images, **changes))


@pytest.fixture(scope="module")
def held_out(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with one split."""
    tree = tiny_tree(
        images,
        members=[member("a"), member("c", head={"kind": "gru", "units": 8})],
        ensemble={"methods": ["mean"]},
        folds={"scheme": "holdout", "holdout": 0.25, "select": 0.2},
        stages=[{"name": "one", "epochs": 1, "lr": 3e-3}],
    )
    return api.train(Recipe.parse(tree), tmp_path_factory.mktemp("runs") / "held_out")


def test_a_holdout_run_scores_the_rows_held_out(held_out: Run) -> None:
    oof, train = held_out.predictions("oof"), held_out.sources.train
    rows = held_out.roles[0].score

    assert len(rows) == round(0.25 * len(train))
    assert oof.ids == tuple(train.ids[row] for row in rows)
    np.testing.assert_array_equal(oof.labels, train.labels[rows])
    np.testing.assert_array_equal(oof.probs[1], stored(held_out, "c", 0)["score"][0])
    assert held_out.results.expected is not None


@pytest.mark.slow
def test_a_holdout_run_exports_its_one_network(held_out: Run, tmp_path: Path) -> None:
    model = threefold.load(export(held_out, tmp_path / "model.onnx").path)
    train, oof = held_out.sources.train, held_out.predictions("oof")

    output = model.infer([train.pixels(int(row)) for row in held_out.roles[0].score[:3]])

    np.testing.assert_allclose(output.member_probs, oof.probs[:, :3].swapaxes(0, 1), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "paper"}, "needs protocol = honest"),
        ({"views": {"kind": "flip", "choose": True}}, "views.choose needs several folds"),
        ({"folds": {"holdout": 0.2}}, "ignores folds.holdout; set folds.scheme = holdout"),
    ],
)
def test_what_holdout_does_not_go_with(changes: dict[str, Any], message: str, images: Path) -> None:
    tree = tiny_tree(images, members=[member("a")], **{"folds": {"scheme": "holdout"}, **changes})

    with pytest.raises(RecipeError, match=message):
        Recipe.parse(tree)


def test_a_holdout_run_cannot_teach(held_out: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"a part of its images only.*folds\.scheme=stratified"):
        api.distill(held_out.dir, "test_resnet", tmp_path / "student")
