"""Tables whose images are addresses on the web or in a bucket: each is downloaded once.

The downloads are kept in the cache (`image_store`), with their SHA-256; an interrupted command goes
on with what is missing. http and https are read with Python's own client, within the bounds of
`data.download`; s3, gs and other buckets through fsspec and its package for them.

An address is read because the user's own table names it: unlike the server, which reads none, this
may be one of a private network, where many keep their images. A public address that redirects into
a private network is refused.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib
import re
import socket
import ssl
import time
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from threefold.counting import counted
from threefold.data.content_kinds import HEAD, describe_other, find_format
from threefold.data.download import open_url
from threefold.data.image_headers import MAX_FILE_BYTES
from threefold.data.sources.folder import (
    EncodedImages,
    ListedImage,
    Listing,
    find_absent,
    read_file,
)
from threefold.data.sources.image_store import ImageStore, StoredRows, StoreWriter
from threefold.data.sources.named_files import find_by_name
from threefold.errors import DataError, shorten
from threefold.names import count_of

THREADS: Final = 16
"""Downloads at the same time."""
TRIES: Final = 4
"""Of an address that a server does not answer in order."""
PAUSE: Final = 0.5
"""Seconds before the second try; doubled before each further one."""
MAX_PAUSE: Final = 30.0
"""Seconds that a server may ask to wait for."""
MAX_UNANSWERED: Final = 50
"""Addresses in succession that no server answers, from which the network counts as down."""

BUCKETS: Final = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    "hf": "huggingface_hub",
}
"""Protocols that fsspec reads, and the package that it needs for each."""
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://\S", re.IGNORECASE)
_UNANSWERED = (ConnectionError, TimeoutError, socket.gaierror)


def is_address(path: str) -> bool:
    """Whether a path in a table is an address: `https://...`, `s3://...`."""
    return _ADDRESS.match(path) is not None


def restore_address(path: str | Path) -> str:
    """Return an address as it was before pathlib took one of its slashes."""
    text = str(path)
    return re.sub(r"^([A-Za-z][\w+.-]+):/{1,2}(?=[^/])", r"\1://", text)


def check_address(address: str, where: str) -> None:
    """Check that images can be read from an address of this kind.

    Raises:
        DataError: they cannot.
    """
    match = _ADDRESS.match(address)
    protocol = match[1].lower() if match else ""
    if protocol not in ("http", "https", *BUCKETS):
        raise DataError(
            "images are not read from an address of this kind",
            where=where,
            expected=", ".join(f"{name}://" for name in ("https", "http", *BUCKETS)),
            got=address[:200],
            fix="give such an address, or the path of a file",
        )


def name_address(address: str) -> str:
    """Return the id of an image at an address, which is the same in every run.

    Users and passwords are left out. So are queries, which may be signatures; a hash of the query
    takes its place, since `?id=1` and `?id=2` are two images.
    """
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    name = f"{parts.scheme.lower()}://{host}{parts.path}"
    if parts.query:
        name += f"?{hashlib.sha256(parts.query.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"
    return name


class UnreadAddressError(Exception):
    """Why nothing was read from an address.

    Args:
        reason: one line.
        is_answered: whether a server said so.
    """

    def __init__(self, reason: str, is_answered: bool) -> None:
        super().__init__(" ".join(reason.split())[:300])
        self.is_answered = is_answered


def list_files(
    items: list[ListedImage],
    addresses: Mapping[int, str],
    folder: Path,
    table: str,
    kind: str,
    try_again: bool,
) -> Listing:
    """List the rows of a table that names files, addresses, or some of both.

    Args:
        items: all rows, with the id of each.
        addresses: the address of each row that has one, by position.
        folder: what paths are relative to.
        table: its name, for messages and for the cache.
        kind: what the table is, for messages.
        try_again: as `fetch_images`, which also has the errors.

    Raises:
        DataError: a file does not exist, or a name fits several.
    """
    local = [item for row, item in enumerate(items) if row not in addresses]
    located, notes = find_by_name(local, folder, table)
    missing = find_absent(located)
    if missing:
        files = count_of(len(missing), f"file of {kind} does", f"files of {kind} do")
        raise DataError(f"{files} not exist", where=table, got=shorten(missing))
    if not addresses:
        return Listing(located, notes)
    local_files = iter(located)
    listed = [
        (item if row in addresses else next(local_files))._replace(row=row)
        for row, item in enumerate(items)
    ]
    encoded, more = fetch_images(listed, addresses, table, try_again)
    return Listing(listed, notes + more, encoded=encoded)


def fetch_images(
    items: Sequence[ListedImage],
    addresses: Mapping[int, str],
    origin: str,
    try_again: bool,
) -> tuple[EncodedImages, list[str]]:
    """Download the images of a table that are addresses, unless that is done.

    An address that gives no image is recorded with the reason: reading its row is then an error,
    so that the row is refused or left out as any other bad image is, and no label moves.

    Args:
        items: all rows of the table; `row` of each is its position.
        addresses: the address of each row that has one.
        origin: the table; what it names is downloaded once.
        try_again: whether addresses that failed before are tried again. If not, a resumed run sees
            the images that it has seen before.

    Returns:
        The images of all rows, those of files included, and a note.

    Raises:
        DataError: the cache cannot be written or is damaged, a package is missing, or the network
            is down.
    """
    store = ImageStore(f"addresses of {origin}")
    rows = {items[row].id: row for row in addresses}
    stored = _find_stored(store, rows, len(items))

    def is_missing(row: int) -> bool:
        return not stored.has(row) and (try_again or row not in stored.errors)

    if any(map(is_missing, addresses)):
        with store.appending() as writer:
            # Another process may have downloaded some while this one waited for its turn.
            stored = _find_stored(store, rows, len(items))
            missing = [(name, addresses[row]) for name, row in rows.items() if is_missing(row)]
            _fetch(missing, writer, len(rows))
        stored = _find_stored(store, rows, len(items))
    files = {row: item.path for row, item in enumerate(items) if row not in addresses}

    def read(row: int) -> bytes:
        return read_file(Path(files[row])) if row in files else stored.read(row)

    def identify(row: int) -> bytes:
        return b"" if row in files else stored.identify(row)

    addressed = count_of(len(rows), "image is an address", "images are addresses")
    note = f"{addressed}; the copies are in {store.folder}"
    if stored.errors and not try_again:
        note += f"; {len(stored.errors):,} gave none: remove that folder to try them again"
    return EncodedImages(read, np.arange(len(items)), identify), [note]


def _find_stored(store: ImageStore, rows: Mapping[str, int], count: int) -> StoredRows:
    """Look up the rows whose images are in the store, by id."""
    stored = StoredRows(store, count)
    for entry in store.entries():
        row = rows.get(entry.key)
        stored.place(entry, [] if row is None else [row])
    return stored


class _Fetched(NamedTuple):
    name: str
    content: bytes | None
    error: UnreadAddressError | None


def _fetch(missing: Sequence[tuple[str, str]], writer: StoreWriter, total: int) -> None:
    """Download what is missing, a bounded number at a time, and append it as it comes."""
    unanswered = 0
    done = total - len(missing)
    for fetched in counted(_fetch_all(missing), "images downloaded", total, done):
        error = fetched.error
        if error is not None and not error.is_answered:
            unanswered += 1
            if unanswered >= min(MAX_UNANSWERED, len(missing)):
                raise DataError(
                    "the images cannot be downloaded: no server answers",
                    where=fetched.name,
                    got=error,
                    fix="check the network and run the same command again: what was downloaded is "
                    "kept",
                )
        else:
            unanswered = 0
        writer.append(fetched.name, fetched.content, "" if error is None else str(error))


def _fetch_all(missing: Sequence[tuple[str, str]]) -> Iterator[_Fetched]:
    """Yield downloads in the order in which they end; few are in memory at any time."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="download")
    running: set[Future[_Fetched]] = set()
    rest = iter(missing)
    try:
        while True:
            while len(running) < 2 * THREADS and (entry := next(rest, None)) is not None:
                running.add(pool.submit(_fetch_one, *entry))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _fetch_one(name: str, address: str) -> _Fetched:
    try:
        return _Fetched(name, read_image(address), None)
    except UnreadAddressError as error:
        return _Fetched(name, None, error)


