"""Which columns of a table of images are read, and a refusal of those that only seem to be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from threefold.data.split_names import EXPECTED
from threefold.errors import DataError, shorten
from threefold.names import find_repeated
from threefold.tasks import Task

_ALIASES: Final = {
    "path": (
        ("path",),
        (
            *("image", "img", "picture", "photo", "images", "paths"),
            *("file", "files", "filename", "filenames", "filepath", "fname"),
            *("imagepath", "imgpath", "imagefile", "imgfile", "imagefilename", "imagefilepath"),
            *("imagename", "imgname", "photopath", "picturepath"),
        ),
        ("imageid", "imgid", "photoid", "pictureid", "fileid"),
        ("url", "urls", "imageurl", "imgurl", "photourl", "fileurl", "uri", "imageuri"),
        ("id",),
    ),
    "label": (
        ("label",),
        (
            *("labels", "class", "classes", "category", "categories", "target", "targets", "y"),
            *("classname", "labelname", "categoryname", "species", "breed", "diagnosis", "dx"),
            *("finelabel", "groundtruth", "gt"),
        ),
        (
            *("labelid", "classid", "categoryid", "targetid", "classindex", "labelindex"),
            *("classidx", "labelidx", "classlabel", "labelcode"),
        ),
        ("tags", "tag", "findinglabels", "labelset"),
    ),
}
"""Usual names of the two columns that every table has, without capitals, spaces and signs.

An earlier row of names wins over a later one: a `filename` over an `id`, a name of the class over
its number.
"""

_NEAR: Final = {
    "split": (
        *("splits", "subset", "set", "part", "partition", "phase", "usage", "traintest"),
        *("datasplit", "datasetsplit", "traintestsplit", "splitname", "tvt"),
        *("isvalid", "isval", "isvalidation", "istest", "istrain"),
    ),
    "group": ("groups", "groupid", "groupids", "grp"),
    "fold": ("fold", "folds", "kfold", "foldid", "cvfold"),
}
"""Other names of columns that change which rows are trained on, without spaces and signs."""

_GROUP_LIKE: Final = (
    *("patient", "patientid", "subject", "subjectid", "participant", "participantid"),
    *("person", "personid", "individual", "individualid", "lesion", "lesionid", "study", "studyid"),
    *("scan", "scanid", "slide", "slideid", "specimen", "specimenid", "scene", "sceneid"),
    *("video", "videoid", "sequence", "sequenceid", "session", "sessionid", "writer", "writerid"),
    *("signer", "signerid", "location", "locationid", "camera", "cameraid", "site", "siteid"),
)
"""Columns whose images often resemble each other, without capitals, spaces and signs."""

_FIXES: Final = {
    "split": f"rename it to split, with the values {EXPECTED}",
    "group": "rename it to group",
    "fold": 'set data.fold_column to its name and folds.scheme = "column"',
}

SHOWN: Final = {
    "path": "path, image, file, filename, image_path, image_id",
    "label": "label, class, category, target, species",
}
"""For messages: some of the names that are looked for."""


class NamedColumns(NamedTuple):
    """The columns that a recipe names; empty = found by their usual names."""

    path: str = ""
    label: str = ""
    fold: str = ""
    """The fold of each training row; empty = none."""
    has_recipe: bool = True
    """Whether there is a recipe, which can name columns. Without one, folds are left unread."""
    rename: str = "rename a column"
    """Without a recipe: what a user can do about a column that is not found."""
    task: Task = "multiclass"
    """multilabel = a row has any number of labels."""
    separator: str = ""
    """Of the labels in a cell; empty = found from the cells."""
    needs_label: bool = True
    """Whether the images must have labels; without, columns of labels are not looked for."""
    try_again: bool = True
    """Whether addresses of images that gave none are tried again."""
    group: str = ""
    """The group of each image; empty = a column `group`, if there is one."""


NO_NAMES: Final = NamedColumns()
"""A recipe that names no column."""


def find_columns(
    header: Sequence[str],
    known: Sequence[str],
    named: NamedColumns,
    where: str,
) -> dict[str, str]:
    """Find the known columns of a table, whatever their capitals.

    Args:
        header: names of all columns.
        known: the columns with a meaning. `path` and `label` have other usual names, too; other
            usual names of `split` and `group` are refused.
        named: the columns that the recipe names.
        where: the file, for messages.

    Returns:
        The table's own name of each known column that it has.

    Raises:
        DataError: two columns have one name or one meaning, a named column is missing, or a column
            seems to be a split, a group or a fold but would not be read.
    """
    repeated = find_repeated(header)
    if repeated:
        raise DataError("two columns have the same name", where=where, got=shorten(repeated))
    free = [name for name in header if name != named.fold]
    found: dict[str, str] = {}
    for meaning in known:
        candidates = _candidates(free, meaning, named, where)
        if len(candidates) > 1:
            fix = "rename or remove one of them"
            if meaning in _ALIASES and named.has_recipe:
                fix = f"choose one: --set data.{meaning}_column=NAME"
            raise DataError(
                f"two columns can be the {meaning}"
                if len(candidates) == 2
                else f"{len(candidates)} columns can be the {meaning}",
                where=where,
                got=" and ".join(candidates),
                fix=fix,
            )
        if candidates:
            found[meaning] = candidates[0]
    for name in header if named.needs_label else ():
        if name not in found.values() and name != named.fold:
            _refuse_near_miss(name, found, named, where)
    return found


def _candidates(
    header: Sequence[str], meaning: str, named: NamedColumns, where: str
) -> Sequence[str]:
    """Return the columns that can have a meaning: one, unless the choice is the user's."""
    wanted = {"path": named.path, "label": named.label, "group": named.group}.get(meaning)
    if wanted:
        same = [name for name in header if name == wanted]
        same = same or [name for name in header if name.lower() == wanted.lower()]
        if not same:
            raise DataError(
                f"the table has no column {wanted}",
                where=where,
                got=", ".join(header),
                fix=f"correct data.{meaning}_column",
            )
        return same
    others = {named.path, named.label, named.group}
    for names in _ALIASES.get(meaning, ((meaning,),)):
        candidates = [name for name in header if _plain(name) in names and name not in others]
        if candidates:
            return candidates
    return []


