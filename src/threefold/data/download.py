"""Download the paper's data sets from where they are published: resumed, bounded, and checked.

A file is complete and checked, or absent. An incomplete file is called `.part`, and the next call
resumes it; a file with a wrong checksum is renamed to `.refused`. If no checksum is published, the
first download's is recorded in `fetched.json`, and later downloads must agree with it.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import ipaddress
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
from urllib.parse import urlsplit

from threefold.data.published import PublishedDataset, RemoteFile, find_published
from threefold.data.sources.archives import unpack_beside
from threefold.errors import DataError, RunError
from threefold.json_files import read_json, write_json

ProgressCallback = Callable[[str, int, int], None]
"""Called with the file's name, the bytes on disk, and the total bytes (0 = unknown)."""

MAX_TRIES = 5
"""Consecutive tries without a new byte before a download fails."""

DISK_RESERVE = 1 << 28
"""Bytes of the disk that stay free."""

_BLOCK = 1 << 20
_TIMEOUT = 60.0
_UNREACHABLE = {errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}


def fetch(
    name: str,
    root: str | Path,
    *,
    extra: bool = False,
    accept_licence: bool = False,
    on_progress: ProgressCallback | None = None,
) -> list[Path]:
    """Download the official files of a data set into a folder, for `data.root`.

    Files that exist already are checked and kept. Archives of image files are unpacked beside
    themselves.

    Args:
        name: a key of `PUBLISHED`.
        root: the folder, made if needed.
        extra: also download the files that `data.extra` needs.
        accept_licence: whether the user accepts the terms of use; required if they restrict it.
        on_progress: called after each block.

    Returns:
        The files.

    Raises:
        DataError: the terms are not accepted, an account is needed, the disk is full, the server
            refuses or breaks off too often, or a checksum is wrong.
    """
    dataset, folder = find_published(name), Path(root).expanduser()
    if dataset.must_accept and not accept_licence:
        raise DataError(
            f"the terms of {dataset.title} have to be accepted",
            where=dataset.homepage,
            got=f"terms: {dataset.licence}",
            fix="read them there, then add --accept-licence",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError("cannot make the folder", where=folder, got=error) from None
    if dataset.kaggle:
        return [_download_from_kaggle(dataset, folder)]
    paths = []
    for remote in dataset.files + (dataset.extra_files if extra else ()):
        path = download_file(remote, folder, on_progress)
        if remote.unpack:
            unpack_beside(path)
        paths.append(path)
    return paths


def download_file(
    remote: RemoteFile,
    folder: Path,
    on_progress: ProgressCallback | None = None,
    pause: float = 1.0,
) -> Path:
    """Download one file from the first mirror that serves it completely.

    Args:
        remote: the file.
        folder: where to put it and `fetched.json`.
        on_progress: called after each block.
        pause: seconds before the second try; doubled before each further one.

    Raises:
        DataError: as for `fetch`.
    """
    target, part = folder / remote.name, folder / f"{remote.name}.part"
    try:
        if target.is_file():
            _check_digest(target, remote, refused=None)
        else:
            _download_from_mirrors(remote, part, on_progress, pause)
            _check_digest(part, remote, refused=folder / f"{remote.name}.refused")
            os.replace(part, target)
            _origin_path(part).unlink(missing_ok=True)
    except OSError as error:
        raise DataError("cannot write", where=error.filename or target, got=error) from None
    return target


# Checksums


def _check_digest(path: Path, remote: RemoteFile, refused: Path | None) -> None:
    """Compare a file with its published or recorded checksums, and record its SHA-256.

    Args:
        path: the file.
        remote: what it should be.
        refused: where to move a wrong file; None leaves it in place.
    """
    digests = {"md5": hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256()}
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            for digest in digests.values():
                digest.update(block)
    actual = {kind: digest.hexdigest() for kind, digest in digests.items()}
    record = path.parent / "fetched.json"
    recorded = _read_record(record)
    expected = {"md5": remote.md5, "sha256": remote.sha256 or recorded.get(remote.name, "")}
    for kind, value in expected.items():
        if value and value != actual[kind]:
            if refused is not None:
                os.replace(path, refused)
                _origin_path(path).unlink(missing_ok=True)
            what, fix = "the file has changed", "remove it and run the command again"
            if remote.md5 or remote.sha256:
                what = "the file is not the published one"
            if refused is not None:
                fix = "run the same command again to download it anew"
            raise DataError(
                what,
                where=refused or path,
                expected=f"{kind} {value}",
                got=actual[kind],
                fix=fix,
            )
    if recorded.get(remote.name) != actual["sha256"]:
        write_json(record, {**recorded, remote.name: actual["sha256"]})


def _read_record(record: Path) -> dict[str, str]:
    """SHA-256 by file name, of earlier downloads."""
    if not record.is_file():
        return {}
    try:
        tree = read_json(record)
    except RunError as error:
        what = "the record of downloads is damaged"
        raise DataError(what, where=record, got=error, fix="remove it") from None
    return {str(name): str(value) for name, value in tree.items()} if isinstance(tree, dict) else {}


# HTTP


class _IncompleteError(Exception):
    """The connection ended early; another try may resume."""


class SafeRedirectHandler(urllib.request.HTTPRedirectHandler):
    """Follow redirects within HTTP, never from https to http or into a private network."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Build the request for the new address, or refuse it.

        Raises:
            DataError: the address is unsafe.
        """
        if not newurl.startswith("https:" if req.type == "https" else ("http:", "https:")):
            fp.close()
            what = "the server redirects to an unsafe address"
            raise DataError(what, where=req.full_url, got=newurl)
        if is_private(urlsplit(newurl).hostname) and not is_private(req.host):
            fp.close()
            what = "the server redirects into a private network"
            raise DataError(what, where=req.full_url, got=newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_private(host: str | None) -> bool:
    """Whether a host, with or without a port, has an address of a private network."""
    name = (host or "").rpartition("@")[2]
    name = re.sub(r":\d+$", "", name).strip("[]")
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        return any(not ipaddress.ip_address(entry[4][0]).is_global for entry in found)
    except (OSError, ValueError):  # unknown here: a proxy may know it
        return False


def open_url(url: str, headers: dict[str, str]) -> Any:
    """Open an http or https address; no other handler exists, so that no server can name a file."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        SafeRedirectHandler(),
    ):
        opener.add_handler(handler)
    headers = {"User-Agent": "threefold", "Accept-Encoding": "identity", **headers}
    return opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)


def _download_from_mirrors(
    remote: RemoteFile, part: Path, on_progress: ProgressCallback | None, pause: float
) -> None:
    for url in remote.urls:
        try:
            return _download_with_retries(url, remote, part, on_progress, pause)
        except DataError as error:
            last_error = error
    raise last_error


def _download_with_retries(
    url: str, remote: RemoteFile, part: Path, on_progress: ProgressCallback | None, pause: float
) -> None:
    """Fill `part`, resuming after interruptions; only tries without a new byte count."""
    tries = 0
    while True:
        size_before = _size(part)
        try:
            return _resume(url, remote, part, on_progress)
        except urllib.error.HTTPError as error:
            error.close()
            reason: object = f"{error.code} {error.reason}"
            if error.code == 416:  # the part is longer than the file is now
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                raise DataError("the server refuses", where=url, got=reason) from None
        except (
            _IncompleteError,
            http.client.HTTPException,
            urllib.error.URLError,
            ssl.SSLError,
            ConnectionError,
            TimeoutError,
        ) as error:
            reason = getattr(error, "reason", None) or error or type(error).__name__
        tries = 1 if _size(part) > size_before else tries + 1
        if tries >= 2 and _is_unreachable(reason):
            target = part.with_suffix("")
            fix = f"check the network, or download it elsewhere and put it at {target}"
            raise DataError("the server cannot be reached", where=url, got=reason, fix=fix)
        if tries >= MAX_TRIES:
            fix = "run the same command again: the bytes that arrived are kept"
            raise DataError("the download broke off too often", where=url, got=reason, fix=fix)
        time.sleep(pause * 2 ** (tries - 1))


def _is_unreachable(reason: object) -> bool:
    """Whether no server answered: unknown host, refused connection, or a refusing proxy."""
    if isinstance(reason, socket.gaierror):
        return True
    return isinstance(reason, OSError) and (
        reason.errno in _UNREACHABLE or "Tunnel connection failed" in str(reason)
    )


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


class _BodyRange(NamedTuple):
    """What the body of a response holds."""

    start: int
    total: int
    """Bytes of the whole file; 0 = the server does not say."""


def _parse_range(status: int, headers: Message, offset: int, url: str) -> _BodyRange:
    """Read the range of a response to a request for the bytes from `offset` on."""
    length = int(headers.get("Content-Length") or 0)
    if status != 206:
        return _BodyRange(0, length)
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range") or "")
    if not match or int(match[1]) != offset:
        what = "the server sends another part than requested"
        raise DataError(what, where=url, expected=f"bytes {offset}-")
    total = offset + length if match[3] == "*" else int(match[3])
    return _BodyRange(offset, total)


def _resume(url: str, remote: RemoteFile, part: Path, on_progress: ProgressCallback | None) -> None:
    """Append to `part` if the server still has the same file; otherwise start again."""
    offset, validator = _size(part), _read_validator(part, url)
    headers = {}
    if offset and validator:
        headers = {"Range": f"bytes={offset}-", "If-Range": validator}
    with open_url(url, headers) as response:
        start, total = _parse_range(response.status, response.headers, offset, url)
        if remote.size and total and total != remote.size:
            what = "the server has a file of another size"
            raise DataError(what, where=url, expected=remote.size, got=total)
        size = total or remote.size
        _check_disk(part, size - start)
        _write_validator(part, url, response.headers)
        with open(part, "r+b" if start else "wb") as file:
            file.seek(start)
            position = start
            while block := response.read(_BLOCK):
                position += len(block)
                if size and position > size:
                    raise DataError("the server sends more than it announced", where=url)
                _check_disk(part, len(block))
                file.write(block)
                if on_progress:
                    on_progress(remote.name, position, size)
    if position < size:
        raise _IncompleteError(f"{position:,} of {size:,} bytes arrived")


def _check_disk(part: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if free < num_bytes + DISK_RESERVE:
        raise DataError(
            "the disk is too small for the download",
            where=part.parent,
            expected=f"{(num_bytes + DISK_RESERVE) / 1e9:.1f} GB free",
            got=f"{free / 1e9:.1f} GB",
            fix="free disk space or choose another --to; the bytes that arrived are kept",
        )


def _origin_path(part: Path) -> Path:
    """The file beside a part with its address and its validator (RFC 9110, If-Range)."""
    return part.with_name(part.name + ".from")


def _write_validator(part: Path, url: str, headers: Message) -> None:
    etag = headers.get("ETag") or ""
    if not etag or etag.startswith("W/"):  # a weak tag does not promise equal bytes
        etag = headers.get("Last-Modified") or ""
    _origin_path(part).write_text(f"{url}\n{etag}", encoding="utf-8")


def _read_validator(part: Path, url: str) -> str:
    """The validator of the version that `part` begins; empty if it is unknown."""
    with suppress(OSError, ValueError):
        origin, _, validator = _origin_path(part).read_text(encoding="utf-8").partition("\n")
        return validator if origin == url else ""
    return ""


# Kaggle


def _download_from_kaggle(dataset: PublishedDataset, folder: Path) -> Path:
    """Download a competition's archive by Kaggle's program, which needs the user's account."""
    archive = folder / f"{dataset.kaggle}.zip"
    if not archive.is_file():
        program = shutil.which("kaggle")
        if program is None or not _has_kaggle_token():
            raise DataError(
                f"{dataset.title} needs a Kaggle account",
                where=dataset.homepage,
                fix=f"accept the rules there and download all files as {archive}; or pip install "
                "kaggle, put your API token where it looks for it (~/.kaggle/kaggle.json), and "
                "run the same command again",
            )
        command = [program, "competitions", "download", "-c", dataset.kaggle, "-p", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode or not archive.is_file():
            output = result.stderr.strip() or result.stdout.strip() or "no file"
            raise DataError(
                "Kaggle's program could not download",
                where=dataset.kaggle,
                got=output.splitlines()[-1][:200],
                fix=f"accept the rules at {dataset.homepage}, then run the same command again",
            )
    _check_digest(archive, RemoteFile(archive.name, ()), refused=None)
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
