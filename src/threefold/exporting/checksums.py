"""Checksums of exported files that have no place for one inside: .pt2, and .xml with its .bin.

They are beside the file, in NAME.sha256, in the form that `sha256sum --check` reads. An .onnx file
has its checksum in itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from threefold.errors import ExportError
from threefold.exporting.onnx_files import write_file
from threefold.files import sha256

_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\]+)")


def checksum_path(target: Path) -> Path:
    """Return where the checksums of an exported file are."""
    return target.with_name(f"{target.name}.sha256")


def write_checksums(target: Path, digests: Mapping[str, str]) -> Path:
    """Write the checksums of an exported file, and return their path.

    Args:
        target: the file.
        digests: SHA-256 by file name, of it and of what belongs to it in the same folder.

    Raises:
        ExportError: the file cannot be written.
    """
    path = checksum_path(target)
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    write_file(path, lines.encode())
    return path


def check_checksums(target: Path) -> None:
    """Compare an exported file, and what belongs to it, with the checksums beside it.

    Raises:
        ExportError: a file or the checksums are missing, cannot be read, or do not match.
    """
    path, fix = checksum_path(target), "export it again, or copy it again with its .sha256 file"
    try:
        matches = [_LINE.fullmatch(line) for line in path.read_text("utf-8").splitlines()]
        digests = {match[2]: match[1] for match in matches if match}
        if len(digests) < len(matches) or target.name not in digests:
            raise ExportError("the file of checksums is damaged", where=path, fix=fix)
        for name, digest in digests.items():
            if sha256(target.with_name(name)) != digest:
                raise ExportError(
                    "the file does not have its checksum: it is damaged",
                    where=target.with_name(name),
                    fix=fix,
                )
    except (OSError, UnicodeDecodeError) as error:
        where = getattr(error, "filename", None) or path
        raise ExportError("cannot read", where=where, got=error, fix=fix) from None
