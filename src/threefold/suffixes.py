"""Suffixes of the files that images come in, in lower case: archives, tables and arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Final

ARCHIVES: Final = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2")
"""Archives of folders."""

CSV_TABLES: Final = (".csv", ".tsv")
"""Tables that are texts."""

PARQUET_TABLES: Final = (".parquet", ".pq")
"""Tables of parquet."""

TABLES: Final = (*CSV_TABLES, *PARQUET_TABLES)
"""Tables, which name images beside them, or hold them."""

ARRAYS: Final = ".npz"
"""Files of arrays."""


def is_archive(path: Path) -> bool:
    """Whether a file is named like an archive."""
    return path.name.lower().endswith(ARCHIVES) and path.is_file()