def read_image(address: str) -> bytes:
    """Return the image file at an address; tried again where a server is busy or breaks off.

    Raises:
        UnreadAddressError: there is none.
        DataError: the package for the bucket is not installed.
    """
    is_web = address.lower().startswith(("http:", "https:"))
    pause = PAUSE
    for attempt in range(1, TRIES + 1):
        try:
            content = _read_web(address) if is_web else _read_bucket(address)
            break
        except _Temporary as error:
            if attempt == TRIES:
                raise UnreadAddressError(str(error), error.is_answered) from None
            time.sleep(min(max(pause, error.pause), MAX_PAUSE))
            pause *= 2
    head = content[:HEAD]
    if not find_format(head):
        what = describe_other(head) or "the content is of no image format that is read"
        raise UnreadAddressError(f"not an image: {what}" if content else "0 bytes", True)
    return content


class _Temporary(Exception):
    """A failure that another try may not have; `pause` is what the server asks to wait for."""

    def __init__(self, reason: object, is_answered: bool, pause: float = 0.0) -> None:
        super().__init__(str(reason))
        self.is_answered, self.pause = is_answered, pause


def _read_web(address: str) -> bytes:
    """Return what an http server sends."""
    try:
        with open_url(address, {"Accept": "image/*,*/*;q=0.5"}) as response:
            content: bytes = response.read(MAX_FILE_BYTES + 1)
            length = int(response.headers.get("Content-Length") or len(content))
    except urllib.error.HTTPError as error:
        error.close()
        reason = f"{error.code} {error.reason}"
        if error.code < 500 and error.code not in (408, 425, 429):
            raise UnreadAddressError(reason, True) from None
        asked = error.headers.get("Retry-After") or ""
        raise _Temporary(reason, True, float(asked) if asked.isdigit() else 0.0) from None
    except DataError as error:  # an unsafe redirect
        raise UnreadAddressError(f"{error.what}: {error.got}", True) from None
    except (ValueError, http.client.InvalidURL) as error:
        raise UnreadAddressError(f"not an address: {error}", True) from None
    except (http.client.HTTPException, ssl.SSLError) as error:
        raise _Temporary(error or type(error).__name__, True) from None
    except OSError as error:  # URLError, too
        cause = getattr(error, "reason", None) or error
        raise _Temporary(cause or type(error).__name__, False) from None
    if len(content) > MAX_FILE_BYTES:
        raise UnreadAddressError(f"more than {MAX_FILE_BYTES:,} bytes", True)
    if len(content) < length:
        raise _Temporary(f"{len(content):,} of {length:,} bytes arrived", True)
    return content


def _read_bucket(address: str) -> bytes:
    """Return a file of a bucket, through fsspec."""
    package = BUCKETS.get(address.partition(":")[0].lower(), "fsspec")
    try:
        fsspec: Any = importlib.import_module("fsspec")
        with fsspec.open(address, "rb") as stream:
            content: bytes = stream.read(MAX_FILE_BYTES + 1)
    except ImportError as error:
        raise DataError(
            "a package for these addresses is not installed",
            where=address.partition("?")[0],
            got=error,
            fix=f"pip install fsspec {package}",
        ) from None
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UnreadAddressError(f"{type(error).__name__}: {error}", True) from None
    except _UNANSWERED as error:
        raise _Temporary(f"{type(error).__name__}: {error}", False) from None
    except Exception as error:  # each package has errors of its own
        raise _Temporary(f"{type(error).__name__}: {error}", True) from None
    if len(content) > MAX_FILE_BYTES:
        raise UnreadAddressError(f"more than {MAX_FILE_BYTES:,} bytes", True)
    return content
