"""The plan follows the data and the budget, and every decision has a reason."""

from __future__ import annotations

import re
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from support.tiny_runs import paint

from threefold import api
from threefold.arguments import parse_minutes
from threefold.data.load import load_data
from threefold.errors import DataError, RecipeError, RunError
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Recipe
from threefold.training.checks import check_trainable
from threefold.training.features.probe import predict_fit_seconds
from threefold.training.planning import plan as planning
from threefold.training.planning import tuning as plan_tuning
from threefold.training.planning.basis import Clock, Decision
from threefold.training.planning.image_size import ProbePlan
from threefold.training.planning.measure import Speed
from threefold.training.planning.overrides import mark_overrides
from threefold.training.planning.plan import plan_folder
from threefold.training.planning.tuning import TUNINGS, TuningSpeeds, predict_seconds

TINY = ("test_efficientnet",)
UNTRAINED = ("members.0.weights=none",)
SMALL = (*UNTRAINED, "members.0.img_size=32")
"""A size that is named needs no probes at several sizes, which take longest."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))


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
    plan = plan_folder(make_folder(tmp_path, names), 0, TINY, SMALL)

    assert plan.recipe.augment.hflip is flip
    assert next(d for d in plan.decisions if d.key == "augment.hflip").reason


def test_size_is_chosen_by_probes(tmp_path: Path) -> None:
    plan = plan_folder(make_folder(tmp_path, ["cat", "dog"], 8), 0, TINY, UNTRAINED)

    decision = next(d for d in plan.decisions if d.key == "img_size")
    assert plan.recipe.members[0].img_size == decision.value
    assert "out of fold" in decision.reason


def test_size_by_the_user_is_kept(tmp_path: Path) -> None:
    sets = (*UNTRAINED, "members.0.img_size=48")

    plan = plan_folder(make_folder(tmp_path, ["cat", "dog"]), 0, TINY, sets)

    assert plan.recipe.members[0].img_size == 48


def test_smallest_class_bounds_the_folds(tmp_path: Path) -> None:
    make_folder(tmp_path, ["many"], 12)
    make_folder(tmp_path, ["few"], 3)

    assert plan_folder(tmp_path, 0, TINY, SMALL).recipe.folds.k == 3


def test_many_images_are_split_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_tuning, "HOLDOUT_FROM", 20)
    root = make_folder(tmp_path, ["cat", "dog"], 12)

    folds = plan_folder(root, 0, TINY, SMALL).recipe.folds
    named = plan_folder(root, 0, TINY, (*SMALL, "folds.k=3")).recipe.folds
    probes = plan_folder(root, 0, TINY, SMALL, "fast").recipe.folds

    assert (folds.scheme, folds.final) == ("holdout", "average")
    assert (named.scheme, named.k, named.final) == ("stratified", 3, "refit")
    assert (probes.scheme, probes.k) == ("stratified", 5)


@pytest.mark.slow
def test_uneven_classes_are_judged_by_balanced_accuracy(tmp_path: Path) -> None:
    even = plan_folder(make_folder(tmp_path / "even", ["a b", "c d"], 6), 0, TINY, UNTRAINED)
    make_folder(tmp_path / "uneven", ["many"], 12)
    make_folder(tmp_path / "uneven", ["few"], 4)
    uneven = plan_folder(tmp_path / "uneven", 0, TINY, UNTRAINED)

    assert even.recipe.train.metric == "accuracy"
    assert uneven.recipe.train.metric == "balanced_accuracy"
    assert any("4 to 12 images" in decision.reason for decision in uneven.decisions)


@pytest.mark.parametrize(("head_seconds", "folds"), [(1.0, 5), (10.0, 3)])
def test_heads_that_take_long_get_fewer_folds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head_seconds: float, folds: int
) -> None:
    size = Decision("img_size", 32, "as given")
    measured = ProbePlan(32, [1.0], 0.001, 100, size, head_seconds=head_seconds)
    monkeypatch.setattr(planning, "with_head_seconds", Mock(return_value=measured))

    plan = plan_folder(make_folder(tmp_path, ["cat", "dog"]), 1, TINY, SMALL, quality="fast")

    assert plan.recipe.folds.k == folds


def test_heads_are_timed_for_a_budget_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Mock(side_effect=AssertionError)
    monkeypatch.setattr(planning, "with_head_seconds", timed)

    plan = plan_folder(make_folder(tmp_path, ["cat", "dog"]), 0, TINY, SMALL, "fast")

    assert plan.recipe.folds.k == 5
    timed.assert_not_called()


def test_a_slower_fit_is_predicted_for_more_rows_and_classes() -> None:
    features = np.random.default_rng(0).normal(size=(40, 60)).astype(np.float32)

    seconds = [predict_fit_seconds(features, k, n) for n, k in ((200, 2), (9000, 2), (9000, 90))]

    assert 0 < seconds[0] < seconds[1] < seconds[2]


@pytest.mark.parametrize("sequence", ["levels", "pooled"])
def test_probes_read_the_levels_that_suit_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequence: str
) -> None:
    size = Decision("img_size", 32, "as given")
    levels = Decision("head.sequence", sequence, "as given")
    measured = ProbePlan(32, [1.0], 0.001, 100, size, levels)
    monkeypatch.setattr(planning, "choose_size", Mock(return_value=measured))

    plan = plan_folder(make_folder(tmp_path, ["cat", "dog"]), 0, TINY, UNTRAINED)

    probe, tuned = plan.recipe.members
    assert (probe.head.sequence, tuned.head.sequence) == (sequence, sequence)
    assert levels in plan.decisions


def test_tuned_members_follow_their_probes(tmp_path: Path) -> None:
    plan = plan_folder(make_folder(tmp_path, ["cat", "dog"]), 0, TINY, SMALL)

    probe, tuned = plan.recipe.members
    assert tuned.starts_from == probe.name
    assert plan.recipe.probes == (probe.name,)
    assert [stage.kind for stage in plan.recipe.stages] == ["head", "tune", "tune"]


@pytest.mark.slow
def test_a_fixed_grid_of_tokens_keeps_its_size(tmp_path: Path) -> None:
    sets = (*UNTRAINED, "members.0.img_size=32", "train.device=cpu")
    root = make_folder(tmp_path, ["cat", "dog"])

    recipe = plan_folder(root, 20, ("vit_tiny_patch16_224",), sets).recipe

    assert [member.img_size for member in recipe.members] == [32, 32]
    check_trainable(recipe)


def test_a_backbone_of_one_size_has_that_size(tmp_path: Path) -> None:
    members = (" timm/test_vit.r160_in1k ", "test_resnet")
    untrained = (*UNTRAINED, "members.1.weights=none")
    folder = make_folder(tmp_path, ["cat", "dog"])

    recipe = plan_folder(folder, 0, members, untrained).recipe

    names = {member.name: (member.backbone, member.img_size) for member in recipe.members}
    assert names["m0-test_vit"] == ("test_vit.r160_in1k", 160)
    assert names["m0-test_vit-tuned"] == ("test_vit.r160_in1k", 160)
    assert names["m1-test_resnet"][0] == "test_resnet"
    check_trainable(recipe)
    with pytest.raises(RecipeError, match=r"cannot take images of this size.*got 33 px"):
        plan_folder(folder, 0, members, (*untrained, "members.0.img_size=33"))


def test_fast_quality_has_probes_only(tmp_path: Path) -> None:
    root = make_folder(tmp_path, ["cat", "dog"])

    recipe = plan_folder(root, 0, TINY, SMALL, quality="fast").recipe

    assert recipe.probes == tuple(member.name for member in recipe.members)


def test_more_thorough_tuning_takes_longer() -> None:
    speeds = TuningSpeeds(Speed(0.0, 1e-7), Speed(0.0, 2e-7), Speed(0.0, 6e-7))

    seconds = [predict_seconds(t, 400, 224, speeds, [1.0, 1.5, 2.0]) for t in TUNINGS]

    assert seconds == sorted(seconds)


def test_impossible_budget_is_refused(tmp_path: Path) -> None:
    root = make_folder(tmp_path, ["cat", "dog"])

    with pytest.raises(
        RecipeError, match=r"the budget is too small: --budget; expected at least .* got 3 s;"
    ):
        plan_folder(root, 3 / 60, TINY, UNTRAINED)


def test_a_budget_that_planning_used_up_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path, ["cat", "dog"])
    late = Clock(300, time.monotonic() - 200)
    monkeypatch.setattr(Clock, "start", lambda budget, began: late)

    with pytest.raises(RecipeError, match=r"expected at least about 5\d0 s .* got 300 s;"):
        plan_folder(root, 5, TINY, UNTRAINED)


@pytest.mark.slow
def test_members_and_overrides_are_used(tmp_path: Path) -> None:
    root = make_folder(tmp_path, ["cat", "dog"])
    sets = ("train.batch_size=4", "members.0.weights=none", "members.1.weights=none")

    plan = plan_folder(root, 0, ("test_resnet", "test_vit"), sets)

    backbones = [m.backbone for m in plan.recipe.members if not m.starts_from]
    assert backbones == ["test_resnet", "test_vit"]
    assert plan.recipe.train.batch_size == 4
    assert Decision("train.batch_size", "4", "named by you") in plan.decisions
    assert Recipe.parse(plan.recipe.model_dump()) == plan.recipe
    header = plan.recipe.dump(plan.explain()).splitlines()[: len(plan.decisions) + 1]
    assert all(line.startswith("#") for line in header)


@pytest.mark.parametrize(
    ("sets", "n"),
    [
        ((), 16),
        (("data.limit_per_class=4", "seed=3"), 8),
        pytest.param(("data.limit_per_class=4",), 8, marks=pytest.mark.slow),
        pytest.param(("seed=3",), 16, marks=pytest.mark.slow),
    ],
)
def test_plan_hands_on_the_images_of_the_recipe(
    tmp_path: Path, sets: tuple[str, ...], n: int
) -> None:
    root = make_folder(tmp_path / "a", ["cat", "dog"], 8)

    plan = plan_folder(root, 0, TINY, (*SMALL, *sets), quality="fast")

    assert plan.sources is not None
    assert len(plan.sources.train) == n
    assert plan.sources.train.ids == load_data(plan.recipe.data, plan.recipe.seed).train.ids


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        plan_folder(tmp_path / "none", 0)
    with pytest.raises(DataError):
        plan_folder(make_folder(tmp_path / "one", ["only"]), 0)


def test_reasons_are_not_given_for_values_of_the_user() -> None:
    pair = Decision("augment.rotation, crop", "10, 0.7", "mild")
    size = Decision("img_size", 160, "probes")
    overrides = ("augment.crop=0.5", "members.0.img_size=224")

    marked = mark_overrides([pair, size], overrides)

    assert marked == [
        Decision("augment.rotation, crop", "10, 0.5", "mild; crop named by you"),
        Decision("img_size", 160, "probes; members.0.img_size = 224: named by you"),
    ]
    assert mark_overrides([pair, size], ("seed=3",)) == [pair, size]


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("trian.batch_size=4", "did you mean train?"),
        ("augment.hflp=true", "did you mean hflip?"),
        ("train.bach_size=4", "did you mean batch_size?"),
        ("stages.tune1.epchs=3", "did you mean epochs?"),
        ("stages.tun1.epochs=3", "did you mean tune1?"),
        ("members.0.img_sise=32", "did you mean img_size?"),
        ("members.m0-test_efficientnet-tund.img_size=32", "-tuned?"),
        ("stages.tune1.epochs=many", "valid integer"),
    ],
)
def test_typing_errors_are_refused_before_reading_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, advice: str
) -> None:
    monkeypatch.setattr(planning, "load_data", None)

    with pytest.raises(RecipeError, match=re.escape(advice)):
        plan_folder(tmp_path, 0, TINY, (override,))


def test_a_plan_that_dropped_members_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = make_folder(tmp_path / "images", ["cat", "dog"]), tmp_path / "run"
    members = ("test_resnet", "test_efficientnet")
    sets = (*UNTRAINED, "members.0.img_size=32")
    plan_of_one = ProbePlan(32, [1.0], 0.01, 100, Decision("img_size", 32, "measured"))
    monkeypatch.setattr(planning, "choose_size", lambda *_: plan_of_one)
    plan = plan_folder(root, 0, members, sets)
    RunFolder.create(out, plan.recipe, plan.explain())
    started = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(api.Run, "create", started)

    with pytest.raises(KeyboardInterrupt):  # it has read the recipe, and begins
        api.fit(root, out, members=members)
    with pytest.raises(RunError, match="another recipe"):
        api.fit(root, out, members=("test_resnet", "test_vit"))

    assert plan.decisions[0].value == "m0-test_resnet"
    assert "test_efficientnet" in plan.decisions[0].reason


@pytest.mark.parametrize(
    ("text", "minutes"), [("90s", 1.5), ("20m", 20), ("2h", 120), ("0", 0), ("1.5", 1.5)]
)
def test_durations_become_minutes(text: str, minutes: float) -> None:
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "soon", "-3m", "nan", "m"])
def test_invalid_durations_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="not a duration: budget"):
        parse_minutes(text)


@pytest.mark.long
@pytest.mark.slow
def test_fit_from_a_folder_to_a_file_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = make_folder(tmp_path / "my photos", ["çat", "dög"], 8), tmp_path / "run"
    sets = (
        "stages.tune1.epochs=1",
        "stages.tune2.epochs=1",
        "train.device=cpu",
        "members.0.weights=none",
        "members.1.weights=none",
        "members.0.img_size=32",
        "members.1.img_size=32",
        "folds.k=2",
    )
    members = ("test_resnet", "test_efficientnet")

    with monkeypatch.context() as patch:
        patch.setattr("threefold.training.run.load_data", None)  # the plan hands its images on
        run = api.fit(root, out, budget=0, members=members, overrides=sets)
    first = run.results
    assert (run.dir / "model.onnx").exists()
    assert (run.dir / "report.html").exists()
    assert sorted(first.classes) == sorted(["çat", "dög"])
    assert not first.pending

    monkeypatch.setattr(planning, "plan_folder", None)
    follower = Mock(defers_stop=False)
    again = api.fit(root, out, watcher=follower).results
    assert "is finished, with its own recipe" in follower.note.call_args_list[0].args[0]
    assert again == first.replace(seconds=again.seconds)
    as_before = api.fit(root, out, members=members, overrides=sets).results
    assert as_before == first.replace(seconds=as_before.seconds)
    chosen = api.fit(root, out, members=("auto",)).results  # what was chosen stays chosen
    assert chosen == first.replace(seconds=chosen.seconds)


def write_own_folds(root: Path, suffix: str) -> Path:
    """A table of twelve images of two classes with the user's folds 1 to 3."""
    rows = {
        "path": [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(6)],
        "label": ["cat"] * 6 + ["dog"] * 6,
        "kfold": [1, 2, 3] * 4,
    }
    make_folder(root, ["cat", "dog"])
    if suffix == ".parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.table(rows), root / "rows.parquet")
    else:
        lines = [rows.keys(), *zip(*rows.values(), strict=True)]
        separator = "\t" if suffix == ".tsv" else ","
        text = "\n".join(separator.join(map(str, line)) for line in lines)
        (root / f"rows{suffix}").write_text(text)
    return root / f"rows{suffix}"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_the_users_own_folds_are_kept(tmp_path: Path, suffix: str) -> None:
    table = write_own_folds(tmp_path, suffix)

    plan = plan_folder(table, 0, TINY, (*UNTRAINED, "members.0.img_size=32"))

    assert (plan.recipe.folds.scheme, plan.recipe.data.fold_column) == ("column", "kfold")
    assert "folds.scheme = column: the column kfold of the table has 3 folds of" in plan.explain()
    assert plan.sources is not None
    assert plan.sources.train.folds == ("1", "2", "3") * 4


def test_a_named_column_of_folds_needs_no_scheme(tmp_path: Path) -> None:
    table = write_own_folds(tmp_path, ".csv")
    table.write_text(table.read_text().replace("kfold", "part of"))
    sets = (*UNTRAINED, "members.0.img_size=32", 'data.fold_column="part of"')

    assert plan_folder(table, 0, TINY, sets).recipe.folds.scheme == "column"
