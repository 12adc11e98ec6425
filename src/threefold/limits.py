"""What a server takes and what it refuses: the limits, and refusals that say which one and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from threefold.errors import RecipeError


@dataclass(frozen=True)
class Limits:
    """Bounds of a server; together they bound its memory, whatever is sent.

    Attributes:
        files: images in a request.
        file_bytes: bytes of an image file.
        body_bytes: bytes of a request.
        total_bytes: bytes of all requests that are being read or answered.
        pixels: width x height of an image; about 26 bytes each are needed while it is decoded and resized.
        side: width or height of an image.
        requests: requests to /predict at a time.
        connections: open connections.
        header_seconds: until the header of a request has arrived, and for what a client goes on sending after its answer.
        body_seconds: until the body has arrived.
        answer_seconds: from the last byte of the request to its answer.
        batch: images that the model is given at once.
    """

    files: int = 64
    file_bytes: int = 20 * 2**20
    body_bytes: int = 32 * 2**20
    total_bytes: int = 64 * 2**20
    pixels: int = 20_000_000
    side: int = 16_384
    requests: int = 64
    connections: int = 512
    header_seconds: int = 10
    body_seconds: int = 30
    answer_seconds: int = 30
    batch: int = 8

    def changed(self, changes: Iterable[str]) -> Limits:
        """These limits with some of them changed, each given as `name=number`.

        Raises:
            RecipeError: no such limit, or not a whole number above 0.
        """
        known, found = {field.name for field in fields(self)}, {}
        for change in changes:
            name, _, value = change.partition("=")
            if name not in known:
                raise RecipeError(
                    "no such limit", got=name, expected=f"one of {', '.join(sorted(known))}"
                )
            if not (value.isascii() and value.isdigit() and int(value[:15]) > 0):
                raise RecipeError(
                    "not a limit",
                    where=name,
                    expected="a whole number above 0",
                    got=value or "nothing",
                )
            found[name] = int(value[:15])
        return replace(self, **found)


class Refusal(Exception):
    """A request that is not answered: status, a word for programs, a sentence for people, and the file it is about."""

    def __init__(self, status: int, code: str, message: str, file: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.file = status, code, message, file

    def tree(self) -> dict[str, dict[str, str]]:
        """The body of the answer."""
        told = {"code": self.code, "message": self.message}
        return {"error": told if self.file is None else {**told, "file": self.file}}

    def headers(self) -> dict[str, str]:
        """What the status asks for beside the body."""
        if self.status in (429, 503):
            return {"retry-after": "1"}
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}
