"""Find the files of a table that names them without their folder or their suffix.

Competitions publish a table such as `image_id,label` beside folders `train_images/` and
`test_images/`. Nothing here opens an image.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from threefold.data.images import IMAGE_SUFFIXES
from threefold.data.sources.folder import ListedImage
from threefold.data.split_names import PARTS, split_of
from threefold.data.walk import walk_images
from threefold.errors import DataError, shorten
from threefold.names import count_of


def find_by_name(
    items: list[ListedImage], folder: Path, table: str
) -> tuple[list[ListedImage], list[str]]:
    """Find the files of items that do not exist where the table has them.

    An item without a folder in its name is looked for at any depth below the table's folder, with
    its suffix, or with any suffix of an image if it has none. Of several files of one name, those
    in the folder of another split than the item's do not count.

    Args:
        items: of a table.
        folder: the table's folder.
        table: the table, for messages.

    Returns:
        The items with the files found, and a note of them. Files that are not there stay absent.

    Raises:
        DataError: a name fits several files.
    """
    place = str(folder)
    wanted = [
        os.path.dirname(item.path) == place and not os.path.isfile(item.path) for item in items
    ]
    if not any(wanted):
        return items, []
    files: dict[str, list[Path]] = {}
    for path in walk_images(folder, []):
        names = {path.name, path.stem} if path.suffix.lower() in IMAGE_SUFFIXES else {path.name}
        for name in names:
            files.setdefault(name, []).append(path)
    located: list[ListedImage] = []
    folders: set[str] = set()
    for item, is_wanted in zip(items, wanted, strict=True):
        paths = files.get(os.path.basename(item.path), []) if is_wanted else []
        if len(paths) > 1:
            paths = [path for path in paths if _can_hold(path, folder, item.part)] or paths
        if len(paths) > 1:
            raise DataError(
                "a name in the table fits several images",
                where=f"{table}: {os.path.basename(item.path)}",
                got=shorten(_relative(path, folder) for path in paths),
                fix="give paths with folder and suffix",
            )
        if paths:
            folders.add(str(PurePosixPath(_relative(paths[0], folder)).parent))
        located.append(item._replace(path=str(paths[0])) if paths else item)
    count = sum(new.path != old.path for new, old in zip(located, items, strict=True))
    if not count:
        return items, []
    where = shorten(f"{name}/" if name != "." else "its own folder" for name in sorted(folders))
    names_found = count_of(count, "name in the table was", "names in the table were")
    return located, [f"{names_found} found below its folder: in {where}"]


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _can_hold(path: Path, folder: Path, part: str) -> bool:
    """Whether no folder on the way to a file is that of another split."""
    splits = [split_of(name) for name in path.relative_to(folder).parts[:-1]]
    return all(PARTS[split] == part for split in splits if split is not None)
