"""Plan grouped folds, where random ones would promise too much.

Images of one scene and exact copies are found before anything is trained. A probe measures what
random folds and folds that keep the groups whole promise; the recipe has grouped folds only where
the difference is more than noise, or where there are exact copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from threefold.data.dataset import ImageDataset, Sources
from threefold.data.group_file import read_groups, write_groups
from threefold.data.same_content import same_content, same_digests
from threefold.data.scene_groups import MOST_IMAGES, find_scene_groups, grouping_effect
from threefold.data.splits import assign_roles, refit_roles
from threefold.errors import DataError, RecipeError, RunError
from threefold.files import real_path
from threefold.models.member import last_level
from threefold.names import count_of
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import MemberSpec
from threefold.training.features.cache import FeatureCache
from threefold.training.planning.basis import Clock, Decision
from threefold.training.planning.image_size import ProbePlan

SEARCH_SHARE: Final = 0.1
"""Largest share of the time for comparing images with each other."""

SEARCH_SECONDS: Final = 300.0
"""Most seconds for that."""

SECONDS_PER_PAIR: Final = 5e-7
"""Seconds for a pair of images of one class, with the pairs of two classes that it is judged by."""

SECONDS_PER_EFFECT: Final = 3.0
"""Seconds to measure what groups change on as many images as it takes at most (two cores)."""

KEY: Final = "folds.scheme"


class FoundGroups(NamedTuple):
    """What the plan knows about groups."""

    groups: tuple[str, ...] | None
    """(n,) the group of each training image, if folds should keep groups whole."""
    decision: Decision | None
    """The folds with the reason; None if nobody looked."""
    compared: bool = False
    """Whether images were compared, so that the features of all members are cached."""


def look_for_groups(
    draft: Recipe,
    measured: ProbePlan,
    sources: Sources,
    cache: FeatureCache,
    clock: Clock,
    group_file: Path | None,
) -> tuple[FoundGroups, ProbePlan]:
    """Look for scenes and copies, unless the user has decided, or no file can hold their groups.

    Args:
        draft: the recipe of the probes at their sizes, with the user's overrides.
        measured: the plan of the probes.
        sources: the images.
        cache: of features.
        clock: the time budget.
        group_file: where groups can be written, or None.

    Returns:
        What was found, and the plan of the probes, less the work that the search has done already.
    """
    data, train = draft.data, sources.train
    if data.fold_column or "scheme" in draft.folds.model_fields_set:
        return FoundGroups(None, None), measured
    if train.groups is not None:
        reason = (
            f"the images have {count_of(len(set(train.groups)), 'group')}, which folds keep whole"
        )
        return FoundGroups(train.groups, Decision(KEY, "grouped", reason)), measured
    if group_file is None:
        return FoundGroups(None, None), measured
    found = find_groups(draft.members, sources, cache, clock)
    if found.compared:  # only the features of the test images are still to be computed
        left = 1 - len(train) / sources.num_images
        measured = replace(measured, images=measured.images * left)
    return found, measured


def find_groups(
    specs: Sequence[MemberSpec], sources: Sources, cache: FeatureCache, clock: Clock
) -> FoundGroups:
    """Look for scenes and copies, and measure whether they matter.

    The features of all members are computed, in one pass over the images; the run reads them again.

    Args:
        specs: the members of the run; the first one's features are compared.
        sources: the images.
        cache: of features.
        clock: the time budget.
    """
    train = sources.train
    if train.is_multilabel:
        return _group_copies(train)
    seconds = SECONDS_PER_PAIR * float((np.bincount(train.labels).astype(float) ** 2).sum())
    seconds += SECONDS_PER_EFFECT * min(1.0, len(train) / MOST_IMAGES) ** 3
    if seconds > min(SEARCH_SECONDS, SEARCH_SHARE * clock.left):
        reason = f"no scenes were looked for: to compare {len(train)} images takes {seconds:.0f} s"
        return FoundGroups(None, Decision(KEY, "stratified", reason))
    rows = np.arange(len(train))
    cache.prepare("train", specs, rows, expected=sources.num_images)
    features = cache.rows("train", specs[0], rows).features.astype(np.float32)
    if features.ndim == 4:  # maps, for a head that reads sequences
        features = features.mean((2, 3))
    elif specs[0].head.sequence == "levels":
        features = last_level(cache.backbone(specs[0]), features)
    scenes = find_scene_groups(features, train.ids, train.labels)
    copies = _exact_copies(train)
    groups = _join_copies(scenes.groups, copies)
    if len(set(groups)) == len(train):
        return FoundGroups(None, Decision(KEY, "stratified", scenes.reason), compared=True)
    try:
        effect = grouping_effect(features, train.labels, groups)
    except DataError as error:
        reason = f"{scenes.reason}; {error}"
        return FoundGroups(None, Decision(KEY, "stratified", reason), compared=True)
    reason = (
        f"{scenes.reason}; a probe promises {effect.random:.1%} with random folds and "
        f"{effect.grouped:.1%} with folds that keep groups whole"
    )
    if effect.matters:
        return FoundGroups(groups, Decision(KEY, "grouped", reason), compared=True)
    reason += ", no more than chance"
    if not copies:
        return FoundGroups(None, Decision(KEY, "stratified", reason), compared=True)
    count = sum(len(rows) for rows in copies)
    reason += f"; but {count:,} images are exact copies of each other, which share a fold"
    alone = _join_copies(train.ids, copies)
    return FoundGroups(alone, Decision(KEY, "grouped", reason), compared=True)


def plan_with_groups(
    tree: dict[str, Any],
    overrides: Sequence[str],
    found: FoundGroups,
    sources: Sources,
    group_file: Path | None,
) -> tuple[Recipe, Sources, list[Decision]]:
    """Return the planned recipe, its images and the decisions, with the groups that were found.

    Where folds of these groups are not possible, the recipe has random folds, and the decision says
    why.

    Args:
        tree: the recipe without groups, as plain values.
        overrides: `a.b=c`, applied last.
        found: what `find_groups` returned.
        sources: the images.
        group_file: written where the recipe has groups.

    Raises:
        RecipeError: an override cannot be used.
        RunError: the file cannot be written, or holds other groups.
    """
    plain = Recipe.parse(tree, overrides, where="plan")
    if plain.folds.scheme == "holdout" and found.decision is not None:
        found = found._replace(decision=found.decision._replace(value="holdout"))
    if found.groups is None or found.decision is None:
        return plain, sources, [] if found.decision is None else [found.decision]
    if tree["folds"].get("scheme") != "holdout":  # which keeps groups whole, too
        tree = tree | {"folds": tree["folds"] | {"scheme": "grouped"}}
    path = None
    if sources.train.groups is None:
        assert group_file is not None  # groups are sought only for a file
        path = real_path(group_file)
        tree |= {"data": tree["data"] | {"group_file": str(path)}}
    train = replace(sources.train, groups=found.groups)
    labels, classes = train.truth, train.classes
    try:
        recipe = Recipe.parse(tree, overrides, where="plan")
        assign_roles(labels, found.groups, recipe.folds, recipe.protocol, recipe.seed, classes)
        refit_roles(labels, found.groups, recipe.folds, recipe.seed, classes)
    except (DataError, RecipeError) as error:  # RecipeError: an override replaces a whole table
        reason = f"{found.decision.reason}; but folds cannot keep these groups whole: {error}"
        return plain, sources, [Decision(KEY, "stratified", reason)]
    if path is None:
        return recipe, sources, [found.decision]
    _write(path, train.ids, found.groups)
    decision = found.decision._replace(reason=f"{found.decision.reason}; see {path.name}")
    return recipe, replace(sources, train=train), [decision]


def _group_copies(train: ImageDataset) -> FoundGroups:
    """Group exact copies of images with any number of labels, and nothing else.

    Scenes are judged by pairs of different classes, which such images do not have.
    """
    copies = _exact_copies(train)
    reason = "scenes are not looked for where images have any number of labels"
    if not copies:
        reason = f"{reason}, and no image is an exact copy of another"
        return FoundGroups(None, Decision(KEY, "stratified", reason))
    count = sum(map(len, copies))
    reason = f"{count} images are exact copies of another; {reason}"
    return FoundGroups(_join_copies(train.ids, copies), Decision(KEY, "grouped", reason))


def _write(path: Path, ids: Sequence[str], groups: Sequence[str]) -> None:
    """Write the groups, unless the file holds others, which may be the user's."""
    if path.exists() and read_groups(path) != dict(zip(ids, groups, strict=True)):
        raise RunError(
            "a file with other groups is in the way",
            where=path,
            fix="remove it, or use it: --set data.group_file=FILE --set folds.scheme=grouped",
        )
    write_groups(path, ids, groups)


def _exact_copies(train: ImageDataset) -> list[list[int]]:
    """Return the rows of images that are equal byte for byte, one list per repeated content."""
    if train.digests is not None:
        return same_digests(train.digests)
    images = train.images
    paths = [image for image in images if isinstance(image, Path)]
    if len(paths) == len(train):
        return same_content(paths)
    return same_content((), [bytes(images[row]) for row in range(len(train))])


def _join_copies(groups: Sequence[str], copies: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Join groups that hold copies of one image; a group keeps the name of its first image's."""
    n = len(groups)
    codes = np.unique(np.asarray(groups), return_inverse=True)[1]
    content = np.arange(n)
    for rows in copies:
        content[rows] = rows[0]
    # A graph of groups and contents, in which each image is an edge.
    edges = coo_array((np.ones(n), (codes, n + content)), shape=(2 * n, 2 * n))
    parts = connected_components(edges, directed=False)[1][codes]
    first: dict[int, str] = {}
    for part, group in zip(parts, groups, strict=True):
        first.setdefault(part, group)
    return tuple(first[part] for part in parts)
