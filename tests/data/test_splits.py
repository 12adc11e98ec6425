"""Laws of the folds: a row is scored once, roles are disjoint, groups whole, names irrelevant."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from threefold.data.splits import Roles, assign_roles, check_roles, refit_roles
from threefold.errors import DataError, RunError
from threefold.recipe.schema import FoldSpec

LAW = settings(max_examples=40, deadline=None)


@st.composite
def rows(draw: st.DrawFn) -> tuple[np.ndarray, list[str], FoldSpec, int]:
    """Labels, groups, folds and a seed for which folds are possible or nearly so."""
    k = draw(st.integers(2, 4))
    counts = draw(st.lists(st.integers(k, 25), min_size=2, max_size=5))
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = labels[np.random.default_rng(draw(st.integers(0, 99))).permutation(len(labels))]
    number = draw(st.integers(k, 12))
    groups = [
        f"g{g}"
        for g in draw(
            st.lists(st.integers(0, number - 1), min_size=len(labels), max_size=len(labels))
        )
    ]
    scheme = draw(st.sampled_from(["stratified", "grouped", "leave-one-group-out"]))
    spec = FoldSpec(k=k, scheme=scheme, select=draw(st.sampled_from([0.05, 0.15, 0.4])))
    return labels, groups, spec, draw(st.integers(-(2**40), 2**40))


def roles_or_skip(labels, groups, spec, protocol, seed) -> tuple[Roles, ...]:
    try:
        return assign_roles(labels, groups, spec, protocol, seed)
    except DataError:  # groups too few or too uneven, which has its own tests
        assume(False)
        raise


def same(a: tuple[Roles, ...], b: tuple[Roles, ...]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@LAW
@given(rows(), st.sampled_from(["honest", "paper"]))
def test_every_row_is_scored_exactly_once(case, protocol) -> None:
    labels, groups, spec, seed = case

    roles = roles_or_skip(labels, groups, spec, protocol, seed)

    assert len(roles) == (len(set(groups)) if spec.scheme == "leave-one-group-out" else spec.k)
    assert np.array_equal(
        np.sort(np.concatenate([part.score for part in roles])), np.arange(len(labels))
    )


@LAW
@given(rows())
def test_honest_roles_are_disjoint_and_use_every_row(case) -> None:
    labels, groups, spec, seed = case

    for part in roles_or_skip(labels, groups, spec, "honest", seed):
        together = np.concatenate(part)
        assert np.array_equal(np.sort(together), np.arange(len(labels)))
        assert all(
            len(role) and (np.diff(role) > 0).all() and role.dtype == np.int64 for role in part
        )
        assert set(labels[part.fit]) == set(labels)


@LAW
@given(rows())
def test_paper_roles_select_on_what_is_scored(case) -> None:
    labels, groups, spec, seed = case

    for part in roles_or_skip(labels, groups, spec, "paper", seed):
        assert np.array_equal(part.select, part.score)
        assert np.array_equal(
            np.sort(np.concatenate([part.fit, part.score])), np.arange(len(labels))
        )


@LAW
@given(rows())
def test_no_group_has_two_roles_in_one_fold(case) -> None:
    labels, groups, spec, seed = case
    assume(spec.scheme != "stratified")
    names = np.array(groups)

    for part in roles_or_skip(labels, groups, spec, "honest", seed):
        fit, select, score = (set(names[role]) for role in part)
        assert not fit & select
        assert not score & (fit | select)
        if spec.scheme == "leave-one-group-out":
            assert len(score) == 1


@LAW
@given(rows(), st.randoms(use_true_random=False))
def test_names_of_classes_and_groups_do_not_matter(case, random) -> None:
    labels, groups, spec, seed = case
    roles = roles_or_skip(labels, groups, spec, "honest", seed)
    renamed = list(range(len(set(labels))))
    random.shuffle(renamed)
    hidden = {name: f"{random.random()} {name}" for name in set(groups)}

    again = assign_roles(
        np.array(renamed)[labels] + 3, [hidden[g] for g in groups], spec, "honest", seed
    )

    assert same(roles, again)


@LAW
@given(rows())
def test_the_same_seed_gives_the_same_roles(case) -> None:
    labels, groups, spec, seed = case
    roles = roles_or_skip(labels, groups, spec, "honest", seed)
    np.random.seed(1)  # the global state must not matter

    assert same(roles, assign_roles(list(labels), tuple(groups), spec, "honest", seed))


def test_another_seed_gives_other_roles() -> None:
    labels = np.arange(200) % 4
    a, b = (assign_roles(labels, None, FoldSpec(), "honest", seed) for seed in (0, 1))

    assert not np.array_equal(a[0].score, b[0].score)
    assert not np.array_equal(a[0].select, b[0].select)


def test_score_and_select_have_their_share_of_every_class() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 100])

    for part in assign_roles(labels, None, FoldSpec(k=5, select=0.15), "honest", 0):
        assert np.bincount(labels[part.score]).tolist() == [120, 60, 20]
        assert np.bincount(labels[part.select]).tolist() == [72, 36, 12]


def test_select_in_whole_groups_comes_near_its_share() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 2000)
    labels = rng.integers(0, 4, 2000)
    spec = FoldSpec(k=5, scheme="grouped", select=0.2)

    for part in assign_roles(labels, [str(g) for g in groups], spec, "honest", 0):
        outside = len(part.fit) + len(part.select)
        assert abs(len(part.select) / outside - 0.2) < 0.03
        shares = np.bincount(labels[part.select]) / np.bincount(
            labels[np.concatenate([part.fit, part.select])]
        )
        assert np.abs(shares - 0.2).max() < 0.06


def test_two_images_outside_the_scored_rows_serve_both_roles() -> None:
    for part in assign_roles([0, 1] * 3, None, FoldSpec(k=3), "honest", 0):
        assert (len(part.fit), len(part.select), len(part.score)) == (2, 2, 2)


def test_large_groups_still_leave_one_for_select() -> None:
    labels = np.tile([0, 1], 30)
    groups = [f"signer{i // 20}" for i in range(60)]

    roles = assign_roles(
        labels, groups, FoldSpec(scheme="leave-one-group-out", select=0.1), "honest", 0
    )

    assert [len(part.fit) for part in roles] == [20, 20, 20]
    assert [part.score[0] for part in roles] == [0, 20, 40]


def test_a_group_with_the_last_images_of_a_class_stays_in_fit() -> None:
    labels = np.array([0, 0, 1, 1, 0, 1] * 4 + [2] * 4)
    groups = [f"{i // 3}" for i in range(24)] + ["rare1", "rare1", "rare2", "rare2"]
    spec = FoldSpec(k=2, scheme="grouped", select=0.4)
    possible = 0

    for seed in range(20):
        try:
            roles = assign_roles(labels, groups, spec, "honest", seed)
        except DataError:  # both rare groups were dealt into one fold
            continue
        possible += 1
        assert all(2 in labels[part.fit] for part in roles)
    assert possible > 5


def test_select_never_takes_the_only_group_of_a_class() -> None:
    # Otherwise the group with the rare class is drawn: it brings both others closer to their share.
    labels = np.array([0, 1] * 50 + [2, 2])
    groups = [f"{i // 20}" for i in range(100)] + ["3", "3"]

    for seed in range(20):
        part = refit_roles(labels, groups, FoldSpec(scheme="grouped", select=0.4), seed)
        assert set(labels[part.fit]) == {0, 1, 2}
        assert len(part.select) == 40


def test_one_fold_under_paper_fits_everything() -> None:
    (part,) = assign_roles([0, 1, 0, 1], None, FoldSpec(k=1), "paper", 0)

    assert part.fit.tolist() == [0, 1, 2, 3]
    assert part.select.size == part.score.size == 0


@pytest.mark.parametrize("scheme", ["stratified", "grouped", "leave-one-group-out"])
def test_refit_uses_all_rows_and_scores_none(scheme: str) -> None:
    labels, groups = np.arange(100) % 4, [f"{i // 10}" for i in range(100)]

    part = refit_roles(labels, groups, FoldSpec(scheme=scheme, select=0.2), 3)

    assert np.array_equal(np.sort(np.concatenate([part.fit, part.select])), np.arange(100))
    assert part.score.size == 0
    assert abs(len(part.select) - 20) <= (0 if scheme == "stratified" else 10)
    if scheme != "stratified":
        names = np.array(groups)
        assert not set(names[part.fit]) & set(names[part.select])


def test_folds_that_are_no_partition_are_an_internal_error() -> None:
    a, b, c = (np.array(rows, dtype=np.int64) for rows in ([0, 1], [2, 3], [3]))
    none = a[:0]

    check_roles([Roles(a, none, b), Roles(b, none, a)], np.arange(4))
    for wrong in (
        [Roles(a, none, b)],
        [Roles(a, none, b), Roles(a, none, b)],
        [Roles(a, none, b), Roles(b, none, a), Roles(a, none, c)],
        [],
    ):
        with pytest.raises(RunError, match="exactly once"):
            check_roles(wrong, np.arange(4))
    with pytest.raises(RunError, match="fold 1"):
        check_roles([Roles(a, none, b), Roles(a, none, a)], np.arange(4))
    with pytest.raises(RunError, match="fold 0"):
        check_roles([Roles(a, a, b), Roles(b, none, a)], np.arange(4))


@pytest.mark.parametrize(
    ("labels", "groups", "options", "expected"),
    [
        (
            [0] * 9 + [1] * 3,
            None,
            {"k": 5},
            ["class ring", "5 folds", "expected 5 or more, got 3", "lower folds.k"],
        ),
        ([0, 1] * 9, None, {"k": 1}, ["folds.k = 1"]),
        ([0, 1] * 9, None, {"scheme": "grouped"}, ["grouped needs groups", "group_regex"]),
        ([0, 1] * 9, None, {"scheme": "leave-one-group-out"}, ["leave-one-group-out needs groups"]),
        ([0, 1] * 9, ["a"], {"scheme": "grouped"}, ["expected 18 groups, got 1"]),
        ([0, 1] * 9, ["a"] * 18, {"scheme": "leave-one-group-out"}, ["several groups", "got 1"]),
        (
            [0, 1] * 9,
            ["a", "a", "b"] * 6,
            {"scheme": "grouped", "k": 3},
            ["too few groups for 3 folds", "got 2"],
        ),
        (
            [0, 1] * 9,
            ["a", "b"] * 9,
            {"scheme": "grouped", "k": 2},
            ["no images of class", "to train on"],
        ),
        (
            [0, 0, 1, 1] * 3,
            ["a", "b"] * 6,
            {"scheme": "grouped", "k": 2},
            ["fold 0 leaves no images to choose"],
        ),
        ([0, 1, 0, 1], None, {"k": 2}, ["fold 0 leaves no images to choose"]),
    ],
)
def test_impossible_folds_are_refused(labels, groups, options, expected) -> None:
    with pytest.raises(DataError) as error:
        assign_roles(labels, groups, FoldSpec(**options), "honest", 0, classes=("dish", "ring"))
    assert "\n" not in str(error.value)
    for text in expected:
        assert text in str(error.value)


def test_a_class_without_a_name_is_shown_by_its_number() -> None:
    with pytest.raises(DataError, match="class 7 for 5 folds"):
        assign_roles([3] * 5 + [7], None, FoldSpec(), "paper", 0)


def test_refit_with_one_group_is_refused() -> None:
    with pytest.raises(DataError, match="the refit leaves no images"):
        refit_roles([0, 1, 0, 1], ["a"] * 4, FoldSpec(scheme="grouped"), 0)


@LAW
@given(
    st.integers(2, 40),
    st.sampled_from([0.1, 0.3, 0.5]),
    st.booleans(),
    st.integers(-(2**40), 2**40),
)
def test_holdout_is_one_split(per_class: int, share: float, grouped: bool, seed: int) -> None:
    labels = np.arange(3 * per_class) % 3
    groups = [f"g{row // 6}" for row in range(len(labels))] if grouped else None
    spec = FoldSpec(scheme="holdout", holdout=share, select=0.1)
    if grouped:
        assume(per_class >= 6)  # three groups or more

    (roles,) = roles_or_skip(labels, groups, spec, "honest", seed)

    assert np.array_equal(np.sort(np.concatenate(roles)), np.arange(len(labels)))
    assert set(labels[roles.score]) == set(labels[roles.fit]) == {0, 1, 2}
    if groups is None:
        expected = min(max(1, round(share * per_class)), per_class - 1)
        assert np.bincount(labels[roles.score]).tolist() == [expected] * 3
    else:
        names = np.array(groups)
        parts = [set(names[rows]) for rows in roles]
        assert not any(a & b for a, b in zip(parts, [parts[1], parts[2], parts[0]], strict=True))


def test_holdout_scores_a_tenth_unless_told() -> None:
    labels = np.arange(400) % 4

    (roles,) = assign_roles(labels, None, FoldSpec(scheme="holdout"), "honest", 0)

    assert len(roles.score) == 40
