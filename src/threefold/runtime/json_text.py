"""Answers and model cards as strict JSON, in any encoding."""

from __future__ import annotations

import codecs
import json
import re
from typing import IO, Any

from threefold.json_files import replace_not_finite

_CONTROL = re.compile(r"[\x7f-\x9f]")
"""Control characters that `json` does not escape. Outside of strings, JSON has none of them."""


def as_json(tree: Any) -> Any:
    """Return plain values for strict JSON: numbers that are not finite become null."""
    return replace_not_finite(tree, lambda _: None)


def json_line(tree: Any, stream: IO[str], indent: int | None = None) -> str:
    """Return JSON that a stream can encode: outside of Unicode encodings, characters are escaped.

    So are all control characters, since a terminal would obey them. JSON itself leaves DEL and
    U+0080 to U+009F as they are.

    Args:
        tree: plain values, all of them finite.
        stream: where the text goes.
        indent: of lines; None = one line.
    """
    text = json.dumps(
        tree,
        indent=indent,
        ensure_ascii=not _is_unicode(stream),
        default=float,
        allow_nan=False,
    )
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _is_unicode(stream: IO[str]) -> bool:
    """Whether a stream can encode every character; streams in memory can."""
    encoding = getattr(stream, "encoding", None)
    return encoding is None or codecs.lookup(encoding).name.startswith("utf")
