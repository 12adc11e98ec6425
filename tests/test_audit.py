"""Planted label errors, copies and groups are found; what is in order is left in peace; nothing is edited."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from threefold.audit import (
    PATTERNS,
    Duplicate,
    Duplicates,
    Suspect,
    duplicate_warnings,
    find_duplicates,
    find_suspects,
    guess_groups,
    guess_pattern,
    write_duplicates,
    write_suspects,
)
from threefold.datasets import load_data
from threefold.errors import DataError, RunError
from threefold.predictions import Predictions
from threefold.recipe_schema import DataSpec

LAW = settings(max_examples=40, deadline=None)


def flipped_world(
    seed: int = 0, n: int = 400, flips: int = 20, members: int = 3
) -> tuple[Predictions, np.ndarray]:
    """Members that mostly see the true class, and labels of which some were flipped."""
    rng = np.random.default_rng(seed)
    truth, names = rng.integers(0, 4, n), ("ant", "bee", "cat", "dog")
    labels, rows = truth.copy(), rng.choice(n, flips, replace=False)
    labels[rows] = (truth[rows] + rng.integers(1, 4, flips)) % 4
    logits = 5 * np.eye(4)[truth] + rng.normal(0, 1.2, (members, n, 4))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ids = tuple(f"{names[y]}/{i:04d}.jpg" for i, y in enumerate(labels))
    made = Predictions(
        probs, labels, ids, names, tuple(f"m{i}" for i in range(members)), kind="oof"
    )
    return made, rows


def test_planted_label_errors_are_found_first() -> None:
    predictions, rows = flipped_world()
    before = predictions.labels.copy()
    suspects = find_suspects(predictions)
    planted = {predictions.ids[row] for row in rows}
    found = [s.id in planted for s in suspects]
    assert sum(found) >= 16
    assert np.mean(found[:15]) == 1
    assert len(suspects) < 40
    assert [s.score for s in suspects] == sorted(s.score for s in suspects)
    assert (predictions.labels == before).all()
    assert find_suspects(predictions, 5) == suspects[:5]


def test_a_contradiction_alone_is_no_suspicion() -> None:
    """How many are suspect is cleanlab's answer, fewer than the rows where the ensemble says another class."""
    from cleanlab.filter import find_label_issues

    for seed in range(3):
        rng = np.random.default_rng(seed)
        truth = rng.integers(0, 3, 300)
        seen = np.where(rng.random(300) < 0.05, (truth + 1) % 3, truth)
        logits = 2.5 * np.eye(3)[seen] + rng.normal(0, 1, (2, 300, 3))
        probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        rows = Predictions(probs, truth, tuple(map(str, range(300))), ("a", "b", "c"), ("m", "o"))
        suspects = find_suspects(rows)
        theirs = find_label_issues(truth, probs.mean(0), n_jobs=1)
        assert {int(s.id) for s in suspects} == set(np.flatnonzero(theirs))
        assert 0 < len(suspects) < (probs.mean(0).argmax(1) != truth).sum()


def test_the_reason_says_who_says_what() -> None:
    probs = np.tile(np.array([[0.7, 0.3], [0.3, 0.7]]), (1, 15, 1)).repeat(3, 0)
    labels = np.array([0, 1] * 15)
    probs[:, 4], probs[2, 4] = [0.02, 0.98], [0.55, 0.45]
    for kind, who in (("oof", "the ensemble that never saw it"), ("foreign", "the ensemble")):
        rows = Predictions(
            probs, labels, tuple(map(str, range(30))), ("cat", "dog"), ("a", "b", "c"), kind=kind
        )  # type: ignore[arg-type]
        (suspect,) = find_suspects(rows)
        assert suspect[:3] == ("4", "cat", "dog")
        assert suspect.score == pytest.approx((0.02 + 0.02 + 0.55) / 3, abs=1e-4)
        assert suspect.reason == f"labelled cat; {who} says dog with 0.80; 2 of 3 members agree"


@LAW
@given(seed=st.integers(0, 999), n=st.integers(2, 40), k=st.integers(2, 6))
def test_any_predictions_can_be_audited(seed: int, n: int, k: int) -> None:
    """Also few rows, classes without rows, exact zeros: no suspect agrees with its label, none is listed twice."""
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(k, 0.3), (2, n)).round(2)
    probs[..., 0] += 1 - probs.sum(-1)
    probs = probs.clip(min=0) / probs.clip(min=0).sum(-1, keepdims=True)
    names = tuple(map(str, range(k)))
    rows = Predictions(probs, rng.integers(0, k, n), tuple(map(str, range(n))), names, ("a", "b"))
    suspects = find_suspects(rows)
    assert all(s.label != s.suggested for s in suspects)
    assert len({s.id for s in suspects}) == len(suspects)


