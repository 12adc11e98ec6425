"""Names of classes that every file and every terminal can hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from threefold.errors import DataError, shorten
from threefold.names import MAX_NAME, is_plain_name, printable


def check_class_names(classes: Iterable[str]) -> None:
    """Check that every class has a name that a model file and a terminal can hold.

    Raises:
        DataError: a name is empty or too long, or has a control character.
    """
    for name in classes:
        if is_plain_name(name):
            continue
        if len(name) > MAX_NAME or not name:
            raise DataError(
                "the name of a class is too long" if name else "a class has no name",
                expected=f"1 to {MAX_NAME:,} characters",
                got=f"{len(name):,} characters",
                fix="rename its folder, or its label in the table",
            )
        meant = _undo_mojibake(name)
        raise DataError(
            "the name of a class has control characters",
            where=repr(name),
            expected=f"a name such as {meant}" if meant else "letters, digits and signs",
            fix="rename its folder, or its label in the table",
        )


def warn_of_alike(classes: Sequence[str]) -> list[str]:
    """Warn about classes whose names differ in nothing but capitals, spaces and underscores."""
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(re.sub(r"[\s_-]+", "", name.casefold()), []).append(name)
    pairs = [" = ".join(map(repr, names)) for names in alike.values() if len(names) > 1]
    if not pairs:
        return []
    return [
        f"{len(pairs)} classes have names that differ in capitals or spaces only: {shorten(pairs)}"
    ]


def _undo_mojibake(name: str) -> str:
    """Return the name that was UTF-8 before something read it as Latin-1, or an empty string."""
    try:
        meant = name.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return ""
    return meant if is_plain_name(meant) else ""


def exported_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names that a model file has for the classes of a run.

    They are the same, but for names that `check_class_names` refuses, which older runs may have:
    there control characters are written out, as `\\x89`, and long names are cut.
    """
    names: list[str] = []
    for number, name in enumerate(classes):
        if not is_plain_name(name):
            name = printable(name, keep="") or "no name"
            name = name[: MAX_NAME - 20]
            if name in classes or name in names:
                name = f"{name} ({number})"
        names.append(name)
    return tuple(names)
