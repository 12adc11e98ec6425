"""One reader for each source of a recipe: files to be decoded, or arrays of pixels."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Final

import numpy as np

from threefold.data.published import FASHION_MNIST_CLASSES
from threefold.data.remote_images import local_path
from threefold.data.sources.arrays import (
    FASHION_MNIST_ROOT,
    read_cifar,
    read_mnist,
    read_svhn,
    with_row_ids,
)
from threefold.data.sources.columns import NamedColumns
from threefold.data.sources.csv_table import list_csv
from threefold.data.sources.folder import ArrayDataset, Listing
from threefold.data.sources.hub import list_huggingface
from threefold.data.sources.npz_file import read_npz
from threefold.data.sources.parquet import list_parquet
from threefold.data.sources.photos import (
    list_cassava2020,
    list_icassava,
    list_inaturalist,
    list_surrey,
)
from threefold.data.sources.table_inside import locate_table
from threefold.data.sources.unpacked import list_folder_or_archive
from threefold.data.sources.webdataset import list_webdataset
from threefold.errors import DataError
from threefold.recipe.schema import DataSpec

UNLABELLED: Final = "`threefold predict MODEL IMAGE...` answers images without labels"
"""What a user can do who has no labels to score answers with."""

_READERS: Final[dict[str, Callable[[DataSpec, Path, NamedColumns], Listing | ArrayDataset]]] = {
    "demo": lambda spec, path, named: _read_demo(),
    "mnist": lambda spec, path, named: read_mnist(path, "mnist"),
    "fashion-mnist": lambda spec, path, named: read_mnist(path, "fashion-mnist"),
    "cifar10": lambda spec, path, named: read_cifar(path, "cifar10"),
    "cifar100": lambda spec, path, named: read_cifar(path, "cifar100"),
    "svhn": lambda spec, path, named: read_svhn(path, spec.extra),
    "npz": lambda spec, path, named: read_npz(path, named),
    "folder": lambda spec, path, named: list_folder_or_archive(path),
    "csv": lambda spec, path, named: list_csv(locate_table(path), named),
    "parquet": lambda spec, path, named: list_parquet(locate_table(path), named),
    "huggingface": lambda spec, path, named: list_huggingface(spec.root, named),
    "webdataset": lambda spec, path, named: list_webdataset(spec.root, named),
    "inaturalist2019": lambda spec, path, named: list_inaturalist(path, spec.extra),
    "icassava2019": lambda spec, path, named: list_icassava(path, spec.extra),
    "cassava2020": lambda spec, path, named: list_cassava2020(path),
    "surrey-asl": lambda spec, path, named: list_surrey(path),
}


def read_source(spec: DataSpec, *, has_recipe: bool = True) -> Listing | ArrayDataset:
    """Read or list the images of a recipe's `data` table.

    Args:
        spec: the `data` table of a recipe.
        has_recipe: whether a recipe can name columns; without one, folds are left unread.

    Raises:
        DataError: there is no root, or the images cannot be found.
    """
    root = spec.root or (FASHION_MNIST_ROOT if spec.source == "fashion-mnist" else "")
    if not root and spec.source != "demo":
        raise DataError(
            "data.root is not set",
            fix="set data.root to a folder of class folders, or to a CSV file",
        )
    named = NamedColumns(
        spec.path_column or "",
        spec.label_column or "",
        spec.fold_column,
        has_recipe,
        task=spec.task,
        separator=spec.label_separator or "",
        rename=f"rename a column; {UNLABELLED}",  # unless there is a recipe, whose keys name one
        group=spec.group_column or "",
        # A resumed run sees the images that it has seen before.
        try_again=spec.bad_images == "fail",
    )
    # Shards and data sets of the hub are read where they are.
    is_streamed = spec.source in ("webdataset", "huggingface")
    path = Path(root) if is_streamed else local_path(root)
    return _READERS[spec.source](spec, path, named)


def _read_demo() -> ArrayDataset:
    """Read the packaged part of Fashion-MNIST, written by scripts/make_demo_data.py."""
    asset = resources.files("threefold") / "assets" / "fashion_mnist" / "data.npz"
    with asset.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
        train, test = (
            with_row_ids(part, data[f"{part}_images"], data[f"{part}_labels"], data[f"{part}_rows"])
            for part in ("train", "test")
        )
    return ArrayDataset(train, test, FASHION_MNIST_CLASSES, [])