def test_nothing_is_suspect_where_all_is_sure_and_right_or_one_class_is_left() -> None:
    labels = np.array([0, 1, 2] * 10)
    probs = (0.94 * np.eye(3) + 0.02)[labels][None]
    names, ids = ("a", "b", "c"), tuple(map(str, range(30)))
    assert find_suspects(Predictions(probs, labels, ids, names, ("m",))) == []
    assert find_suspects(Predictions(probs, np.zeros(30, int), ids, names, ("m",))) == []


def test_the_ensembles_own_probabilities_are_used_where_given() -> None:
    predictions, _ = flipped_world()
    sure = 0.96 * np.eye(4)[predictions.labels] + 0.01
    assert find_suspects(predictions, probs=sure) == []
    with pytest.raises(
        DataError, match=r"of other rows or classes; expected \(400, 4\), got \(399, 4\)"
    ):
        find_suspects(predictions, probs=sure[1:])
    with pytest.raises(DataError, match="the limit is 1 or more; got 0"):
        find_suspects(predictions, 0)


def test_without_cleanlab_the_command_that_installs_it_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab", None)
    monkeypatch.delitem(sys.modules, "cleanlab.filter", raising=False)
    with pytest.raises(
        RunError,
        match=r"need cleanlab, which is not installed; fix: pip install 'threefold\[audit\]'",
    ):
        find_suspects(flipped_world()[0])


