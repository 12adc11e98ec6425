"""Which columns of a data set of the Hugging Face hub are the image and the label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from threefold.data.sources.columns import NamedColumns
from threefold.data.sources.image_tables import import_optional
from threefold.data.split_names import EXPECTED, PARTS, split_of
from threefold.errors import DataError

_LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


class ChosenColumns(NamedTuple):
    """What is read of a split."""

    image: str
    columns: dict[str, str]
    """Names of label, id, group and split, as far as the split has them."""
    label_names: list[str] | None
    """Names of whole-number labels."""
    part: str
    """`train` or `test`."""


def choose_columns(
    name: str, split: str, features: Mapping[str, Any], named: NamedColumns
) -> ChosenColumns:
    """Find the image and the label of a split.

    Nobody can rename a column of the hub, so that no near miss is refused there.

    Args:
        name: of the data set, for messages.
        split: its name.
        features: of the hub's library, by column.
        named: the columns that the recipe names.

    Raises:
        DataError: a named column is missing, or there is not one image, a label and a known split.
    """
    hub = import_optional("datasets", "hf")
    where = f"{name}, split {split}"
    images = [column for column in features if isinstance(features[column], hub.Image)]
    labels = [column for column in features if isinstance(_inner(features[column]), hub.ClassLabel)]
    meanings = (("path", named.path), ("label", named.label), ("group", named.group))
    for meaning, column in meanings:
        if column and column not in features:
            raise DataError(
                f"the data set has no column {column}",
                where=where,
                got=", ".join(features),
                fix=f"correct data.{meaning}_column",
            )
    images = [named.path] if named.path else images
    label = next((column for column in (*_LABEL_COLUMNS, *labels) if column in features), None)
    label = named.label or label
    name_of_split = split_of(split)
    if len(images) != 1 or label is None or name_of_split is None:
        raise DataError(
            "the data set is not one image and one label per row",
            where=where,
            expected=f"splits {EXPECTED}, one image feature, a label",
            got=", ".join(features),
            fix="name the columns in data.path_column and data.label_column",
        )
    columns = {key: key for key in ("id", "group", "split") if key in features} | {"label": label}
    columns |= {"group": named.group} if named.group else {}
    label_names = _inner(features[label]).names if label in labels else None
    return ChosenColumns(images[0], columns, label_names, PARTS[name_of_split])


def _inner(feature: Any) -> Any:
    """Return what a list of the hub is a list of, or the feature itself."""
    return getattr(feature, "feature", feature)
