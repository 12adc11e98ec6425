"""Downloads of the paper's data sets from where they are published: resumed, bounded, and checked.

A file is whole and checked, or it is not there: what is not complete has the name `.part` and is gone on with in the
next call, what has a wrong checksum is put aside as `.refused`. Where no checksum is published, the one of the first
download is recorded in `fetched.json` and later ones have to agree with it.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from email.message import Message
from pathlib import Path
from typing import IO, Any, NamedTuple

from threefold.archives import unpack_beside
from threefold.data__published import PublishedDataset, RemoteFile, find_published
from threefold.errors import DataError, RunError
from threefold.files import read_json, write_json

Watcher = Callable[[str, int, int], None]
"""Told the file's name, the bytes that are there, and the bytes in all (0 = unknown)."""

_BLOCK = 1 << 20
_RESERVE = 1 << 28
_TRIES = 5
_UNREACHED = {errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}
_TIMEOUT = 60.0


def fetch(
    name: str,
    root: str | Path,
    *,
    extra: bool = False,
    accept_licence: bool = False,
    watcher: Watcher | None = None,
) -> list[Path]:
    """Get the official files of a data set into a folder, which `data.root` may then name.

    Files that are there already are checked and kept. Archives of image files are unpacked beside themselves.

    Args:
        name: a `data.source` that is a published data set (`official.PUBLISHED`).
        root: the folder; it is made if need be.
        extra: also the files that `data.extra` needs.
        accept_licence: the terms of use (`find_published(name).licence`) are accepted; needed where they restrict the use.
        watcher: is told of the progress.

    Returns:
        The files.

    Raises:
        DataError: the terms are not accepted, an account is needed, the disk is full, the server refuses or breaks
            off too often, or a checksum is wrong.
    """
    known, folder = find_published(name), Path(root).expanduser()
    if known.must_accept and not accept_licence:
        raise DataError(
            f"the terms of {known.title} have to be accepted",
            where=known.homepage,
            got=f"terms: {known.licence}",
            fix="read them there, then add --accept-licence",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            "cannot make the folder", where=folder, got=error.strerror or error
        ) from None
    if known.kaggle:
        return [_from_kaggle(known, folder)]
    paths = []
    for remote in known.files + (known.extra_files if extra else ()):
        paths.append(download(remote, folder, watcher))
        if remote.unpack:
            unpack_beside(paths[-1])
    return paths


def download(
    remote: RemoteFile, folder: Path, watcher: Watcher | None = None, pause: float = 1.0
) -> Path:
    """One file, from the first of its addresses that gives it.

    Args:
        remote: the file.
        folder: where it goes; also where `fetched.json` is.
        watcher: is told of the progress.
        pause: seconds before the second try; doubled before each further one.

    Raises:
        DataError: as for `fetch`.
    """
    target, part = folder / remote.name, folder / f"{remote.name}.part"
    try:
        if not target.is_file():
            _receive_any(remote, part, watcher, pause)
            _require_checksum(part, remote, folder / f"{remote.name}.refused")
            os.replace(part, target)
            _sidecar(part).unlink(missing_ok=True)
        else:
            _require_checksum(target, remote, None)
    except OSError as error:
        raise DataError(
            "cannot write", where=error.filename or target, got=error.strerror or error
        ) from None
    return target


# Checksums ------------------------------------------------------------------------------------------------------------


