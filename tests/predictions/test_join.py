"""Predictions are joined by row ids and class names; what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.predictions import are_equal, make_predictions, predictions

from threefold.errors import DataError
from threefold.predictions.join import join_predictions
from threefold.predictions.predictions import Predictions


def other(**changes: Any) -> Predictions:
    return make_predictions(**{"members": ("x", "y"), **changes})


def without_ids(rows: Predictions, **changes: Any) -> Predictions:
    return replace(rows, ids=tuple(f"row{i:04d}" for i in range(len(rows))), **changes)


def reordered(rows: Predictions, order: list[int]) -> Predictions:
    """The classes in another order."""
    return replace(
        rows,
        probs=rows.probs[:, :, order],
        labels=np.argsort(order)[rows.labels],
        classes=tuple(rows.classes[i] for i in order),
    )


@settings(max_examples=60, deadline=None)
@given(original=predictions(), data=st.data())
def test_joining_parts_restores_the_whole(original: Predictions, data: Any) -> None:
    parts = []
    for i, name in enumerate(original.members):
        part = original.select([name])
        if i:
            part = part.rows(data.draw(st.permutations(range(len(original)))))
            part = reordered(part, data.draw(st.permutations(range(len(original.classes)))))
        parts.append(part)

    assert are_equal(join_predictions(parts), original)


def test_one_part_is_itself_and_none_is_refused() -> None:
    part = make_predictions()

    assert join_predictions([part]) is part
    refused("there are no predictions to join")


def refused(message: str, *parts: Predictions) -> None:
    with pytest.raises(DataError, match=message) as caught:
        join_predictions(parts)
    assert "\n" not in str(caught.value)


def test_files_without_ids_are_matched_by_order_and_labels() -> None:
    named, bare = make_predictions(), without_ids(other())

    for parts in ([named, bare], [bare, named]):
        joined = join_predictions(parts)
        assert joined.ids == named.ids
        assert (joined.probs[parts.index(bare) * 2] == bare.probs[0]).all()

    assert join_predictions([without_ids(make_predictions()), bare]).ids[0] == "row0000"
    refused(
        "lengths differ: x, y; expected 6 rows as in net0, net1, got 5",
        named,
        without_ids(other(n=5)),
    )
    refused("lengths differ", without_ids(make_predictions()), without_ids(other(n=5)))
    refused(
        r"two labels: train/0.png \(6 of 6 rows\).*expected a.*got b.*save ids",
        named,
        without_ids(other(labels=(np.arange(6) + 1) % 3)),
    )
    refused(
        "two labels",
        without_ids(make_predictions()),
        without_ids(other(labels=(np.arange(6) + 1) % 3)),
    )


def test_files_without_ids_need_one_order_of_the_others() -> None:
    turned = other().rows([3, 4, 5, 0, 1, 2])  # the labels are the same in this order

    assert (turned.labels == make_predictions().labels).all()
    assert join_predictions([make_predictions(), turned]).ids == make_predictions().ids

    third = without_ids(make_predictions(members=("p", "q")))

    refused(
        "in different orders.*p, q; expected the order of net0, net1, got another order in x, y",
        make_predictions(),
        turned,
        third,
    )


def test_ids_that_look_like_default_ids_are_matched() -> None:
    bare = without_ids(make_predictions())

    turned = without_ids(other()).rows([3, 4, 5, 0, 1, 2])

    for parts in ([bare, turned], [turned, bare]):
        joined = join_predictions(parts)
        at = joined.ids.index("row0001")
        for member, row in (("net0", bare.probs[0, 1]), ("x", turned.probs[0, 4])):
            assert (joined.probs[joined.members.index(member), at] == row).all()


def test_missing_and_surplus_ids_are_counted_and_named() -> None:
    refused(
        r"rows are not the same: x, y; expected the 6 ids of net0, net1, "
        r"got 2 missing, the first is train/1.png",
        make_predictions(),
        other().rows([0, 2, 4, 5]),
    )
    refused(
        "got 2 surplus, the first is train/1.png", make_predictions().rows([0, 2, 4, 5]), other()
    )
    refused(
        "6 missing, the first is train/0.png and 6 surplus, the first is u",
        make_predictions(),
        other(ids=tuple("uvwxyz")),
    )


def test_other_classes_are_refused_with_the_nearest() -> None:
    first = make_predictions(classes=("cat", "dog", "cow"))

    refused(
        "class names differ: x, y; expected 3 classes as in net0, net1, nearest cow, "
        "got 3 classes, among them Cow",
        first,
        other(classes=("cat", "dog", "Cow")),
    )
    refused("expected 3 classes.*got 4 classes, among them d", make_predictions(), other(k=4))
    refused(
        "expected 4 classes.*got 3 classes, without d",
        make_predictions(k=4, labels=np.zeros(6, int)),
        other(),
    )


def test_conflicting_labels_groups_and_members_are_refused() -> None:
    refused(
        r"two labels: train/1.png \(1 of 6 rows\); expected b as in net0, net1, got c in x, y",
        make_predictions(),
        other(labels=np.array([0, 2, 2, 0, 1, 2])),
    )
    refused(
        "two groups: train/5.png; expected c, got d",
        make_predictions(groups=tuple("aabbcc")),
        other(groups=tuple("aabbcd")),
    )
    refused(
        "same name; got net0 in inputs 1 and 3, 1 more; fix: give each member its own name",
        make_predictions(),
        other(),
        make_predictions(),
    )


def test_only_what_all_agree_on_is_kept() -> None:
    folds = np.array([0, 1, 0, 1, 0, 1])
    oof = make_predictions(kind="oof", folds=folds, groups=tuple("aabbcc"))

    joined = join_predictions([oof, other(kind="oof", folds=folds)])

    assert (joined.kind, joined.groups, joined.protocol) == ("oof", tuple("aabbcc"), "honest")
    assert joined.folds is not None
    assert (joined.folds == folds).all()

    joined = join_predictions([oof, other(kind="foreign", folds=1 - folds, protocol="paper")])

    assert (joined.kind, joined.folds, joined.protocol) == ("foreign", None, "paper")
    assert join_predictions([oof, other(kind="oof")]).folds is None
