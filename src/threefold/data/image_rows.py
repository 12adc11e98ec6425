"""The images of a table, of shards or of a streamed data set, to be predicted: no labels needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from threefold.suffixes import CSV_TABLES, TABLES

# The readers are imported where they are needed, since `predict` of a file should start at once.

_MAYBE = re.compile(r":/|[*{]|\.(csv|tsv|parquet|pq|tar)$", re.IGNORECASE)


class ImageRow(NamedTuple):
    """An image that is no file of its own."""

    name: str
    read: Callable[[], bytes]
    """Returns the encoded image; raises a DataError where there is none."""


def names_images(source: str) -> bool:
    """Whether a source is a table, shards, or a streamed data set, and no image itself."""
    if _MAYBE.search(source) is None:
        return False
    from threefold.data.sources.addresses import restore_address
    from threefold.data.sources.hub_stream import is_stream
    from threefold.data.sources.webdataset import is_shards

    text = restore_address(source)
    if is_shards(text) or is_stream(text):
        return True
    path = Path(source)
    return path.suffix.lower() in (*TABLES, ".tar") and path.is_file()


def list_rows(source: str) -> Iterator[Path | ImageRow]:
    """Yield the images that a source names, in its order.

    Args:
        source: a CSV, TSV or parquet file with paths, addresses or encoded images; shards of
            WebDataset; or hf://datasets/OWNER/NAME.

    Raises:
        DataError: it cannot be read, or has no images.
    """
    from threefold.data.sources.addresses import restore_address
    from threefold.data.sources.columns import NamedColumns
    from threefold.data.sources.csv_table import list_csv
    from threefold.data.sources.hub import list_huggingface
    from threefold.data.sources.hub_stream import is_stream
    from threefold.data.sources.parquet import list_parquet
    from threefold.data.sources.webdataset import is_shards, list_webdataset

    unlabelled = NamedColumns(has_recipe=False, needs_label=False)
    text = restore_address(source)
    if is_stream(text):
        listing = list_huggingface(text)
    elif is_shards(text) or Path(source).suffix.lower() == ".tar":
        listing = list_webdataset(text, unlabelled)
    elif Path(source).suffix.lower() in CSV_TABLES:
        listing = list_csv(Path(source), unlabelled)
    else:
        listing = list_parquet(Path(source), unlabelled)
    for row, item in enumerate(listing.items):
        if listing.encoded is None:
            yield Path(item.path)
        else:
            yield ImageRow(item.id, partial(listing.encoded.__getitem__, row))
