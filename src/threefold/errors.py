"""Errors that a user can mend, each in one line: what, where, expected, got, fix."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Sequence
from typing import Self

from threefold.names import printable


class ThreefoldError(Exception):
    """Base of every error caused by bad input.

    The command line prints it without a traceback and exits with status 1.

    Args:
        what: what is wrong.
        where: the file, key or row concerned.
        expected: what would have been right.
        got: what was there instead; of an error of the operating system, its reason.
        fix: what the user can do about it; of a full or unwritable disk, by default what helps.

    Attributes:
        what, where, expected, fix: as given.
        got: `got` as one line of text; empty if it was not given.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = "",
        expected: object = "",
        got: object = "",
        fix: str = "",
    ) -> None:
        if isinstance(got, OSError):
            fix = fix or _DISK_ADVICE.get(got.errno or 0, "")
            got = got.strerror or got
        self.what, self.where, self.expected, self.fix = what, where, expected, fix
        self.got = " ".join(str(got).split())
        contrast = []
        if str(expected):
            contrast.append(f"expected {expected}")
        if self.got:
            contrast.append(f"got {self.got}")
        parts = [f"{what}: {where}" if str(where) else what, ", ".join(contrast)]
        if fix:
            parts.append(f"fix: {fix}")
        super().__init__(printable("; ".join(" ".join(part.split()) for part in parts if part)))

    def with_fix(self, fix: str) -> Self:
        """Return the error with other advice, from a caller that knows what helps."""
        return type(self)(
            self.what, where=self.where, expected=self.expected, got=self.got, fix=fix
        )

    def at(self, where: str) -> Self:
        """Return the error of another place, from a caller that knows more of it."""
        return type(self)(
            self.what, where=where, expected=self.expected, got=self.got, fix=self.fix
        )


_FULL = "free disk space, then run the same command again"
_FORBIDDEN = "change the permissions of the folder, or choose another one"
_DISK_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "free space within your quota, then run the same command again",
    errno.EROFS: "choose a folder on a disk that can be written",
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EIO: "the disk has failed; choose another one, then run the same command again",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or choose another disk",
}
"""What helps against an error of the operating system that is about a disk."""


def is_disk_error(error: BaseException) -> bool:
    """Whether an error is about a disk, and not about a network, which raises OSError, too."""
    if not isinstance(error, OSError) or error.errno not in _DISK_ADVICE:
        return False
    is_refusal = error.errno in (errno.EACCES, errno.EPERM)  # which a firewall also gives
    return not is_refusal or error.filename is not None


class RecipeError(ThreefoldError):
    """A recipe cannot be read, has an unknown key, or asks for something impossible."""


class DataError(ThreefoldError):
    """Images, labels or predictions are missing, unreadable or inconsistent."""


class MissingImageError(DataError):
    """A row of a source has no image, such as an address that no server knows."""


class RunError(ThreefoldError):
    """A run folder cannot be written, belongs to another recipe, or is incomplete."""


class DamagedFileError(RunError):
    """A file that threefold wrote is missing, or was changed since."""


class OutOfMemoryError(RunError):
    """The memory of the machine or of its accelerator is exhausted; no file is damaged."""


class ExportError(ThreefoldError):
    """A model file cannot be read or written, or its answers differ from its pipeline's."""


class MissingExtraError(ThreefoldError, ImportError):
    """Optional packages are missing; the message names the pip command that installs them."""


def error_texts(error: ThreefoldError) -> tuple[str, ...]:
    """Return the class of this module that an error has, and its parts, for another process."""
    kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == __name__)
    return kind, *map(str, (error.what, error.where, error.expected, error.got, error.fix))


def error_from(texts: Sequence[str]) -> ThreefoldError:
    """Make the error again that `error_texts` has described."""
    kind, what, where, expected, got, fix = texts
    error: ThreefoldError = globals()[kind](what, where=where, expected=expected, got=got, fix=fix)
    return error


_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/{1,2}[^/]", re.IGNORECASE)
"""A URL, also as pathlib writes it, with one slash. A drive of Windows has only one letter."""


def seems_address(path: object) -> bool:
    """Whether a text or a path reads like the address of a file on the web."""
    return _ADDRESS.match(str(path)) is not None


def refuse_address(path: object, kind: type[ThreefoldError] = DataError) -> None:
    """Refuse the address of a file on the web, in place of the message that there is no such file.

    Args:
        path: what was to be read and does not exist.
        kind: of the error.

    Raises:
        ThreefoldError: it is an address.
    """
    if seems_address(path):
        raise kind(
            "an address is not read, only files are",
            where=path,
            fix="download it and give the path of the file",
        )


def shorten(names: Iterable[str], limit: int = 10) -> str:
    """Join the first few names, and say how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


_MEMORY = (
    "allocate memory",  # torch, and the operating system through safetensors
    "failed to allocate",  # onnxruntime
    "start new thread",  # whose stack needs memory, too
    "bad_alloc",
    "out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch, onnxruntime or the system says that memory is exhausted.

    On the CPU the libraries have no type of their own for it.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True  # torch has a class of that name, too
    if isinstance(error, ThreefoldError):
        return False
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return any(words in str(error).lower() for words in _MEMORY)


def out_of_memory(where: object, error: BaseException, fix: str = "") -> OutOfMemoryError:
    """Make the one line about exhausted memory.

    Args:
        where: what was being done or read.
        error: the library's error.
        fix: what needs less memory there.
    """
    return OutOfMemoryError(
        "not enough memory",
        where=where,
        got=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}".rstrip(": "),
        fix=fix
        or "close other programs and run the same command again, or set a smaller img_size "
        "or train.batch_size; finished work is kept",
    )
