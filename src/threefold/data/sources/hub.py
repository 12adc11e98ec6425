"""Data sets of the Hugging Face hub, through its library; code in a data set is never run.

`owner/name` is loaded into the library's own cache. `hf://datasets/owner/name` is streamed: each
row is read once, in order, and its image goes into the cache (`image_store`); an interrupted
command goes on where it stopped. The package datasets is optional and imported only when needed.
"""

from __future__ import annotations

from typing import Any

from threefold.data.sources.columns import NO_NAMES, NamedColumns
from threefold.data.sources.folder import Listing
from threefold.data.sources.hub_columns import choose_columns
from threefold.data.sources.hub_stream import is_stream, stream_tables
from threefold.data.sources.image_tables import (
    ImageTable,
    encoded_image,
    import_optional,
    label_cells,
    list_tables,
)
from threefold.data.sources.label_sets import LabelCells
from threefold.errors import DataError


def list_huggingface(name: str, named: NamedColumns = NO_NAMES) -> Listing:
    """List a data set of the Hugging Face hub, or of a folder that its library reads.

    Code in the data set is never run. The image and the class label are used, and a column `group`
    if there is one. The validation split belongs to the training part.

    Args:
        name: `owner/name`, or `owner/name:configuration`; or the address of one that is streamed,
            see `hub_stream`.
        named: the columns that the recipe names.

    Raises:
        DataError: datasets is not installed, the data set cannot be loaded, or it has no image or
            no label.
    """
    return list_tables(_hub_tables(name, named), None, named)


def _hub_tables(name: str, named: NamedColumns) -> list[ImageTable]:
    """Return the splits of a data set."""
    if is_stream(name):
        return stream_tables(name, named)
    dataset = _load_hub(name)
    return [_hub_table(name, split, dataset[split], named) for split in dataset]


def read_hub_header(name: str) -> list[str]:
    """Return the names of the columns of a data set of the hub, which is loaded for that.

    Raises:
        DataError: datasets is not installed, or the data set cannot be loaded.
    """
    if is_stream(name):
        return list(stream_tables(name, NO_NAMES)[0].header)
    dataset = _load_hub(name)
    return list(dataset[next(iter(dataset))].features)


def read_hub_label_cells(name: str, named: NamedColumns) -> LabelCells:
    """Read what can be the labels of a data set of the hub, which is loaded for that.

    Raises:
        DataError: datasets is not installed, or the data set cannot be loaded.
    """
    return label_cells(_hub_tables(name, named), named)


def _load_hub(name: str) -> Any:
    """Load the splits of a data set; the hub's library keeps them in its cache."""
    hub = import_optional("datasets", "hf")
    path, _, configuration = name.partition(":")
    try:
        return hub.load_dataset(path, configuration or None)
    except Exception as error:  # the library raises errors of many types, for networks and files
        got = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise DataError(
            "cannot load the data set",
            where=name,
            got=got,
            fix="give an existing folder or table, or owner/name of a data set on the Hugging Face "
            "hub",
        ) from None


def _hub_table(name: str, split: str, dataset: Any, named: NamedColumns) -> ImageTable:
    """Make a table of a split that the hub's library has loaded."""
    chosen = choose_columns(name, split, dataset.features, named)
    rows = dataset.data.table
    images = rows.column(chosen.image)

    def read(row: int) -> bytes:
        return encoded_image(images[row].as_py(), f"{split} row {row}", may_open=True)

    return ImageTable(
        split,
        chosen.part,
        rows,
        chosen.columns,
        chosen.image,
        chosen.label_names,
        list(dataset.features),
        read,
    )
