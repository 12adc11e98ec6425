"""Hooks of the documentation site, see mkdocs.yml."""

from __future__ import annotations

import re
from typing import Any

import threefold

PUBLIC_NAME = re.compile(r"^::: threefold\.(\w+)$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point `::: threefold.NAME` at the module that defines the name.

    Public names are imported when first used, so the static analysis cannot follow them.
    """
    return PUBLIC_NAME.sub(_directive, markdown)


def _directive(match: re.Match[str]) -> str:
    name = match[1]
    home = getattr(threefold, name).__module__
    return f'::: {home}.{name}\n    options:\n      heading: "threefold.{name}"'
