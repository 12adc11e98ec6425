"""The recipe: strict, overridable, and the same after a round trip."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.tiny_runs import tiny_tree

from threefold.errors import RecipeError
from threefold.recipe.lookup import packaged, resolve
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import AugmentSpec, FeatureSpec
from threefold.recipe.subset import known_digests


def parse(*sets: str, **changes: Any) -> Recipe:
    return Recipe.parse(tiny_tree(Path("x"), **changes), sets)


def test_dump_is_toml_that_gives_the_same_recipe() -> None:
    recipe = parse()

    text = recipe.dump("why\nit is so")

    assert text.startswith("# why\n# it is so\n")
    assert Recipe.parse(tomllib.loads(text)) == recipe


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.bach_size=3", ("train.bach_size", "did you mean batch_size?")),
        ("members.gated.head.unit=3", ("members.1.head.unit", "did you mean units?")),
        ("zzz=1", ("zzz", "known are name, seed")),
        ("budget_minutes=inf", ("budget_minutes", "finite number")),
        ("stages.one.lr=nan", ("stages.0.lr", "finite number")),
        ("augment.mixup=inf", ("augment.mixup", "finite number")),
        ("seed=9223372036854775808", ("seed", "less than 9223372036854775808")),
        ("seed=-1", ("seed", "greater than or equal to 0")),
        ("folds.k=0", ("folds.k", "greater than or equal to 1")),
        ("stages.one.trainable=(", ("stages.0.trainable", "not a regular expression")),
        ("members.gated.head.kind=rnnn", ("members.1.head.kind",)),
        ("folds.k=1", ("folds.k = 1 leaves no out-of-fold rows",)),
        ("folds.scheme=grouped", ("needs groups",)),
        ("members.third.img_size=64", ("expected one of plain, gated",)),
        ("data.group_regex=(a", ("data.group_regex", "not a regular expression")),
        ("data.group_regex=a", ("set folds.scheme = grouped",)),
        ("train.optimizer=adam-keras", ("set train.weight_decay = 0",)),
        ("views.n=3", ("set views.n = 1",)),
        ("train", ("expected path=value",)),
        ("name.x=1", ("name is a value",)),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(override: str, words: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as error:
        parse(override)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_reach_tables_by_name_and_by_index() -> None:
    recipe = parse(
        "members.gated.img_size=64",
        'members.0.head={kind="lstm", units=4}',
        "train.device=cuda",
        "seed=7",
    )

    assert recipe.member("gated").img_size == 64
    assert recipe.member("plain").head.kind == "lstm"
    assert recipe.train.device == "cuda"
    assert recipe.seed == 7


def test_names_must_differ() -> None:
    with pytest.raises(RecipeError, match="members need different names; repeated: gated"):
        parse("members.plain.name=gated")


def test_jobs_cover_members_folds_and_stages_once() -> None:
    jobs = parse("folds.final=refit").jobs()

    assert len(jobs) == len(set(jobs)) == 2 * 3 * 2
    assert {job.fold for job in jobs} == {0, 1, -1}
    assert jobs[0].path == "jobs/plain/fold0/one"


def test_digest_changes_with_what_matters_only() -> None:
    assert parse().digest() == parse("name=other", "budget_minutes=3").digest()
    assert parse().digest() != parse("seed=1").digest()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        Recipe.load(tmp_path / "none.toml")

    bad = tmp_path / "bad.toml"
    bad.write_text("a = [")

    with pytest.raises(RecipeError, match="not valid TOML"):
        Recipe.load(bad)

    bad.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(RecipeError, match="not valid TOML"):
        Recipe.load(bad)


def test_packaged_recipes_parse() -> None:
    assert packaged("demo").name == "demo"
    assert resolve("demo", ["seed=3"]).seed == 3
    with pytest.raises(RecipeError, match=r"no such recipe.*demo"):
        packaged("dmeo")


def test_images_in_place_of_a_recipe_name_the_verb(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"got a folder; .*threefold fit {tmp_path}"):
        resolve(str(tmp_path))

    forms = {"a.csv": "table", "a.TSV": "table", "a.zip": "archive", "a.npz": "file of arrays"}
    for name, form in forms.items():
        with pytest.raises(RecipeError, match=rf"got an? {form}; .*threefold fit {name}"):
            resolve(name)

    (tmp_path / "recipe.toml").touch()
    with pytest.raises(RecipeError, match=rf"train {tmp_path}/recipe\.toml --out {tmp_path}"):
        resolve(str(tmp_path))


PSEUDO = {"images": "more", "members": ["gated"]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"members": ["third"]}, "unknown member, third; known: plain, gated"),
        ({"members": ["plain"]}, "no member answers the unlabelled images for plain"),
        ({"members": []}, "pseudo_labels.members"),
        ({"images": ""}, "pseudo_labels.images"),
        ({"threshold": 1.5}, "pseudo_labels.threshold"),
        ({"threshold": float("nan")}, "pseudo_labels.threshold"),
        ({"weight": 0.0}, "pseudo_labels.weight"),
        ({"weight": float("inf")}, "pseudo_labels.weight"),
        ({"targets": "firm"}, "pseudo_labels.targets"),
        ({"treshold": 0.9}, "did you mean threshold?"),
    ],
)
def test_wrong_pseudo_labels_are_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(words)):
        parse(pseudo_labels={**PSEUDO, **changes})


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("protocol=paper", "needs protocol = honest"),
        ('distill={run="x", student="plain"}', "remove one of the two tables"),
        ("members.plain.folds=[0]", "no member answers the unlabelled images for gated"),
        ('members.gated={name="gated", joins=["plain", "other"]}', "gated joins others"),
    ],
)
def test_pseudo_labels_need_honest_teachers(override: str, words: str) -> None:
    other = {"name": "other", "backbone": "test_resnet", "img_size": 224}
    members = tiny_tree(Path("x"))["members"]
    changes = {"members": [members[0], other, members[1]] if "joins" in override else members}

    with pytest.raises(RecipeError, match=re.escape(words)):
        parse("members.plain.img_size=224", override, pseudo_labels=PSEUDO, **changes)


def test_tables_that_nobody_reads_go_with_the_members() -> None:
    probe = {"name": "probe", "backbone": "test_resnet", "img_size": 32}
    stages = [
        {"name": "head", "kind": "head", "members": ["probe"]},
        {"name": "one", "epochs": 1, "lr": 1e-3},
    ]
    members = [probe, tiny_tree(Path("x"))["members"][0]]

    recipe = parse(stages=stages, members=members, features={"copies": 2})

    assert recipe.without(["probe"]).features == FeatureSpec()
    assert recipe.without(["probe"]).augment == recipe.augment
    assert recipe.without(["plain"]).features == recipe.features
    assert parse(stages=stages, members=members).without(["plain"]).augment == AugmentSpec()


def test_a_student_that_starts_from_a_probe_has_digests() -> None:
    probe = {"name": "probe", "backbone": "test_resnet", "img_size": 32}
    stages = [
        {"name": "head", "kind": "head", "members": ["probe"]},
        {"name": "one", "epochs": 1, "lr": 1e-3},
    ]
    members = [probe, {"name": "student", "img_size": 32, "starts_from": "probe"}]
    recipe = parse(stages=stages, members=members, distill={"run": "x", "student": "student"})

    assert list(known_digests(recipe)) == [recipe.digest(), recipe.digest(as_given=True)]


def test_those_before_the_first_student_teach() -> None:
    recipe = parse(pseudo_labels=PSEUDO)

    assert recipe.teachers == ("plain",)
    assert [recipe.uses_pseudo_labels(m.name) for m in recipe.members] == [False, True]
    assert recipe.without(["gated"]).pseudo_labels is None
    assert recipe.without(["gated"]).teachers == ()
    assert parse("members.plain.folds=[0]", "members.gated.folds=[0]", pseudo_labels=PSEUDO)
