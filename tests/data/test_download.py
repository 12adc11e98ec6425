"""Downloads from a local server: resumed, bounded, checked; and the ways a server can fail."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import stat
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from email.message import Message
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from support.download_server import CONTENT, Server, served
from support.sources import load_source

from threefold.data import download
from threefold.data.download import download_file, fetch
from threefold.data.published import PUBLISHED, RemoteFile, find_published
from threefold.data.synthetic import write_sample
from threefold.errors import DataError


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def remote(server: Server, **facts: Any) -> RemoteFile:
    return RemoteFile("file", (server.url(),), **facts)


def get(remote: RemoteFile, folder: Path, **options: Any) -> Path:
    return download_file(remote, folder, pause=0.0, **options)


SHA256, MD5 = hashlib.sha256(CONTENT).hexdigest(), hashlib.md5(CONTENT).hexdigest()


def test_a_complete_file_is_checked_and_reported(server: Server, tmp_path: Path) -> None:
    progress: list[tuple[str, int, int]] = []
    file = remote(server, md5=MD5, sha256=SHA256)

    path = get(file, tmp_path, on_progress=lambda *call: progress.append(call))

    assert path.read_bytes() == CONTENT
    assert progress[-1] == ("file", len(CONTENT), len(CONTENT))

    sizes = [size for _, size, _ in progress]

    assert sizes == sorted(sizes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fetched.json", "file"]


def test_an_existing_file_is_not_downloaded_again(server: Server, tmp_path: Path) -> None:
    get(remote(server, md5=MD5), tmp_path)

    get(remote(server, md5=MD5), tmp_path)

    assert len(server.requests) == 1


def test_an_interrupted_download_is_resumed(server: Server, tmp_path: Path) -> None:
    server.cuts = 2

    path = get(remote(server, sha256=SHA256), tmp_path)

    assert path.read_bytes() == CONTENT

    ranges = [requested_range for _, requested_range in server.requests]

    assert ranges == [None, "bytes=1500000-", "bytes=2250000-"]


def test_the_next_call_resumes_too(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_TRIES", 1)
    server.cuts = 1

    with pytest.raises(
        DataError, match=r"broke off too often: http.*1,500,000 of 3,000,000 bytes.*are kept"
    ):
        get(remote(server), tmp_path)
    assert (tmp_path / "file.part").stat().st_size == 1_500_000
    assert get(remote(server, sha256=SHA256), tmp_path).read_bytes() == CONTENT
    assert server.requests[1] == ("/file", "bytes=1500000-")


@pytest.mark.parametrize("change", ["no ranges", "another version", "no version"])
def test_downloads_that_cannot_resume_start_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """A server without Range, with a new file, or without a name for the file's version."""
    monkeypatch.setattr(download, "MAX_TRIES", 1)
    server.etag = "" if change == "no version" else '"one"'
    server.cuts = 1

    with pytest.raises(DataError, match="broke off"):
        get(remote(server), tmp_path)

    server.ranges = change != "no ranges"
    if change == "another version":
        server.etag, server.files["/file"] = '"two"', CONTENT[::-1]

    path = get(remote(server), tmp_path)

    assert path.read_bytes() == server.files["/file"]
    assert server.requests[1][1] == (None if change == "no version" else "bytes=1500000-")


def test_a_part_that_is_too_long_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    (tmp_path / "file.part.from").write_text(f'{server.url()}\n"one"')

    path = get(remote(server, sha256=SHA256), tmp_path)

    assert path.read_bytes() == CONTENT