def _require_checksum(path: Path, remote: RemoteFile, aside: Path | None) -> None:
    """The published checksums, or else the recorded one; a file that has another is moved `aside`, if that is given."""
    digests = {"md5": hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256()}
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            for digest in digests.values():
                digest.update(block)
    got = {kind: digest.hexdigest() for kind, digest in digests.items()}
    record = path.parent / "fetched.json"
    recorded = _recorded(record)
    expected = {"md5": remote.md5, "sha256": remote.sha256 or recorded.get(remote.name, "")}
    wrong = [kind for kind, value in expected.items() if value and value != got[kind]]
    if wrong:
        if aside is not None:
            os.replace(path, aside)
            _sidecar(path).unlink(missing_ok=True)
        raise DataError(
            "the file is not the published one"
            if remote.md5 or remote.sha256
            else "the file has changed",
            where=aside or path,
            expected=f"{wrong[0]} {expected[wrong[0]]}",
            got=got[wrong[0]],
            fix="run the same command again to download it anew"
            if aside
            else "remove it and run the command again",
        )
    if recorded.get(remote.name) != got["sha256"]:
        write_json(record, {**recorded, remote.name: got["sha256"]})


def _recorded(record: Path) -> dict[str, str]:
    """SHA-256 by file name, of earlier downloads."""
    if not record.is_file():
        return {}
    try:
        tree = read_json(record)
    except RunError as error:
        raise DataError(
            "the record of downloads is damaged", where=record, got=error, fix="remove it"
        ) from None
    return {str(name): str(value) for name, value in tree.items()} if isinstance(tree, dict) else {}


# HTTP -----------------------------------------------------------------------------------------------------------------


class _Cut(Exception):
    """The connection ended early; another try may go on."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows within HTTP, and never from https to http."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not newurl.startswith("https:" if req.type == "https" else ("http:", "https:")):
            fp.close()
            raise DataError(
                "the server redirects to an unsafe address", where=req.full_url, got=newurl
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, headers: dict[str, str]) -> Any:
    """Open an address; only http and https, so that no server can point to a local file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(
        url, headers={"User-Agent": "threefold", "Accept-Encoding": "identity", **headers}
    )
    return opener.open(request, timeout=_TIMEOUT)


def _receive_any(remote: RemoteFile, part: Path, watcher: Watcher | None, pause: float) -> None:
    """Fill `part` from the first address that gives the whole file."""
    for url in remote.urls:
        try:
            return _receive(url, remote, part, watcher, pause)
        except DataError as error:
            last = error
    raise last


def _receive(
    url: str, remote: RemoteFile, part: Path, watcher: Watcher | None, pause: float
) -> None:
    """Fill `part`, going on after cuts; a try that brought something does not count."""
    tries = 0
    while True:
        before = _size(part)
        try:
            return _receive_once(url, remote, part, watcher)
        except DataError:
            raise
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # the part is longer than the file now is
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise DataError(
                    "the server refuses", where=url, got=f"{error.code} {error.reason}"
                ) from None
            reason: object = f"{error.code} {error.reason}"
        except (
            _Cut,
            http.client.HTTPException,
            urllib.error.URLError,
            ssl.SSLError,
            ConnectionError,
            TimeoutError,
        ) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
        tries = 1 if _size(part) > before else tries + 1
        if tries >= 2 and _unreached(reason):
            fix = (
                f"check the network, or download it elsewhere and put it at {part.with_suffix('')}"
            )
            raise DataError("the server cannot be reached", where=url, got=reason, fix=fix)
        if tries >= _TRIES:
            fix = "run the same command again: what has arrived is kept"
            raise DataError("the download broke off too often", where=url, got=reason, fix=fix)
        time.sleep(pause * 2 ** (tries - 1))


