"""The limits of a server, and the error that refuses a request."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from threefold.errors import RecipeError, RunError

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]

SPARE_DESCRIPTORS = 448
"""Files that a process may have open besides its connections: those of Python and onnxruntime,
large uploads, and connections that are accepted only to be refused."""


@dataclass(frozen=True)
class ServerLimits:
    """Bounds of a server; together they bound its memory, whatever clients send.

    Attributes:
        files: images per request.
        file_bytes: bytes per image file.
        body_bytes: bytes per request.
        total_bytes: bytes of all requests that are being read or answered.
        pixels: width x height of an image. Decoding and resizing need about 12 bytes per pixel.
        graph_pixels: the same where members resize images to several sizes, and in the browser:
            there the graph does it, which needs about 26 bytes per pixel.
        side: width or height of an image.
        requests: concurrent requests to /predict and /explain.
        explanations: images that are being explained or wait for it; one is at a time.
        connections: open connections.
        header_seconds: until the header of a request has arrived. Also how long a client may keep
            sending after it has its answer.
        body_seconds: until the body has arrived.
        answer_seconds: from the last byte of a request to its answer.
        explain_seconds: the same for a request to /explain.
        batch: images per batch of the model.
    """

    files: int = 64
    file_bytes: int = 32 * 2**20
    body_bytes: int = 40 * 2**20
    total_bytes: int = 64 * 2**20
    pixels: int = 50_000_000
    graph_pixels: int = 20_000_000
    side: int = 16_384
    requests: int = 64
    explanations: int = 4
    connections: int = 512
    header_seconds: int = 10
    body_seconds: int = 30
    answer_seconds: int = 30
    explain_seconds: int = 120
    batch: int = 8

    def override(self, assignments: Iterable[str]) -> ServerLimits:
        """Return a copy in which some limits have new values.

        Args:
            assignments: texts such as `pixels=1000000`.

        Raises:
            RecipeError: no limit has that name, or the value is not a whole number above 0.
        """
        names = {field.name for field in fields(self)}
        values = {}
        for assignment in assignments:
            name, _, text = assignment.partition("=")
            if name not in names:
                raise RecipeError(
                    "no such limit", got=name, expected=f"one of {', '.join(sorted(names))}"
                )
            digits = text[:15]
            if not (text.isascii() and text.isdigit() and int(digits) > 0):
                raise RecipeError(
                    "not a limit",
                    where=name,
                    expected="a whole number above 0",
                    got=text or "nothing",
                )
            values[name] = int(digits)
        return replace(self, **values)


def reserve_descriptors(limits: ServerLimits) -> None:
    """Let the process open as many files as the connections need, as far as it may.

    A server that runs out of them cannot refuse connections any more, and asyncio tries to accept
    them again and again.

    Raises:
        RunError: it may not open as many.
    """
    if resource is None:
        return
    needed = limits.connections + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise RunError(
            f"{limits.connections} connections need more open files than allowed",
            expected=f"a limit of {needed} (ulimit -n)",
            got=hard,
            fix=f"--limit connections={max(1, hard - SPARE_DESCRIPTORS)}, or raise the limit",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Refusal(Exception):
    """A request that the server refuses.

    Args:
        status: the HTTP status.
        code: a word for programs.
        message: a sentence for people.
        file: the client's name of the image concerned, if one is.
    """

    def __init__(self, status: int, code: str, message: str, file: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.file = status, code, message, file

    def body(self) -> dict[str, dict[str, str]]:
        """The JSON body of the response."""
        error = {"code": self.code, "message": self.message}
        if self.file is not None:
            error["file"] = self.file
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """The response headers that the status calls for."""
        if self.status in (429, 503):
            return {"retry-after": "1"}
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}
