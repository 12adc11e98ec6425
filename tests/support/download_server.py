"""A local server of files, with faults on request."""

from __future__ import annotations

import hashlib
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from threefold.data.published import PUBLISHED, PublishedDataset

CONTENT = os.urandom(3_000_000)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        requested_range = self.headers.get("Range")
        server.requests.append((self.path, requested_range))
        if server.errors:
            return self.send_error(server.errors.pop(0))
        if self.path in server.redirects:
            self.send_response(302)
            self.send_header("Location", server.redirects[self.path])
            return self.end_headers()
        if self.path not in server.files:
            return self.send_error(404)
        content, start = server.files[self.path], 0
        if requested_range and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(requested_range.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            first = start + server.shift
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        body = content[start:]
        self.send_header(
            "Content-Length", str(len(body) if server.length is None else server.length)
        )
        self.end_headers()
        if server.cuts:
            server.cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)
        self.close_connection = True
        return None

    def log_message(self, *_: object) -> None: ...


class Server(ThreadingHTTPServer):
    """Its files, its behaviour, and the requests it received."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Stay quiet: some tests break the connection."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"/file": CONTENT}
        self.requests: list[tuple[str, str | None]] = []
        self.cuts = 0  # responses that break off half way
        self.ranges = True
        self.etag = '"one"'
        self.errors: list[int] = []
        self.redirects: dict[str, str] = {}
        self.length: int | None = None  # a wrong Content-Length
        self.shift = 0  # offset of a wrong Content-Range

    def url(self, path: str = "/file") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


def served(
    server: Server, name: str, root: Path, monkeypatch: pytest.MonkeyPatch, **facts: Any
) -> PublishedDataset:
    """Serve a sample as a published data set, in place of the official files."""
    files = []
    for old in PUBLISHED[name].files:
        server.files[f"/{old.name}"] = (root / old.name).read_bytes()
        digest = hashlib.sha256(server.files[f"/{old.name}"]).hexdigest()
        files.append(
            old._replace(urls=(server.url(f"/{old.name}"),), size=0, md5="", sha256=digest)
        )
    dataset = PUBLISHED[name]._replace(files=tuple(files), **facts)
    monkeypatch.setitem(PUBLISHED, name, dataset)
    return dataset