def test_a_file_with_a_wrong_checksum_is_set_aside(server: Server, tmp_path: Path) -> None:
    for facts in ({"md5": "0" * 32}, {"sha256": "0" * 64}):
        with pytest.raises(
            DataError, match=r"not the published one: .*file\.refused; expected (md5|sha256) 0000"
        ):
            get(remote(server, **facts), tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["file.refused"]
    assert get(remote(server, md5=MD5), tmp_path).read_bytes() == CONTENT


def test_an_existing_wrong_file_is_left_in_place(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")

    with pytest.raises(DataError, match=r"not the published one: .*fix: remove it"):
        get(remote(server, md5=MD5), tmp_path)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_an_unpublished_checksum_is_recorded(server: Server, tmp_path: Path) -> None:
    get(remote(server), tmp_path)

    assert json.loads((tmp_path / "fetched.json").read_text()) == {"file": SHA256}

    (tmp_path / "file").unlink()
    server.files["/file"] = b"other"

    with pytest.raises(DataError, match="the file has changed"):
        get(remote(server), tmp_path)


def test_a_damaged_record_of_downloads_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "fetched.json").write_text("{")

    with pytest.raises(DataError, match="record of downloads is damaged"):
        get(remote(server), tmp_path)


def test_redirects_are_followed_within_http(server: Server, tmp_path: Path) -> None:
    server.redirects = {"/file": "/elsewhere"}
    server.files["/elsewhere"] = CONTENT
    server.cuts = 1

    path = get(remote(server, sha256=SHA256), tmp_path)

    assert path.read_bytes() == CONTENT
    assert server.requests[-1] == ("/elsewhere", "bytes=1500000-")


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/file"])
def test_other_redirects_are_refused(server: Server, tmp_path: Path, target: str) -> None:
    server.redirects = {"/file": target}

    with pytest.raises(DataError, match=r"redirects to an unsafe address|is not allowed"):
        get(RemoteFile("other", (server.url(),)), tmp_path)


def test_endless_redirects_are_refused(server: Server, tmp_path: Path) -> None:
    server.redirects = {"/file": "/file"}

    with pytest.raises(DataError, match="302"):
        get(RemoteFile("other", (server.url(),)), tmp_path)


def test_https_is_never_redirected_to_http() -> None:
    request = urllib.request.Request("https://example.org/a")

    def redirect(url: str) -> urllib.request.Request | None:
        handler = download.SafeRedirectHandler()
        return handler.redirect_request(request, BytesIO(), 302, "Found", Message(), url)

    with pytest.raises(DataError, match="unsafe address"):
        redirect("http://example.org/a")
    assert redirect("https://example.org/b") is not None


def test_a_refusal_is_not_tried_again(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the server refuses: .*/absent; got 404 Not Found"):
        get(RemoteFile("file", (server.url("/absent"),)), tmp_path)
    assert len(server.requests) == 1


def test_the_next_mirror_and_the_next_try_succeed(server: Server, tmp_path: Path) -> None:
    server.errors = [503, 429]
    mirrors = (server.url("/absent"), server.url())

    path = get(RemoteFile("file", mirrors, sha256=SHA256), tmp_path)

    assert path.read_bytes() == CONTENT


def test_a_broken_server_is_tried_five_times(server: Server, tmp_path: Path) -> None:
    server.errors = [500] * 99

    with pytest.raises(DataError, match=r"broke off too often: .*500"):
        get(RemoteFile("other", (server.url(),)), tmp_path)
    assert len(server.errors) == 99 - 5


def test_a_refused_connection_keeps_the_part(tmp_path: Path) -> None:
    (tmp_path / "other.part").write_bytes(b"half")

    with pytest.raises(
        DataError, match=r"cannot be reached: http.*refused; fix: check the network.*/other$"
    ) as caught:
        get(RemoteFile("other", ("http://127.0.0.1:1/file",)), tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "other.part").read_bytes() == b"half"


@pytest.mark.parametrize(
    "reason",
    [
        socket.gaierror(-2, "Name or service not known"),
        OSError("Tunnel connection failed: 403"),
    ],
    ids=["unknown host", "refusing proxy"],
)
def test_an_unreachable_server_is_tried_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: OSError
) -> None:
    urls: list[str] = []

    def refuse(url: str, headers: dict[str, str]) -> None:
        urls.append(url)
        raise urllib.error.URLError(reason)

    monkeypatch.setattr(download, "open_url", refuse)

    with pytest.raises(DataError, match=r"cannot be reached: https://example\.org/x; got "):
        get(RemoteFile("x", ("https://example.org/x",)), tmp_path)
    assert len(urls) == 2


def test_a_file_of_another_size_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"file of another size: .*expected 5, got 3000000"):
        get(remote(server, size=5), tmp_path)


def test_a_wrong_range_is_refused(server: Server, tmp_path: Path) -> None:
    server.cuts, server.shift = 1, 7

    with pytest.raises(DataError, match=r"another part than requested: .*expected bytes 1500000-"):
        get(remote(server), tmp_path)


