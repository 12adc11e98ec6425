"""Which kind of data a path is: a folder of images, or a table of them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from threefold.errors import DataError, refuse_address
from threefold.recipe_schema import DataSpec, Source

TABLES: Final[dict[str, Source]] = {
    ".csv": "csv",
    ".parquet": "parquet",
}
"""Source of a table by the suffix of its file."""


def detect_source(data: str | Path) -> DataSpec:
    """Return the `data` table of a recipe for a path.

    Args:
        data: a folder of images, or a CSV or parquet file of them.

    Raises:
        DataError: it does not exist, or is another kind of file.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        return DataSpec(source="folder", root=str(path.resolve()))
    source = TABLES.get(path.suffix.lower())
    if source is None or not path.exists():
        refuse_address(data)
        raise DataError(
            "not a folder or table of images" if path.exists() else "no such folder or table",
            where=data,
            expected=f"a folder of class folders, or a file ending in {', '.join(TABLES)}",
        )
    return DataSpec(source=source, root=str(path.resolve()))
