"""The plan: what the data are decides, and every choice has a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import paint

from threefold import api
from threefold import plan as planning
from threefold.errors import DataError, RecipeError, RunError
from threefold.plan import plan_folder
from threefold.recipe import Recipe, parse_minutes


def folder(root: Path, names: list[str], count: int = 6, side: int = 40) -> Path:
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
    plan = plan_folder(folder(tmp_path, names), 0)
    assert plan.recipe.augment.hflip is flip
    assert next(c for c in plan.choices if c.key == "augment.hflip").reason


@pytest.mark.parametrize(("side", "size"), [(20, 64), (100, 128), (224, 224), (600, 224)])
def test_image_size_follows_the_images(tmp_path: Path, side: int, size: int) -> None:
    assert (
        plan_folder(folder(tmp_path, ["a cat", "a dog"], 2, side), 0).recipe.members[0].img_size
        == size
    )


def test_a_small_class_bounds_the_folds(tmp_path: Path) -> None:
    folder(tmp_path, ["many"], 12)
    folder(tmp_path, ["few"], 3)
    assert plan_folder(tmp_path, 0).recipe.folds.k == 3


def test_a_smaller_budget_never_plans_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path, ["cat", "dog"], 40, 200)
    monkeypatch.setattr(planning, "_speed", lambda *_: (0.002, 4e-7))
    plans = [plan_folder(root, minutes).recipe for minutes in (0.5, 2, 8, 60)]
    costs = [
        planning._seconds(
            (r.members[0].img_size, r.folds.k, r.stages[0].epochs),
            80,
            {m.name: (0.002, 4e-7) for m in r.members},
        )
        for r in plans
    ]
    assert costs == sorted(costs)
    assert costs[-1] > costs[0]


def test_members_and_overrides_are_taken(tmp_path: Path) -> None:
    plan = plan_folder(
        folder(tmp_path, ["cat", "dog"]), 0, ("test_resnet", "test_vit"), ("train.batch_size=4",)
    )
    assert [m.backbone for m in plan.recipe.members] == ["test_resnet", "test_vit"]
    assert plan.recipe.train.batch_size == 4
    assert Recipe.parse(plan.recipe.model_dump()) == plan.recipe
    assert all(
        line.startswith("#")
        for line in plan.recipe.dump(plan.explain()).splitlines()[: len(plan.choices) + 1]
    )


def test_the_images_that_were_looked_at_are_handed_on_where_the_recipe_has_the_same(
    tmp_path: Path,
) -> None:
    root = folder(tmp_path / "a", ["cat", "dog"], 8)
    for sets, same in (
        ((), True),
        (("data.limit_per_class=4",), True),
        (("data.limit_per_class=4", "seed=3"), False),
        (("seed=3",), True),
    ):
        plan = planning.plan_folder(root, overrides=sets)
        assert (plan.sources is not None) == same, sets
        assert plan.sources is None or len(plan.sources.train) == (
            8 if "limit" in "".join(sets) else 16
        )


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        plan_folder(tmp_path / "none", 0)
    with pytest.raises(DataError):
        plan_folder(folder(tmp_path / "one", ["only"]), 0)


@pytest.mark.parametrize(
    ("text", "minutes"), [("90s", 1.5), ("20m", 20), ("2h", 120), ("0", 0), ("1.5", 1.5)]
)
def test_durations(text: str, minutes: float) -> None:
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "-3m", "nan", "m"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="not a duration: --budget"):
        parse_minutes(text)


def test_fit_from_a_folder_to_a_file_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path / "my photos", ["çat", "dög"], 8)
    sets = (
        "stages.0.epochs=1",
        "train.device=cpu",
        "members.0.weights=none",
        "members.1.weights=none",
        "stages.0.frozen=",
        "stages.1.frozen=",
        "stages.2.frozen=",
    )
    with monkeypatch.context() as once:
        once.setattr("threefold.run.load_data", None)  # the plan has read and verified the images
        run = api.fit(
            root,
            tmp_path / "run",
            budget_minutes=0,
            members=("test_resnet", "test_efficientnet"),
            overrides=(*sets, "folds.k=2"),
        )
    assert (run.dir / "model.onnx").exists()
    assert (run.dir / "report.html").exists()
    assert run.results.classes in (("dög", "çat"), ("çat", "dög"))
    monkeypatch.setattr(planning, "plan_folder", None)
    again = api.fit(root, tmp_path / "run").results
    assert again == run.results.replace(seconds=again.seconds)
    with pytest.raises(RunError, match="other images"):
        api.fit(folder(tmp_path / "others", ["a cat", "a dog"]), tmp_path / "run")
