"""Groups of one scene: found where there are some, and not where images are independent."""

from __future__ import annotations

import numpy as np
import pytest

from threefold.data.scene_groups import find_scene_groups, grouping_effect
from threefold.errors import DataError

CLASSES, WIDTH = 3, 64


def independent(n: int, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Features (3 n, 64) and labels of n images of each class, around a centre of the class."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), n)
    centres = rng.normal(0, spread, (CLASSES, WIDTH))
    return centres[labels] + rng.normal(0, 1, (len(labels), WIDTH)), labels


def bursts(scenes: int, shots: int, seed: int, noise: float = 0.5):
    """Features, labels and true scenes of `shots` photographs of each scene."""
    features, labels = independent(scenes, seed, spread=0.1)
    rows = np.repeat(np.arange(len(labels)), shots)
    shaken = features[rows] + np.random.default_rng(seed + 1).normal(0, noise, (len(rows), WIDTH))
    return shaken, labels[rows], rows


def hashed(n: int, seed: int = 0) -> list[str]:
    """Names without an order."""
    return [f"photos/{name:08x}.jpg" for name in np.random.default_rng(seed).permutation(10**6)[:n]]


@pytest.mark.parametrize("seed", range(5))
def test_independent_images_give_next_to_no_groups(seed: int) -> None:
    features, labels = independent(60, seed)
    ids = [f"{label}/{row:04d}.jpg" for row, label in enumerate(labels)]

    found = find_scene_groups(features, ids, labels)

    assert found.together <= 0.03 * len(ids)


@pytest.mark.parametrize("shots", [2, 4])
def test_bursts_are_found_without_names(shots: int) -> None:
    features, labels, scenes = bursts(20, shots, 0)
    order = np.random.default_rng(0).permutation(len(labels))
    features, labels, scenes = features[order], labels[order], scenes[order]

    groups = np.array(find_scene_groups(features, hashed(len(labels)), labels).groups)

    found, true = (names[:, None] == names for names in (groups, scenes))
    off_diagonal = ~np.eye(len(scenes), dtype=bool)
    assert (found & true & off_diagonal).sum() >= 0.9 * (true & off_diagonal).sum()
    assert (found & true & off_diagonal).sum() >= 0.95 * (found & off_diagonal).sum()


def test_weak_likeness_counts_between_neighbours_in_file_order() -> None:
    """Photographs of one scene that are hardly alike, under numbers and under random names."""
    features, labels, scenes = bursts(12, 6, 0, noise=1.5)
    numbered = [f"{label}/IMG_{row:04d}.jpg" for row, label in enumerate(labels)]

    with_order = find_scene_groups(features, numbered, labels)
    without = find_scene_groups(features, hashed(len(labels)), labels)

    found = np.array(with_order.groups)[:, None] == with_order.groups
    true = scenes[:, None] == scenes
    assert (found & true).sum() >= 0.7 * true.sum()
    assert with_order.links > 3 * without.links


def test_scenes_with_several_classes_are_found_by_the_numbers() -> None:
    """A session of six photographs, two of each class, numbered through the class folders."""
    rng = np.random.default_rng(0)
    sessions = np.repeat(np.arange(20), 6)
    labels = np.tile([0, 1, 2, 0, 1, 2], 20)
    features = rng.normal(0, 1, (20, WIDTH))[sessions] + rng.normal(0, 0.5, (120, WIDTH))
    ids = [f"{label}/{row:03d}.jpg" for row, label in enumerate(labels)]

    groups = np.array(find_scene_groups(features, ids, labels).groups)

    found, true = (names[:, None] == names for names in (groups, sessions))
    assert (found & true).sum() >= 0.8 * true.sum()


def test_no_group_has_more_than_a_quarter_of_a_class() -> None:
    """A film: each frame is like the one before, so that links join a whole class."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 80)
    features = np.cumsum(rng.normal(0, 1, (160, WIDTH)), axis=0)
    ids = [f"{label}/{row:04d}.jpg" for row, label in enumerate(labels)]

    found = find_scene_groups(features, ids, labels)

    names, codes = np.unique(found.groups, return_inverse=True)
    assert found.largest > 1
    for label in (0, 1):
        assert np.bincount(codes[labels == label], minlength=len(names)).max() <= 20


def test_groups_do_not_depend_on_the_order_of_the_rows() -> None:
    features, labels, _ = bursts(15, 3, 2)
    ids = [f"{label}/{row:04d}.jpg" for row, label in enumerate(labels)]
    order = np.random.default_rng(1).permutation(len(ids))
    first = find_scene_groups(features, ids, labels).groups

    second = find_scene_groups(features[order], [ids[row] for row in order], labels[order]).groups

    a = np.array(first)[order]
    agreement = (a[:, None] == a) == (np.array(second)[:, None] == np.array(second))
    assert agreement.mean() > 0.995  # the other classes to compare with are drawn by position


def test_random_folds_promise_more_where_scenes_repeat() -> None:
    features, labels, scenes = bursts(20, 4, 0)

    effect = grouping_effect(features, labels, [str(scene) for scene in scenes])

    assert effect.random > effect.grouped + 0.3
    assert effect.matters


def test_groups_that_mean_nothing_change_nothing() -> None:
    features, labels = independent(60, 0, spread=0.3)
    groups = [str(row % 45) for row in range(len(labels))]

    effect = grouping_effect(features, labels, groups)

    assert abs(effect.random - effect.grouped) < 3 * effect.standard_error + 0.01
    assert not effect.matters


def test_flat_and_few_features_are_no_error() -> None:
    labels = np.array([0, 0, 1, 1])

    found = find_scene_groups(np.zeros((4, 2)), list("abcd"), labels)

    assert found.groups == ("a", "b", "c", "d")
    assert (found.links, found.together, found.largest) == (0, 0, 1)
    assert "none of 4 images" in found.reason


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (np.zeros((3, 2)), "features do not match the images"),
        (np.zeros(4), "features do not match the images"),
        (np.full((4, 2), np.nan), "not finite"),
    ],
)
def test_bad_features_are_one_line(features: np.ndarray, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        find_scene_groups(features, list("abcd"), np.array([0, 0, 1, 1]))
    with pytest.raises(DataError, match=expected):
        grouping_effect(features, np.array([0, 0, 1, 1]), list("abcd"))


def test_an_effect_needs_two_images_of_two_classes() -> None:
    with pytest.raises(DataError, match="2 images of 2 classes"):
        grouping_effect(np.zeros((3, 2)), np.array([0, 0, 1]), list("abc"))
