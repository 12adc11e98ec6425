"""Do random folds promise too much, and do folds grouped by the scenes that are found keep theirs?

    uv run python bench/leakage_groups.py FOLDER [FOLDER ...] [--img-size 160] [--burst 4]
        [--originals 150]

Each FOLDER has train/CLASS and test/CLASS; bench/development_sets.py writes such folders. A probe
(logistic regression on features of a frozen EfficientNet-Lite0, its penalty chosen on select rows,
as in `threefold fit --quality fast`) is cross-validated on the training images in five folds: once
with random folds, and once with folds that keep the groups of `find_scene_groups` whole. A probe of
all training images then answers the test images, which is the truth. Each set has two rows, with
its file names and with random ones, which have no order.

With --burst K a leak is made on purpose: at most --originals training images, each as K
photographs of one scene (a random crop, brightness and noise), and 400 test images, each as one.

Printed as a table: images that share a group, the share of true pairs among the linked ones where
`development_sets.SETS` knows the true groups, and for both kinds of folds the promise with its
interval, the accuracy on the test images, and whether the interval covers it; then what a plan
takes. A test part that was drawn at random shares scenes with the training images: under "scenes
unseen" the probe has learned without the training images that look like the scene of a test image,
and "covers" refers to it. Test images are a sample as well, so even a perfect interval misses their
accuracy now and then.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from development_sets import SETS
from torchvision.transforms import v2

from threefold.data.dataset import ImageDataset, Sources
from threefold.data.load import load_data
from threefold.data.scene_groups import SceneGroups, find_scene_groups, grouping_effect
from threefold.data.splits import Roles, assign_roles, refit_roles
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import DataSpec, FoldSpec
from threefold.stats.scores import share_interval
from threefold.training.features.cache import FeatureCache
from threefold.training.features.probe import Targets, choose_l2, fit_linear
from threefold.training.planning.measure import spread_over_classes
from threefold.training.provenance import commit, hardware

COLUMNS = (
    "set",
    "together",
    "true pairs",
    *(
        f"{folds}: {column}"
        for folds in ("random", "grouped")
        for column in ("promise", "test", "scenes unseen", "covers")
    ),
    "plan",
)

TEST_ROWS = 400
"""Most test images beside bursts."""


class Promise(NamedTuple):
    """Accuracy of out-of-fold answers with its interval."""

    accuracy: float
    interval: tuple[float, float]

    def covers(self, truth: float) -> str:
        """Say whether the interval contains the truth."""
        return "yes" if self.interval[0] <= truth <= self.interval[1] else "no"

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} [{self.interval[0]:.3f}, {self.interval[1]:.3f}]"


class Features(NamedTuple):
    """Features and labels of both parts of a set, and the names of its training images."""

    train: np.ndarray
    labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray
    ids: tuple[str, ...]


def extract(sources: Sources, img_size: int) -> Features:
    """Answer all images of a set by the frozen backbone."""
    tree = {
        "data": {"root": "."},
        "stages": [{"name": "head", "kind": "head"}],
        "members": [
            {"name": "lite0", "backbone": "tf_efficientnet_lite0.in1k", "img_size": img_size}
        ],
    }
    recipe = Recipe.parse(tree)
    assert sources.test is not None
    cache = FeatureCache(sources, recipe)
    train = cache.rows("train", recipe.members[0], np.arange(len(sources.train)))
    test = cache.rows("test", recipe.members[0], np.arange(len(sources.test)))
    ids = sources.train.ids
    return Features(train.features, train.labels, test.features, test.labels, ids)


def answer(set_: Features, roles: Roles, rows: np.ndarray) -> np.ndarray:
    """Fit a probe on the fit rows, choose its penalty on the select rows, and answer other rows.

    Args:
        set_: the set.
        roles: of one fold.
        rows: (m, d) features to answer.
    """
    classes = int(set_.labels.max()) + 1
    targets = Targets(set_.labels[roles.fit], classes)
    chosen = choose_l2(
        set_.train[roles.fit], targets, set_.train[roles.select], set_.labels[roles.select]
    )
    seen = np.concatenate([roles.fit, roles.select])
    head = fit_linear(set_.train[seen], Targets(set_.labels[seen], classes), chosen.head.l2)
    return np.asarray(head.probs(rows).argmax(1))


def promise(set_: Features, groups: Sequence[str] | None) -> Promise:
    """Cross-validate a probe, with random folds (no groups) or with grouped ones."""
    spec = FoldSpec(scheme="stratified" if groups is None else "grouped")
    hits = np.zeros(len(set_.labels), bool)
    for roles in assign_roles(set_.labels, groups, spec, "honest", 0):
        answers = answer(set_, roles, set_.train[roles.score])
        hits[roles.score] = answers == set_.labels[roles.score]
    return Promise(float(hits.mean()), share_interval(hits, groups))


def truth(set_: Features, groups: Sequence[str] | None) -> float:
    """Accuracy on the test images of a probe fitted on all training images.

    Args:
        set_: the set.
        groups: (n,) kept whole where the penalty is chosen, or None.
    """
    spec = FoldSpec(scheme="stratified" if groups is None else "grouped")
    roles = refit_roles(set_.labels, groups, spec, 0)
    return float((answer(set_, roles, set_.test) == set_.test_labels).mean())


def unshared_rows(set_: Features) -> np.ndarray:
    """Return the training rows that do not look like the scene of a test image."""
    n = len(set_.labels)
    features = np.concatenate([set_.train, set_.test])
    labels = np.concatenate([set_.labels, set_.test_labels])
    names = without_order([f"x/{row}" for row in range(len(labels))])
    groups = np.array(find_scene_groups(features, names, labels).groups)
    return np.flatnonzero(~np.isin(groups[:n], groups[n:]))


def cells(set_: Features, unshared: np.ndarray, groups: Sequence[str] | None) -> list[str]:
    """Promise, truth, truth without shared scenes, and whether the interval covers the latter."""
    made = promise(set_, groups)
    part = set_._replace(train=set_.train[unshared], labels=set_.labels[unshared])
    part_groups = None if groups is None else [groups[row] for row in unshared]
    actual = truth(part, part_groups)
    return [str(made), f"{truth(set_, groups):.3f}", f"{actual:.3f}", made.covers(actual)]


def without_order(ids: Sequence[str]) -> list[str]:
    """Names of the same folders whose order says nothing."""
    return [f"{Path(name).parent}/{hashlib.sha256(name.encode()).hexdigest()[:12]}" for name in ids]


def true_pairs(found: SceneGroups, true: Sequence[str] | None) -> str:
    """Share of the pairs that share a found group that also share a true one."""
    if true is None:
        return ""
    same = np.array(found.groups)[:, None] == np.array(found.groups)
    np.fill_diagonal(same, False)
    if not same.any():
        return ""
    both = same & (np.array(true)[:, None] == np.array(true))
    return f"{both.sum() / same.sum():.0%}"


def photograph(part: ImageDataset, rows: np.ndarray, shots: int, side: int) -> ImageDataset:
    """Show some images as photographs of their scenes, numbered in order; a group is a scene.

    Args:
        part: the images.
        rows: row numbers.
        shots: photographs of each scene.
        side: of the photographs, pixels.
    """
    shake = v2.Compose(
        [
            v2.RandomResizedCrop(side, scale=(0.6, 1.0), ratio=(0.9, 1.1), antialias=True),
            v2.ColorJitter(brightness=0.3, contrast=0.2),
        ]
    )
    rows = rows[np.argsort(part.labels[rows], kind="stable")]
    images, ids = [], []
    for row in rows:
        pixels = torch.from_numpy(part.pixels(int(row))).permute(2, 0, 1)
        for _ in range(shots):
            shot = shake(pixels).float() + torch.randn(3, side, side) * 5
            images.append(shot.clamp(0, 255).byte().permute(1, 2, 0).numpy())
            ids.append(f"{part.classes[part.labels[row]]}/IMG_{len(ids):05d}.jpg")
    scenes = tuple(f"scene{row}" for row in np.repeat(rows, shots))
    labels = np.repeat(part.labels[rows], shots)
    return ImageDataset(np.stack(images), labels, tuple(ids), part.classes, scenes)


def burst(sources: Sources, shots: int, originals: int, side: int) -> Sources:
    """Show a part of the training images several times, and a part of the test images once."""
    assert sources.test is not None
    torch.manual_seed(0)
    rows = spread_over_classes(sources.train.labels, originals)
    test_rows = spread_over_classes(sources.test.labels, TEST_ROWS)
    train = photograph(sources.train, rows, shots, side)
    return replace(sources, train=train, test=photograph(sources.test, test_rows, 1, side))


def table_rows(
    name: str, set_: Features, true: Sequence[str] | None, unshared: np.ndarray
) -> list[tuple[str, ...]]:
    """Two rows of the table: with the file names of a set, and without their order."""
    random = cells(set_, unshared, None)
    rows = []
    for label, ids in ((name, set_.ids), (f"{name}, names ignored", without_order(set_.ids))):
        found = find_scene_groups(set_.train, ids, set_.labels)
        effect = grouping_effect(set_.train, set_.labels, found.groups)
        together = f"{found.together} of {len(ids)}"
        grouped = cells(set_, unshared, found.groups) if found.together else [""] * len(random)
        plan = "grouped" if effect.matters else "random"
        rows.append((label, together, true_pairs(found, true), *random, *grouped, plan))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--img-size", type=int, default=160)
    parser.add_argument("--burst", type=int, default=0)
    parser.add_argument("--originals", type=int, default=150)
    arguments = parser.parse_args()
    print(f"{hardware()}, commit {commit()}, {arguments.img_size} px")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for folder in arguments.folders:
        name = folder.name
        sources = load_data(DataSpec(root=str(folder)), 0)
        known = SETS.get(name)
        true = known.groups([Path(i).name for i in sources.train.ids]) if known else None
        if arguments.burst:
            sources = burst(sources, arguments.burst, arguments.originals, arguments.img_size)
            true, name = sources.train.groups, f"{name}, bursts of {arguments.burst}"
        set_ = extract(sources, arguments.img_size)
        # The scenes of photographs made here are known: none is in both parts.
        unshared = np.arange(len(set_.labels)) if arguments.burst else unshared_rows(set_)
        for row in table_rows(name, set_, true, unshared):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
