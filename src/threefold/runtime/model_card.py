"""Check the text of a model card, so that whatever shows it gets values of the kinds it expects."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from threefold.tasks import TASKS

MAX_CLASSES: Final = 100_000
MAX_MEMBERS: Final = 1_000
MAX_NAME: Final = 1_000
"""Characters of a name."""
MAX_DEPTH: Final = 32
"""Limit on the nesting of a card's values."""
MAX_COUNT: Final = 10**12
"""Limit on counts, such as the number of training images."""

_TEXTS: Final = ("name", "method", "precision", "digest", "taught_by")
_OBJECTS: Final = ("score", "parity", "versions", "hashes", "unknown", "cascade")
_ONE_CLASS: Final = ("conformal", "unknown", "cascade")
"""Parts of a card that mean something only where an image has one class."""
_SHARES: Final = ("accuracy", "value", "macro_f1", "micro_f1", "level")  # of a score, in 0..1
_SCORE_TEXTS: Final = ("metric", "rows", "protocol", "fitted_on")


class CardError(ValueError):
    """What is wrong with a model card."""


def parse_card(content: bytes) -> dict[str, Any]:
    """Parse a model card, and check the values that the server, the page and the tools show.

    Values that are missing or null are not checked, except the names of classes and members.

    Raises:
        CardError: it is not JSON, or a value is not of its kind.
    """
    try:
        card = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise CardError(f"the model card is damaged ({type(error).__name__})") from None
    if not isinstance(card, dict):
        raise CardError("the model card is not an object")
    _check_nesting(card)
    try:
        json.dumps(card, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise CardError("the model card has half of a character (a lone surrogate)") from None
    for key, limit in (("classes", MAX_CLASSES), ("members", MAX_MEMBERS)):
        _check_names(card, key, limit)
    for key in _TEXTS:
        _require(card, key, _is_text, "text")
    for key in _OBJECTS:
        _require(card, key, lambda value: isinstance(value, dict), "an object")
    _require(card, "backbones", _is_texts, "a list of texts")
    _require(card, "versions", lambda value: _is_texts([*value.values()]), "texts by name")
    _require(card, "n_train", _is_count, "a number of images")
    _require(card, "temperature", _is_number, "a number")
    _require(card, "fixed_size", _is_count, "a number of pixels")
    _check_score(card.get("score") or {})
    _check_task(card)
    return card


def _check_task(card: Mapping[str, Any]) -> None:
    """Refuse an unknown task, and parts that do not belong to the task."""
    task = card.get("task")
    if task is not None and task not in TASKS:
        raise CardError(f"the model card has the task {task!a:.40}, of another version")
    if task != "multilabel":
        return
    thresholds = card.get("thresholds")
    if not (
        isinstance(thresholds, list)
        and len(thresholds) == len(card["classes"])
        and all(_is_number(value) and math.isfinite(value) for value in thresholds)
    ):
        raise CardError("the model card's thresholds are not a number for each label")
    for key in _ONE_CLASS:
        if card.get(key):
            raise CardError(f"the model card has {key}, which a multilabel model cannot have")


def _check_names(card: Mapping[str, Any], key: str, limit: int) -> None:
    names = card.get(key)
    if not (isinstance(names, list) and 1 <= len(names) <= limit and all(map(_is_name, names))):
        raise CardError(f"the model card has no {key}, or some that are not names")
    if len(set(names)) != len(names):
        raise CardError(f"the model card has two {key} of one name")


def _check_score(score: Mapping[str, Any]) -> None:
    for key in _SHARES:
        _require(score, key, _is_share, "a share in 0..1", "score.")
    for key in _SCORE_TEXTS:
        _require(score, key, _is_text, "text", "score.")
    _require(score, "n", _is_count, "a number of images", "score.")
    _require(score, "interval", _is_interval, "two shares in 0..1", "score.")


def _require(values: Mapping[str, Any], key: str, is_right: Any, kind: str, path: str = "") -> None:
    """Raise a CardError if there is a value that is not of its kind."""
    value = values.get(key)
    if value is not None and not is_right(value):
        raise CardError(f"the model card's {path}{key} is not {kind}")


def _check_nesting(tree: Any, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise CardError(f"the model card is nested more than {MAX_DEPTH} deep")
    children: Any = ()
    if isinstance(tree, dict):
        children = tree.values()
    elif isinstance(tree, list):
        children = tree
    for child in children:
        if isinstance(child, dict | list):
            _check_nesting(child, depth + 1)


def _is_name(name: Any) -> bool:
    """Whether a name is short text without control characters, which terminals would obey."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= MAX_NAME
        and not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in name)
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (_is_int(value) and abs(value) < MAX_COUNT)


def _is_count(value: Any) -> bool:
    return _is_int(value) and 0 <= value < MAX_COUNT


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    """Whether it is a share, or a number that is not finite: the page shows none for that."""
    return _is_number(value) and (not math.isfinite(value) or 0 <= value <= 1)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_share, value))
