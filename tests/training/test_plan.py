"""The plan follows the data and the budget, and every decision has a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_runs import paint

from threefold import api
from threefold.errors import DataError, RecipeError, RunError
from threefold.recipe import Recipe, parse_minutes
from threefold.training import plan as planning
from threefold.training.plan import Effort, Speed, plan_folder, predict_seconds


def make_folder(root: Path, names: list[str], count: int = 6, side: int = 40) -> Path:
    """A folder of square images, `count` of each class."""
    for c, name in enumerate(names):
        for i in range(count):
            paint(root / name / f"{i}.png", (40 * c, 90, 200), i + 100 * c, (side, side))
    return root


@pytest.mark.parametrize(
    ("names", "flip"),
    [
        (["cat", "dog"], True),
        (["0", "1"], False),
        (["A", "B", "C"], False),
        (["digit_3", "digit_4"], False),
        (["turn left", "turn right"], False),
        (["bright", "dark"], True),
    ],
)
def test_mirror_images_only_where_they_keep_the_class(
    tmp_path: Path, names: list[str], flip: bool
) -> None:
    plan = plan_folder(make_folder(tmp_path, names), 0)

    assert plan.recipe.augment.hflip is flip
    assert next(d for d in plan.decisions if d.key == "augment.hflip").reason


@pytest.mark.parametrize(("side", "size"), [(20, 64), (100, 128), (224, 224), (600, 224)])
def test_image_size_follows_the_images(tmp_path: Path, side: int, size: int) -> None:
    plan = plan_folder(make_folder(tmp_path, ["a cat", "a dog"], 2, side), 0)

    assert plan.recipe.members[0].img_size == size


def test_smallest_class_bounds_the_folds(tmp_path: Path) -> None:
    make_folder(tmp_path, ["many"], 12)
    make_folder(tmp_path, ["few"], 3)

    assert plan_folder(tmp_path, 0).recipe.folds.k == 3


def test_smaller_budget_never_plans_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, speed = make_folder(tmp_path, ["cat", "dog"], 40, 200), Speed(0.002, 4e-7)
    monkeypatch.setattr(planning, "measure_speed", lambda *_: speed)

    recipes = [plan_folder(root, minutes).recipe for minutes in (0.5, 2, 8, 60)]

    costs = []
    for recipe in recipes:
        effort = Effort(recipe.members[0].img_size, recipe.folds.k, recipe.stages[0].epochs)
        costs.append(predict_seconds(effort, 80, {m.name: speed for m in recipe.members}))
    assert costs == sorted(costs)
    assert costs[-1] > costs[0]


def test_members_and_overrides_are_used(tmp_path: Path) -> None:
    root = make_folder(tmp_path, ["cat", "dog"])

    plan = plan_folder(root, 0, ("test_resnet", "test_vit"), ("train.batch_size=4",))

    assert [m.backbone for m in plan.recipe.members] == ["test_resnet", "test_vit"]
    assert plan.recipe.train.batch_size == 4
    assert Recipe.parse(plan.recipe.model_dump()) == plan.recipe
    header = plan.recipe.dump(plan.explain()).splitlines()[: len(plan.decisions) + 1]
    assert all(line.startswith("#") for line in header)


@pytest.mark.parametrize(
    ("sets", "n"),
    [
        ((), 16),
        (("data.limit_per_class=4", "seed=3"), None),
        pytest.param(("data.limit_per_class=4",), 8, marks=pytest.mark.slow),
        pytest.param(("seed=3",), 16, marks=pytest.mark.slow),
    ],
)
def test_plan_hands_on_the_images_of_the_recipe(
    tmp_path: Path, sets: tuple[str, ...], n: int | None
) -> None:
    root = make_folder(tmp_path / "a", ["cat", "dog"], 8)

    plan = plan_folder(root, overrides=sets)

    assert (len(plan.sources.train) if plan.sources is not None else None) == n


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        plan_folder(tmp_path / "none", 0)
    with pytest.raises(DataError):
        plan_folder(make_folder(tmp_path / "one", ["only"]), 0)


@pytest.mark.parametrize(
    ("text", "minutes"), [("90s", 1.5), ("20m", 20), ("2h", 120), ("0", 0), ("1.5", 1.5)]
)
def test_durations_become_minutes(text: str, minutes: float) -> None:
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "-3m", "nan", "m"])
def test_invalid_durations_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="not a duration: --budget"):
        parse_minutes(text)


def test_fit_from_a_folder_to_a_file_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = make_folder(tmp_path / "my photos", ["çat", "dög"], 8), tmp_path / "run"
    sets = (
        "stages.0.epochs=1",
        "train.device=cpu",
        "members.0.weights=none",
        "members.1.weights=none",
        "stages.0.frozen=",
        "stages.1.frozen=",
        "stages.2.frozen=",
        "folds.k=2",
    )
    members = ("test_resnet", "test_efficientnet")

    with monkeypatch.context() as patch:
        patch.setattr("threefold.training.run.load_data", None)  # the plan hands its images on
        run = api.fit(root, out, budget_minutes=0, members=members, overrides=sets)
    first = run.results
    assert (run.dir / "model.onnx").exists()
    assert (run.dir / "report.html").exists()
    assert sorted(first.classes) == sorted(["çat", "dög"])

    monkeypatch.setattr(planning, "plan_folder", None)
    again = api.fit(root, out).results
    assert again == first.replace(seconds=again.seconds)
    with pytest.raises(RunError, match="other images"):
        api.fit(make_folder(tmp_path / "others", ["a cat", "a dog"]), out)
