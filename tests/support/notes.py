"""A watcher that keeps what it is told."""

from __future__ import annotations

from threefold.training.progress.watcher import Watcher


class Notes(Watcher):
    """Keeps notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def has(self, *words: str) -> bool:
        return any(all(word in note for word in words) for note in self.notes)
