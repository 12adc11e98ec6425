"""Names of splits, in folders and in tables: `Training`, `test_set`, `seg_train`, `valid`, ..."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from threefold.errors import shorten

PARTS = {"train": "train", "val": "train", "test": "test"}
"""The part of the data that each split belongs to; folds take their own validation rows."""

EXPECTED = "train, val or test"
"""For messages; `split_of` knows other spellings."""

_SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "holdout"), "test"),
}
_FILLERS = {"set", "data", "dataset", "images", "image", "img", "imgs", "split", "seg", "folder"}
_PART_NAME = re.compile(
    r"(fold|part|split|subset|partition|batch|chunk|shard|cv|set)s?[ _.-]*\w?\d*"
)


def split_of(name: str) -> str | None:
    """Return train, val or test for the name of a split in any usual spelling; else None."""
    words = [word for word in re.split(r"[\W_\d]+", name.strip().lower()) if word]
    words = [word for word in words if word not in _FILLERS]
    if len(words) != 1:
        return None
    word = words[0]
    return _SPLITS.get(word, _SPLITS.get(re.sub("(data)?set$", "", word)))


def warn_of_parts(classes: Sequence[str]) -> list[str]:
    """Warn about classes that are named like parts of a data set."""
    named = [
        name
        for name in classes
        if split_of(name) is not None or _PART_NAME.fullmatch(name.strip().lower())
    ]
    if len(named) < 2:
        return []
    return [
        f"{len(named)} classes are named like parts of a data set: {shorten(named)}; if they are, "
        "name the folders train/, val/ and test/, with class folders inside"
    ]


def hold_the_same(folders: Iterable[Iterable[str]]) -> bool:
    """Whether two folders or more all hold the same two subfolders or more."""
    contents = [frozenset(names) for names in folders]
    return len(contents) > 1 and len(set(contents)) == 1 and len(contents[0]) > 1