def test_suspects_are_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "suspects.csv"
    write_suspects(path, [Suspect('a, "b".jpg', "Café", "dog", 0.0123456789, "because")])
    with open(path, encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["id", "label", "suggested", "score", "reason"],
            ['a, "b".jpg', "Café", "dog", "0.0123457", "because"],
        ]


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Four hundred packaged images of different things."""
    return list(np.asarray(load_data(DataSpec(source="demo"), 0).train.images)[::7][:400])


def changed(image: np.ndarray, how: str) -> np.ndarray:
    """The image as another file would hold it."""
    picture = Image.fromarray(image)
    if how == "jpeg":
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=60)
        return np.asarray(Image.open(buffer))
    if how == "larger":
        return np.asarray(picture.resize((56, 56), Image.Resampling.BICUBIC))
    if how == "colour":
        return np.asarray(picture.convert("RGB"))
    return (image * 0.8 + 10).astype(np.uint8)


@pytest.mark.parametrize("how", ["jpeg", "larger", "colour", "darker"])
def test_planted_near_copies_are_found(pictures: list[np.ndarray], how: str) -> None:
    """More than 95 % of forty, wherever they are."""
    rows = np.arange(0, 400, 10)
    images = pictures + [changed(pictures[row], how) for row in rows]
    found = find_duplicates(images, [str(i) for i in range(440)])
    pairs = {(p.a, p.b) for p in found.pairs}
    assert sum((str(row), str(400 + i)) in pairs for i, row in enumerate(rows)) > 38
    assert found.found == len(pairs)


def test_photographs_that_differ_are_no_copies() -> None:
    rng = np.random.default_rng(0)
    waves = rng.normal(size=(600, 6, 6, 3))  # coarse random pictures, made larger
    images = [
        np.asarray(Image.fromarray(np.uint8(128 + 40 * w.clip(-3, 3))).resize((48, 40)))
        for w in waves
    ]
    assert find_duplicates(images, [str(i) for i in range(600)]).pairs == []


def test_equal_images_are_paired_with_the_first_and_flat_ones_are_not_near() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
    black, grey = np.zeros((40, 40, 3), np.uint8), np.full((40, 40, 3), 128, np.uint8)
    images = [picture, black, picture.copy(), grey, picture.copy(), black.copy()]
    found = find_duplicates(
        images,
        list("abcdef"),
        [0, 0, 1, 0, 0, 0],
        ["train", "train", "train", "test", "test", "test"],
    )
    assert [tuple(p) for p in found.pairs] == [
        ("a", "c", 0.0, False, True),
        ("a", "e", 0.0, True, False),
        ("b", "f", 0.0, True, False),
    ]
    notes = duplicate_warnings(found)
    assert notes == [
        "3 pairs of images are equal; 2 are in two folds or splits, which makes scores too good: a = e, b = f; 1 have two labels: a = c"
    ]
    near = Duplicates([Duplicate("a", "b", 0.004, True, False)], 1)  # near is not always the same
    assert duplicate_warnings(near) == [
        "1 pairs of images look nearly the same, which need not be copies; 1 are in two folds or splits, look at them: a = b"
    ]
    assert duplicate_warnings(find_duplicates([picture], ["a"])) == []


@LAW
@given(seed=st.integers(0, 999), n=st.integers(1, 12))
def test_the_pairs_do_not_depend_on_the_order_of_the_images(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (3, 12, 12)).astype(np.uint8)
    images = [
        base[i] ^ np.uint8(b)
        for i, b in zip(rng.integers(0, 3, n), rng.integers(0, 3, n), strict=True)
    ]
    ids = [f"{i}" for i in range(n)]
    order = rng.permutation(n)
    one = find_duplicates(images, ids, distance=0.0)
    two = find_duplicates([images[i] for i in order], [ids[i] for i in order], distance=0.0)
    assert one.found == two.found == n - len({i.tobytes() for i in images})


def test_blocks_do_not_hide_pairs_and_the_closest_are_listed(
    monkeypatch: pytest.MonkeyPatch, pictures: list[np.ndarray]
) -> None:
    ids = [str(i) for i in range(400)]
    whole = find_duplicates(pictures, ids, distance=0.03)
    monkeypatch.setattr("threefold.audit._BLOCK", 37)
    parts = find_duplicates(pictures, ids, distance=0.03)
    assert parts.found == whole.found > 5
    assert {p[:2] for p in parts.pairs} == {p[:2] for p in whole.pairs}
    few = find_duplicates(pictures, ids, distance=0.03, limit=4, parts=[i % 2 for i in range(400)])
    assert few.found == whole.found
    assert [p[:2] for p in few.pairs] == [p[:2] for p in parts.pairs[:4]]
    assert [p.distance for p in parts.pairs] == sorted(p.distance for p in parts.pairs)
    assert not any(
        "two folds" in note and " of those listed are in" not in note
        for note in duplicate_warnings(few)
    )


def test_duplicates_are_a_csv_file(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (9, 9)).astype(np.uint8)
    write_duplicates(
        tmp_path / "d.csv", find_duplicates([picture, picture], ["x", "y"], labels=["one", "two"])
    )
    assert (tmp_path / "d.csv").read_text().splitlines() == [
        "a,b,distance,same_label,same_part",
        "x,y,0,False,",
    ]


def test_bad_images_and_columns_are_told_in_one_line() -> None:
    good = np.zeros((4, 4), np.uint8)
    with pytest.raises(
        DataError,
        match=r"not an image: b; expected uint8 \(h, w\) or \(h, w, 3\), got float64 \(4, 4\)",
    ):
        find_duplicates([good, good * 1.0], ["a", "b"])
    with pytest.raises(DataError, match="not an image: a; expected one pixel at least"):
        find_duplicates([good[:0]], ["a"])
    with pytest.raises(DataError, match="images do not match the ids; expected 2, got 1"):
        find_duplicates([good], ["a", "b"])
    with pytest.raises(DataError, match="images do not match the ids; expected 1, got more"):
        find_duplicates([good, good], ["a"])
    with pytest.raises(DataError, match="labels do not match the ids; expected 1, got 2"):
        find_duplicates([good], ["a"], [0, 1])
    with pytest.raises(DataError, match=r"0 to 0\.5; got 2"):
        find_duplicates([good], ["a"], distance=2)
    with pytest.raises(DataError, match="the limit is 1 or more; got 0"):
        find_duplicates([good], ["a"], limit=0)
    assert find_duplicates([], []).pairs == []


def names(
    template: str, groups: int = 6, each: int = 4, classes: tuple[str, ...] = ("cat", "dog")
) -> list[str]:
    return [
        template.format(c=c, g=g, letter="ABCDEFGHIJ"[g], i=i, n=g * each + i)
        for c in classes
        for g in range(groups)
        for i in range(each)
    ]


@pytest.mark.parametrize(
    ("template", "first", "number"),
    [
        ("{c}/patient{g:02d}_{i:03d}.jpg", "patient00", 6),
        ("{c}/{i:03d}_Subject-{g}.png", "Subject-0", 6),
        ("{c}/IMG_{letter}_{i}.jpg", "IMG_A", 6),
        ("{c}/leaf{letter} ({i}).jpg", "leafA", 6),
        ("{c}/tree{letter}/{i}.jpg", "treeA", 6),
        ("train/{c}/plot {letter}-{i}.jpg", "plot A", 6),
    ],
)
def test_groups_are_guessed_from_numbering(template: str, first: str, number: int) -> None:
    ids = names(template)
    groups = guess_groups(ids)
    assert groups is not None
    assert list(groups) == ids
    assert groups[ids[0]] == first
    assert len(set(groups.values())) == number


@pytest.mark.parametrize(
    "template",
    [
        "{c}/{n:04d}.jpg",
        "{c}/{c}_{n:03d}.jpg",
        "{c}/IMG_{n:04d}.JPG",
        "{c}/x{letter}{g}{i}y.png",
        "train/{n:05d}",
        "{c}/{c}.{n}.jpg",
    ],
)
def test_plain_counters_and_class_names_are_no_groups(template: str) -> None:
    assert guess_groups(names(template)) is None


def test_a_guess_needs_every_id_and_fits_the_recipe() -> None:
    ids = names("{c}/patient{g:02d}_{i:03d}.jpg")
    assert guess_pattern(ids) == PATTERNS[0]
    assert guess_pattern([*ids, "cat/other.jpg"]) is None
    assert guess_groups([]) is None
    assert DataSpec(source="demo", group_regex=PATTERNS[0]).group_regex == PATTERNS[0]
