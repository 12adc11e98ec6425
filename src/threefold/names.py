"""Names: natural order, those that occur twice, and those of backbones."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Final


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sort key for natural order: digits count as numbers, so `class2` comes before `class10`.

    Names that differ only in leading zeros are sorted as text.
    """
    key = []
    for i, piece in enumerate(re.split(r"(\d+)", name)):
        # Compared as text of equal length: Python refuses numbers of more than 4,300 digits.
        digits = piece.lstrip("0")
        key.append((len(digits), digits) if i % 2 else (0, piece))
    return key, name


def find_repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once, in order of first appearance."""
    return [name for name, count in Counter(names).items() if count > 1]


MAX_NAME: Final = 1000
"""Most characters of the name of a class."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def is_plain_name(name: str) -> bool:
    """Whether a name is short text without control characters, which terminals would obey."""
    return 0 < len(name) <= MAX_NAME and _CONTROL.search(name) is None


def wrap_words(text: str, width: int, indent: str = "") -> str:
    """Wrap a text between words; a longer word, such as a path, stays whole.

    Args:
        text: one paragraph.
        width: most characters of a line.
        indent: of the lines after the first.
    """
    return textwrap.fill(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def count_of(number: int, one: str, many: str = "") -> str:
    """Return a number with what it counts: "1 image", "2,000 images".

    Args:
        number: how many.
        one: what one of them is called, with a verb where the words that follow need one.
        many: what several are called; by default with an s at the end.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def printable(text: str, keep: str = "\t\r\n") -> str:
    """Return a text with its control characters written out, so that no terminal obeys them.

    Args:
        text: any text.
        keep: control characters that stay.
    """

    def write_out(match: re.Match[str]) -> str:
        return match[0] if match[0] in keep else f"\\x{ord(match[0]):02x}"

    return _CONTROL.sub(write_out, text)


def escape_formula(text: str) -> str:
    """Return a cell that spreadsheets show as text, with an apostrophe before a formula's sign."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def unescape_formula(cell: str) -> str:
    """Undo `escape_formula`."""
    return cell[1:] if escape_formula(cell[1:]) == cell else cell


def normalise_name(name: str) -> str:
    """Return a name as NFC: macOS writes an accent as a letter of its own, other systems do not."""
    return unicodedata.normalize("NFC", name)


def plain_backbone(name: str) -> str:
    """Return a backbone's name as timm knows it, without spaces around it or the hub's prefix.

    `timm/resnet18.a1_in1k` is what the model hub's page says, `hf-hub:timm/...` what its code says.
    """
    return re.sub(r"^(hf[-_]hub:)?timm/", "", name.strip())