def test_disk_space_is_checked_first(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    too_small = usage._replace(free=download.DISK_RESERVE + len(CONTENT) - 1)
    large_enough = usage._replace(free=download.DISK_RESERVE + len(CONTENT))

    monkeypatch.setattr(shutil, "disk_usage", lambda _: too_small)

    with pytest.raises(DataError, match="the disk is too small"):
        get(remote(server), tmp_path)

    monkeypatch.setattr(shutil, "disk_usage", lambda _: large_enough)
    get(remote(server), tmp_path)


# Data sets


def test_a_fetched_data_set_loads(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(
        server,
        "icassava2019",
        write_sample("icassava2019", tmp_path / "sample", per_class=2),
        monkeypatch,
    )
    root = tmp_path / "deep/data"

    with pytest.raises(
        DataError, match=r"terms of iCassava 2019 have to be accepted: .*add --accept-licence"
    ):
        fetch("icassava2019", root)
    assert not root.exists()

    (archive,) = fetch("icassava2019", root, accept_licence=True)

    assert archive.with_name(archive.name + ".unpacked").is_dir()
    assert len(load_source("icassava2019", root).train) == 10

    served(server, "mnist", write_sample("mnist", tmp_path / "sample", per_class=2), monkeypatch)

    assert [path.name for path in fetch("mnist", root)] == [
        file.name for file in PUBLISHED["mnist"].files
    ]
    assert len(load_source("mnist", root).train) == 20


def test_a_hostile_archive_writes_nothing_outside(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "cassavaleafdata.zip", "w") as archive:
        archive.writestr("../../outside", "x")
    served(server, "icassava2019", tmp_path, monkeypatch)

    with pytest.raises(DataError, match="unsafe name"):
        fetch("icassava2019", tmp_path / "a/b", accept_licence=True)
    assert not list(tmp_path.rglob("outside"))


def test_invalid_names_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown published data set; expected mnist"):
        fetch("folder", tmp_path)

    (tmp_path / "file").write_text("")

    with pytest.raises(DataError, match="cannot make the folder"):
        fetch("mnist", tmp_path / "file")


def test_every_data_set_has_files_and_checksums() -> None:
    for name in PUBLISHED:
        dataset = find_published(name)
        assert bool(dataset.files) != bool(dataset.kaggle), name
        for file in dataset.files + dataset.extra_files:
            assert all(
                url.startswith(("http://", "https://")) and url.endswith(file.name)
                for url in file.urls
            )
            assert len(file.md5) in (0, 32)
            assert len(file.sha256) in (0, 64)
            unchecked = file.name in ("categories.json.tar.gz", "fingerspelling5.tar.bz2")
            assert bool(file.md5 or file.sha256) != unchecked, file.name


# Kaggle


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token, and a path without Kaggle's program."""
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN", "KAGGLE_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin") + ":/usr/bin:/bin")
    (tmp_path / "bin").mkdir()
    return tmp_path / "home"


def test_kaggle_without_and_with_its_program(tmp_path: Path, home: Path) -> None:
    with pytest.raises(
        DataError, match=r"needs a Kaggle account: .*download all files as .*\.zip.*kaggle\.json"
    ):
        fetch("cassava2020", tmp_path / "data", accept_licence=True)

    sample = write_sample("cassava2020", tmp_path / "sample", per_class=2)
    shutil.make_archive(str(tmp_path / "sample"), "zip", sample)
    program = tmp_path / "bin/kaggle"
    program.write_text(
        "#!/bin/sh\necho 403 - Forbidden >&2\n"
        f'[ -f "{home}/ok" ] && cp "{tmp_path}/sample.zip" "$6/$4.zip"\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)

    with pytest.raises(DataError, match="needs a Kaggle account"):
        fetch("cassava2020", tmp_path / "data", accept_licence=True)

    (home / ".kaggle").mkdir(parents=True)
    (home / ".kaggle/kaggle.json").write_text("{}")

    with pytest.raises(
        DataError,
        match="could not download: cassava-leaf-disease-classification; got 403 - Forbidden",
    ):
        fetch("cassava2020", tmp_path / "data", accept_licence=True)

    (home / "ok").write_text("")

    (archive,) = fetch("cassava2020", tmp_path / "data", accept_licence=True)

    assert archive.name == "cassava-leaf-disease-classification.zip"
    assert len(load_source("cassava2020", tmp_path / "data").train) == 10
