"""Leakage: planted copies and groups are found, and different images are left alone."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from threefold.data import leakage
from threefold.data.leakage import (
    GROUP_PATTERNS,
    Duplicate,
    Duplicates,
    DuplicateWarning,
    describe_guessed_groups,
    duplicate_warnings,
    find_duplicates,
    guess_group_pattern,
)
from threefold.data.load import load_data
from threefold.errors import DataError
from threefold.recipe.schema import DataSpec

LAW = settings(max_examples=40, deadline=None)


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
    duplicates = find_duplicates(images, [str(i) for i in range(440)])
    pairs = {(p.a, p.b) for p in duplicates.pairs}

    assert sum((str(row), str(400 + i)) in pairs for i, row in enumerate(rows)) > 38
    assert duplicates.total == len(pairs)


def test_photographs_that_differ_are_no_copies() -> None:
    rng = np.random.default_rng(0)
    waves = rng.normal(size=(600, 6, 6, 3))  # coarse random pictures, made larger
    images = [
        np.asarray(Image.fromarray(np.uint8(128 + 40 * w.clip(-3, 3))).resize((48, 40)))
        for w in waves
    ]

    assert find_duplicates(images, [str(i) for i in range(600)]).pairs == []


def test_equal_images_are_paired_with_the_first() -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (40, 40, 3)).astype(np.uint8)
    black, grey = np.zeros((40, 40, 3), np.uint8), np.full((40, 40, 3), 128, np.uint8)
    images = [picture, black, picture.copy(), grey, picture.copy(), black.copy()]

    duplicates = find_duplicates(
        images,
        ids=list("abcdef"),
        labels=[0, 0, 1, 0, 0, 0],
        parts=["train", "train", "train", "test", "test", "test"],
    )

    assert [tuple(p) for p in duplicates.pairs] == [
        ("a", "c", 0.0, False, True),
        ("a", "e", 0.0, True, False),
        ("b", "f", 0.0, True, False),
    ]
    assert duplicate_warnings(duplicates) == [
        DuplicateWarning(
            "3 pairs of images are equal; 2 are in two folds or splits, which makes scores too "
            "good: a = e, b = f; 1 has two labels: a = c",
            exact=True,
        )
    ]


def test_near_pairs_need_not_be_copies() -> None:
    near = Duplicates([Duplicate("a", "b", 0.004, True, False)], 1)

    assert duplicate_warnings(near) == [
        DuplicateWarning(
            "1 pair of images looks nearly the same (1 in two folds or splits), such as a and b; "
            "they need not be copies",
            exact=False,
        )
    ]
    assert duplicate_warnings(Duplicates([], 0)) == []
    assert find_duplicates([np.eye(40, dtype=np.uint8)], ["a"]) == Duplicates([], 0)


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

    plain = find_duplicates(images, ids, distance=0.0)
    permuted = find_duplicates([images[i] for i in order], [ids[i] for i in order], distance=0.0)

    assert plain.total == permuted.total == n - len({i.tobytes() for i in images})


def test_blocks_do_not_hide_pairs_and_the_closest_are_listed(
    monkeypatch: pytest.MonkeyPatch, pictures: list[np.ndarray]
) -> None:
    ids = [str(i) for i in range(400)]
    whole = find_duplicates(pictures, ids, distance=0.03)
    monkeypatch.setattr("threefold.data.leakage._BLOCK", 37)

    parts = find_duplicates(pictures, ids, distance=0.03)

    assert parts.total == whole.total > 5
    assert {p[:2] for p in parts.pairs} == {p[:2] for p in whole.pairs}

    few = find_duplicates(pictures, ids, distance=0.03, limit=4, parts=[i % 2 for i in range(400)])

    assert few.total == whole.total
    assert [p[:2] for p in few.pairs] == [p[:2] for p in parts.pairs[:4]]
    assert [p.distance for p in parts.pairs] == sorted(p.distance for p in parts.pairs)
    assert not any(
        "two folds" in note.message and " of those listed in" not in note.message
        for note in duplicate_warnings(few)
    )


@LAW
@given(seed=st.integers(0, 999), block=st.sampled_from([7, 64, 1024]))
def test_sorted_blocks_find_the_pairs_of_the_whole_matrix(seed: int, block: int) -> None:
    """Against the plain product of all rows with all rows."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, 63))
    features = centres[rng.integers(0, 20, 150)] + rng.normal(0, 0.08, (150, 63))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    features[::11] = 0
    features = features.astype(np.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leakage, "_BLOCK", block)
        pairs, count = leakage._near_pairs(features, 0.01, 10_000)

    distances = 1 - features @ features.T
    expected = {(a, b) for a, b in np.argwhere(np.triu(distances <= 0.01, 1)).tolist()}
    # Rounding depends on the size of a block: pairs at the limit itself may differ.
    near_limit = {(a, b) for a, b in np.argwhere(abs(distances - 0.01) < 1e-6).tolist()}
    assert {pair[:2] for pair in pairs} - near_limit == expected - near_limit
    assert count == len(pairs) > 0
    assert [pair[2] for pair in pairs] == sorted(pair[2] for pair in pairs)


def test_bad_images_and_columns_are_refused() -> None:
    good = np.zeros((4, 4), np.uint8)

    with pytest.raises(
        DataError,
        match=r"not an image: b; expected uint8 \(h, w\) or \(h, w, 3\), got float64 \(4, 4\)",
    ):
        find_duplicates([good, good * 1.0], ["a", "b"])
    with pytest.raises(DataError, match="not an image: a; expected at least one pixel"):
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

    pattern = guess_group_pattern(ids)

    assert pattern is not None

    groups = [match.group(1) for name in ids if (match := re.search(pattern, name))]

    assert len(groups) == len(ids)
    assert groups[0] == first
    assert len(set(groups)) == number
    assert describe_guessed_groups(ids, pattern)[1] == number


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
    assert guess_group_pattern(names(template)) is None


def test_a_guess_needs_every_id_and_fits_the_recipe() -> None:
    ids = names("{c}/patient{g:02d}_{i:03d}.jpg")

    assert guess_group_pattern(ids) == GROUP_PATTERNS[0]
    assert guess_group_pattern([*ids, "cat/other.jpg"]) is None
    assert guess_group_pattern([]) is None
    assert DataSpec(source="demo", group_regex=GROUP_PATTERNS[0]).group_regex == GROUP_PATTERNS[0]
