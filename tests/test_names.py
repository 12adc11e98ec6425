"""Names, and numbers of what they count."""

from __future__ import annotations

import pytest

from threefold.names import count_of


@pytest.mark.parametrize(
    ("number", "words", "text"),
    [
        (0, ("image",), "0 images"),
        (1, ("image",), "1 image"),
        (2000, ("image",), "2,000 images"),
        (1, ("class", "classes"), "1 class"),
        (3, ("group is", "groups are"), "3 groups are"),
    ],
)
def test_a_count_has_its_noun(number: int, words: tuple[str, ...], text: str) -> None:
    assert count_of(number, *words) == text