def find_label_name(names: Sequence[str], named: NamedColumns, where: str) -> str:
    """Return which of the names of a record is that of its label.

    Args:
        names: of the values of a sample, which nobody can rename.
        named: the columns that the recipe names.
        where: the sample, for messages.

    Returns:
        The name; empty if there is none.

    Raises:
        DataError: several can be, or the named one is missing.
    """
    found = _candidates(names, "label", named, where)
    if len(found) > 1:
        raise DataError(
            f"{len(found)} values can be the label",
            where=where,
            got=" and ".join(found),
            fix="choose one: --set data.label_column=NAME",
        )
    return "".join(found)


def _plain(name: str) -> str:
    """Return the name of a column without capitals, spaces and signs."""
    return re.sub(r"[\W_]+", "", name.lower())


def has_usual_name(name: str) -> bool:
    """Whether a column has a usual name of a path, label, split, group or fold."""
    aliases = [names for tiers in _ALIASES.values() for names in tiers]
    return any(_plain(name) in names for names in [*aliases, *_NEAR.values(), tuple(_NEAR)])


def count_known(header: Sequence[str]) -> int:
    """Count the columns with a usual name of the path or the label."""
    names = {name for tiers in _ALIASES.values() for tier in tiers for name in tier}
    return sum(_plain(name) in names for name in header)


def find_fold_columns(header: Sequence[str]) -> list[str]:
    """Return the columns that seem to hold the user's own folds."""
    return [name for name in header if _plain(name) in _NEAR["fold"]]


def _refuse_near_miss(name: str, found: dict[str, str], named: NamedColumns, where: str) -> None:
    """Refuse a column that seems to be one that the table lacks, and would be ignored."""
    for meaning, names in _NEAR.items():
        is_read = meaning in found
        if meaning == "fold":
            is_read = bool(named.fold) or not named.has_recipe
        if _plain(name) in names and not is_read:
            fix = _FIXES[meaning]
            if meaning == "group" and named.has_recipe:
                fix += f", or --set data.group_column={name}"
            raise DataError(
                f"a column seems to be the {meaning} of the images, but would not be read",
                where=where,
                got=name,
                fix=f"{fix}; or remove the column",
            )


def require_columns(
    columns: dict[str, str],
    header: Sequence[str],
    named: NamedColumns,
    where: str,
    expected: str = "",
) -> None:
    """Check that a table has the columns of the image and of the label.

    Args:
        columns: by meaning.
        header: names of all columns.
        named: the columns that the recipe names.
        where: the table, for messages.
        expected: what else would do.

    Raises:
        DataError: it has not; the message has the names that are looked for.
    """
    needed = ("path", "label") if named.needs_label else ("path",)
    missing = [meaning for meaning in needed if meaning not in columns]
    if not missing:
        return
    names = "; ".join(f"{meaning}: {SHOWN[meaning]}, ..." for meaning in missing)
    keys = " ".join(f"--set data.{meaning}_column=NAME" for meaning in missing)
    raise DataError(
        f"the table has no column that can be the {' or the '.join(missing)}",
        where=where,
        expected=f"{names}{expected}",
        got=", ".join(header) or "an empty file",
        fix=f"rename a column, or name it: {keys}" if named.has_recipe else named.rename,
    )


def check_fold_column(header: Sequence[str], fold_column: str, where: str) -> None:
    """Check that a table has the fold column that the recipe names.

    Raises:
        DataError: it has not.
    """
    if fold_column and fold_column not in header:
        raise DataError(
            f"the table has no fold column {fold_column}",
            where=where,
            expected=f"a column {fold_column}",
            got=", ".join(header),
            fix="correct data.fold_column",
        )


def note_columns(columns: dict[str, str]) -> list[str]:
    """Note the columns that are read under another name than path, label and group."""
    meanings = ("path", "label", "group")
    other = {m: columns[m] for m in meanings if _plain(columns.get(m, m)) != m}
    if not other:
        return []
    return [f"read from the table: {', '.join(f'{m} = {name}' for m, name in other.items())}"]


def note_unread(header: Sequence[str], read: Sequence[str], *, has_groups: bool) -> list[str]:
    """Note the columns of a table that are not read, and one of them that may name groups.

    Args:
        header: names of all columns.
        read: those that are read.
        has_groups: whether the images have groups already.
    """
    unread = [name for name in header if name not in read]
    if not unread:
        return []
    number = "1 column is" if len(unread) == 1 else f"{len(unread)} columns are"
    notes = [f"{number} not read: {shorten(unread)}"]
    similar = [name for name in unread if _plain(name) in _GROUP_LIKE]
    if similar and not has_groups:
        notes.append(
            f"images with the same {similar[0]} may be alike; to keep them in one fold: "
            f"--set data.group_column={similar[0]}"
        )
    return notes
