"""An HTML page as a browser sees it, for tests."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A page as a browser sees it: tags with attributes, words; tags must be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def headings(self) -> list[int]:
        return [int(tag[1]) for tag, _ in self.tags if re.fullmatch(r"h[1-6]", tag)]

    def needs_nothing_else(self) -> None:
        """Fail if the page names another file, a URL or a script."""
        pointing = ("src", "href", "xlink:href", "action", "srcset", "data")
        links = [
            value or "" for _, attrs in self.tags for key, value in attrs.items() if key in pointing
        ]
        assert [link for link in links if not link.startswith(("#", "data:image/"))] == []
        assert not {"script", "link", "iframe", "object", "base", "form"} & {
            tag for tag, _ in self.tags
        }
        assert not any(key.startswith("on") for _, attrs in self.tags for key in attrs)
        policy = [
            attrs["content"] for tag, attrs in self.tags if tag == "meta" and "http-equiv" in attrs
        ]
        assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]

    def is_sound(self) -> None:
        """Fail unless tags are closed, headings are nested, and pictures have a text."""
        assert self.open == []
        levels = self.headings()
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
        assert all("alt" in attrs for tag, attrs in self.tags if tag == "img")
        assert all(
            attrs.get("aria-label") and attrs.get("role") == "img"
            for tag, attrs in self.tags
            if tag == "svg"
        )
        ids = [
            attrs["id"]
            for tag, attrs in self.tags
            if "id" in attrs and tag in ("article", "section", "g")
        ]
        assert len(ids) == len(set(ids))
        targets = [(attrs.get("href") or "")[1:] for tag, attrs in self.tags if tag == "a"]
        assert set(targets) <= set(ids)
