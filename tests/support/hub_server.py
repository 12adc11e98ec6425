"""A stand-in of the Hugging Face hub on this machine: repositories of models, in memory.

It speaks the HTTP of the hub's client for creating, committing, listing and downloading. Large
files travel as regular ones here; the hub's own storage of chunks has no stand-in.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from support.http_server import running

COMMIT = "1" * 40
TOKEN = "hf_of_a_test"


class Hub:
    """The repositories, and what has been asked.

    Attributes:
        repositories: files by path, of each USER/NAME.
        private: repositories that only the token's owner sees.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.address = ""

    def create(self, name: str, owner: str, private: bool) -> str:
        """Create a repository; returns USER/NAME."""
        repository = f"{owner}/{name}"
        self.repositories.setdefault(repository, {})
        if private:
            self.private.add(repository)
        return repository

    def commit(self, repository: str, lines: bytes) -> None:
        """Store the files of a commit, lines of JSON as the client sends them."""
        for line in lines.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.repositories[repository][entry["value"]["path"]] = content


class HubHandler(BaseHTTPRequestHandler):
    """Answers the requests of the hub's client."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlparse(self.path).path)
        is_question = "/paths-info/" in path
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not is_question:
            self.answer(401, {"error": "Invalid username or password."})
            return
        if is_question:
            files = self.find("/".join(path.split("/")[3:5])) or {}
            wanted = (
                parse_qs(body.decode())["paths"] if body[:1] != b"{" else json.loads(body)["paths"]
            )
            self.answer(200, [e for e in list_tree(files, "", True) if e["path"] in wanted])
        elif path == "/api/repos/create":
            tree = json.loads(body)
            owner = tree.get("organization") or "owner"
            private = bool(tree.get("private")) or tree.get("visibility") == "private"
            repository = self.hub.create(tree["name"], owner, private)
            self.answer(200, {"url": f"{self.hub.address}/{repository}", "name": repository})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif "/commit/" in path:
            repository = path.removeprefix("/api/models/").partition("/commit/")[0]
            self.hub.commit(repository, body)
            url = f"{self.hub.address}/{repository}/commit/{COMMIT}"
            self.answer(200, {"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        else:
            self.answer(404, {"error": f"no {path}"})

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if path == "/api/whoami-v2":
            self.answer(200, {"type": "user", "name": "owner", "orgs": []})
        elif path.startswith(("/api/models/", "/api/datasets/")):
            self.list_files(path.split("/", 3)[3])
        else:
            self.send_file(path.removeprefix("/datasets"))

    do_HEAD = do_GET

    def find(self, repository: str) -> dict[str, bytes] | None:
        """The files that the client may see; None and an answer if there are none."""
        files = self.hub.repositories.get(repository)
        is_owner = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if files is None or (repository in self.hub.private and not is_owner):
            self.answer(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        return files

    def list_files(self, path: str) -> None:
        repository = "/".join(path.split("/")[:2])
        files = self.find(repository)
        if files is None:
            return
        if "/tree/" in path:
            folder = path.partition("/tree/")[2].partition("/")[2]
            is_recursive = "recursive=false" not in self.path.lower()
            self.answer(200, list_tree(files, folder, is_recursive))
            return
        siblings = [{"rfilename": name} for name in files]
        self.answer(200, {"id": repository, "sha": COMMIT, "siblings": siblings})

    def send_file(self, path: str) -> None:
        repository, _, rest = path.strip("/").partition("/resolve/")
        files = self.find(repository)
        if files is None:
            return
        content = files.get(rest.partition("/")[2])
        if content is None:
            self.answer(404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound"})
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        etag, total = blob_id(content), len(content)
        if span:
            first, last = int(span[1]), min(int(span[2] or total - 1), total - 1)
            content = content[first : last + 1]
        self.send_response(206 if span else 200)
        if span:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def answer(self, status: int, tree: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(tree).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a hub; its address is in `Hub.address`."""
    hub = Hub()
    handler = type("Handler", (HubHandler,), {"hub": hub})
    with running(handler) as address:
        hub.address = address
        yield hub


def list_tree(files: dict[str, bytes], folder: str, is_recursive: bool) -> list[dict[str, Any]]:
    """The entries of a folder; empty = the root."""
    prefix = f"{folder}/" if folder else ""
    inside = {name: content for name, content in files.items() if name.startswith(prefix)}
    entries = []
    if not is_recursive:
        folders = {name[len(prefix) :].partition("/")[0] for name in inside}
        names = {name[len(prefix) :] for name in inside}
        entries = [
            {"type": "directory", "path": prefix + name, "size": 0, "oid": "0" * 40}
            for name in sorted(folders - names)
        ]
        inside = {name: c for name, c in inside.items() if "/" not in name[len(prefix) :]}
    return entries + [
        {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
        for name, content in inside.items()
    ]


def blob_id(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