def _unreached(reason: object) -> bool:
    """Whether no server answered at all: the name is not found, nobody listens, or a proxy does not let through."""
    if isinstance(reason, socket.gaierror):
        return True
    return isinstance(reason, OSError) and (
        reason.errno in _UNREACHED or "Tunnel connection failed" in str(reason)
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class _Answer(NamedTuple):
    """Where a server begins, and how long the whole file is (0 = it does not say)."""

    start: int
    total: int


def _answer(status: int, headers: Message, asked: int, url: str) -> _Answer:
    length = int(headers.get("Content-Length") or 0)
    if status != 206:
        return _Answer(0, length)
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range") or "")
    if not found or int(found[1]) != asked:
        raise DataError(
            "the server gives another part than was asked for",
            where=url,
            expected=f"bytes {asked}-",
        )
    return _Answer(asked, int(found[3]) if found[3] != "*" else asked + length)


def _receive_once(url: str, remote: RemoteFile, part: Path, watcher: Watcher | None) -> None:
    """Go on where `part` ends, if the server still has the same file; else begin again."""
    have, validator = _size(part), _validator(part, url)
    headers = {"Range": f"bytes={have}-", "If-Range": validator} if have and validator else {}
    with _open(url, headers) as response:
        start, total = _answer(response.status, response.headers, have, url)
        if remote.size and total and total != remote.size:
            raise DataError(
                "the server has a file of another size", where=url, expected=remote.size, got=total
            )
        _require_disk(part, (total or remote.size) - start)
        etag = response.headers.get("ETag") or ""
        strong = (
            etag
            if etag and not etag.startswith("W/")
            else response.headers.get("Last-Modified") or ""
        )
        _sidecar(part).write_text(f"{url}\n{strong}", encoding="utf-8")
        with open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            at = start
            while block := response.read(_BLOCK):
                at += len(block)
                if at > (remote.size or total or at):
                    raise DataError("the server sends more than it said", where=url)
                _require_disk(part, len(block))
                file.write(block)
                if watcher:
                    watcher(remote.name, at, total or remote.size)
    if at < (total or remote.size):
        raise _Cut(f"{at:,} of {total or remote.size:,} bytes arrived")


def _require_disk(part: Path, more: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if free < more + _RESERVE:
        raise DataError(
            "the disk is too small for the download",
            where=part.parent,
            expected=f"{(more + _RESERVE) / 1e9:.1f} GB free",
            got=f"{free / 1e9:.1f} GB",
            fix="free disk space or choose another --to; what has arrived is kept",
        )


def _sidecar(part: Path) -> Path:
    """Beside a part: its address, and what the server calls this version of the file."""
    return part.with_name(part.name + ".from")


def _validator(part: Path, url: str) -> str:
    """What the server called the version that `part` is the beginning of; empty if that is not known."""
    with suppress(OSError, ValueError):
        address, _, validator = _sidecar(part).read_text(encoding="utf-8").partition("\n")
        return validator if address == url else ""
    return ""


# Kaggle ---------------------------------------------------------------------------------------------------------------


def _from_kaggle(known: PublishedDataset, folder: Path) -> Path:
    """The archive of a competition, by Kaggle's own program, which needs the user's account."""
    archive = folder / f"{known.kaggle}.zip"
    if not archive.is_file():
        program = shutil.which("kaggle")
        if program is None or not _has_kaggle_token():
            raise DataError(
                f"{known.title} needs a Kaggle account",
                where=known.homepage,
                fix=f"accept the rules there and download all files as {archive}; or pip install kaggle, put your API "
                "token where it looks for it (~/.kaggle/kaggle.json), and run the same command again",
            )
        command = [program, "competitions", "download", "-c", known.kaggle, "-p", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not archive.is_file():
            told = (done.stderr.strip() or done.stdout.strip() or "no file").splitlines()[-1]
            fix = f"accept the rules at {known.homepage}, then run the same command again"
            raise DataError(
                "Kaggle's program could not download", where=known.kaggle, got=told[:200], fix=fix
            )
    _require_checksum(archive, RemoteFile(archive.name, ()), None)
    unpack_beside(archive)
    return archive


def _has_kaggle_token() -> bool:
    if os.environ.get("KAGGLE_API_TOKEN") or (
        os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY")
    ):
        return True
    folders = [os.environ.get("KAGGLE_CONFIG_DIR"), "~/.kaggle", "~/.config/kaggle"]
    return any(
        (Path(folder).expanduser() / "kaggle.json").is_file() for folder in folders if folder
    )
