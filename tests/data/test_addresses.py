"""Tables of addresses: downloaded once, verified, resumed; failures never move a label."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import fsspec
import numpy as np
import pytest
from PIL import Image
from support.download_server import Server

from threefold.counting import listening
from threefold.data.dataset import Sources
from threefold.data.detect_source import detect_source
from threefold.data.load import load_data
from threefold.data.sources import addresses
from threefold.data.sources.addresses import name_address
from threefold.errors import DataError

LABELS = ["wolf", "ant", "wolf", "ant", "wolf", "ant"]


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((3, 4, 3), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Six images, of shade 0 to 5, behind an address each."""
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(addresses, "PAUSE", 0.0)
    server = Server()
    server.etag = ""
    server.files = {f"/{i}.jpg": png(i) for i in range(6)}  # a PNG, whatever the address says
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def table(tmp_path: Path, server: Server) -> Path:
    return write(tmp_path / "web.csv", [server.url(f"/{i}.jpg") for i in range(6)])


def write(path: Path, images: list[str]) -> Path:
    rows = [f"{image},{label}" for image, label in zip(images, LABELS, strict=True)]
    path.write_text("url,label\n" + "\n".join(rows), "utf-8")
    return path


def load(table: Path, **options: str) -> Sources:
    return load_data(detect_source(table).model_copy(update=options), 0)


def shades(sources: Sources) -> list[tuple[int, str]]:
    """The shade and the label of each image, in the order of the rows."""
    train = sources.train
    return [
        (int(train.pixels(i)[0, 0, 0]), train.classes[train.labels[i]]) for i in range(len(train))
    ]


def test_addresses_are_downloaded_once(table: Path, server: Server) -> None:
    counts: list[tuple[str, int, int]] = []
    with listening(lambda *count: counts.append(count)):
        sources = load(table)

    assert shades(sources) == list(enumerate(LABELS))
    assert sources.train.ids == tuple(server.url(f"/{i}.jpg") for i in range(6))
    assert ("images downloaded", 6, 6) in counts
    assert "6 images are addresses" in sources.notes[0]

    asked = len(server.requests)
    again = load(table)

    assert asked == len(server.requests) == 6
    assert shades(again) == shades(sources)


def test_an_interrupted_download_goes_on(table: Path, server: Server) -> None:
    server.errors = [404] * 3

    with pytest.raises(DataError, match=r"3 of 6 images cannot be used; got .*404"):
        load(table)

    assert shades(load(table)) == list(enumerate(LABELS))
    assert len(server.requests) == 9


def test_a_bad_address_moves_no_label(table: Path, server: Server) -> None:
    del server.files["/1.jpg"]
    server.files["/2.jpg"] = b"<!doctype html><title>gone</title>"
    extra = [f"{server.url(f'/{i}.jpg?again={i}')},{'ant' if i % 2 else 'wolf'}" for i in (0, 3)]
    for i in (0, 3):
        server.files[f"/{i}.jpg?again={i}"] = png(i)
    table.write_text(table.read_text() + "\n" + "\n".join(extra))

    sources = load(table, bad_images="skip")

    assert {bad.path: bad.reason for bad in sources.skipped} == {
        server.url("/1.jpg"): "there is no image: 404 Not Found",
        server.url("/2.jpg"): "there is no image: not an image: an HTML page, as a failed "
        "download leaves it",
    }
    assert shades(sources) == [
        (0, "wolf"),
        (0, "wolf"),
        (3, "ant"),
        (3, "ant"),
        (4, "wolf"),
        (5, "ant"),
    ]

    server.files |= {"/1.jpg": png(1), "/2.jpg": png(2)}

    # A resumed run sees what it has seen before; with "fail", the user wants them tried again.
    assert shades(load(table, bad_images="skip")) == shades(sources)
    assert len(load(table).train) == 8


@pytest.mark.parametrize(("errors", "cuts"), [([503, 429, 500], 0), ([500], 2)])
def test_a_busy_server_is_asked_again(
    table: Path, server: Server, errors: list[int], cuts: int
) -> None:
    # Three faults: requests run at once, and one image may meet all of them and has four tries.
    server.errors, server.cuts = errors, cuts

    assert shades(load(table)) == list(enumerate(LABELS))


def test_a_network_that_is_down_is_no_failed_image(table: Path, server: Server) -> None:
    load(table)
    dead = "http://127.0.0.1:1"
    write(table, [f"{dead}/{i}.jpg" for i in range(6)])

    with pytest.raises(DataError, match=r"no server answers: .*check the network"):
        load(table, bad_images="skip")


def test_a_damaged_copy_is_named(table: Path, server: Server, tmp_path: Path) -> None:
    sources = load(table)
    (store,) = (tmp_path / "cache/images").iterdir()
    content = bytearray((store / "images.bin").read_bytes())
    content[40] ^= 1
    (store / "images.bin").write_bytes(content)

    with pytest.raises(DataError, match=r"cached copy of an image is damaged: .*fix: remove "):
        shades(sources)

    line = (store / "index.txt").read_bytes()
    (store / "index.txt").write_bytes(line.replace(b".jpg", b".jpq", 1))

    with pytest.raises(DataError, match=r"line 1 of index.txt is not what was written"):
        load(table)


def test_half_a_line_of_a_killed_process_is_cut(
    table: Path, tmp_path: Path, server: Server
) -> None:
    load(table)
    (store,) = (tmp_path / "cache/images").iterdir()
    lines = (store / "index.txt").read_bytes()
    (store / "index.txt").write_bytes(lines[:-20])

    assert shades(load(table)) == list(enumerate(LABELS))
    assert len(server.requests) == 7


def test_files_and_addresses_in_one_table(table: Path, server: Server, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    images = [f"{i}.png" for i in range(3)] + [server.url(f"/{i}.jpg") for i in range(3, 6)]

    assert shades(load(write(table, images))) == list(enumerate(LABELS))

    (tmp_path / "2.png").unlink()

    with pytest.raises(DataError, match="1 file of the CSV file does not exist"):
        load(table)


def test_parquet_can_name_addresses(server: Server, tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [server.url(f"/{i}.jpg") for i in range(6)]
    rows = {"url": images, "label": LABELS, "id": [f"id{i}" for i in range(6)]}
    parquet.write_table(arrow.table(rows), tmp_path / "web.parquet")

    sources = load(tmp_path / "web.parquet")

    assert shades(sources) == list(enumerate(LABELS))
    assert sources.train.ids == tuple(f"id{i}" for i in range(6))


def test_buckets_are_read_through_fsspec(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(addresses.BUCKETS, "memory", "fsspec")
    files = fsspec.filesystem("memory")
    for i in range(5):
        files.pipe(f"/bucket/{i}.png", png(i))
    table = write(tmp_path / "s3.csv", [f"memory://bucket/{i}.png" for i in range(6)])

    sources = load(table, bad_images="skip")

    assert [bad.reason for bad in sources.skipped] == [
        "there is no image: FileNotFoundError: /bucket/5.png"
    ]
    assert shades(sources) == list(enumerate(LABELS))[:5]


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://host/a.png", "zip://a::s3://b"])
def test_other_kinds_of_addresses_are_refused(server: Server, tmp_path: Path, address: str) -> None:
    table = write(tmp_path / "web.csv", [address, *(server.url(f"/{i}.jpg") for i in range(5))])

    with pytest.raises(DataError, match=r"web.csv line 2; expected https://.*fix: give such"):
        load(table)


def test_a_public_server_cannot_redirect_inside(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from threefold.data import download

    server.redirects["/0.jpg"] = server.url("/1.jpg")

    assert addresses.read_image(server.url("/0.jpg")) == png(1)

    monkeypatch.setattr(download, "is_private", lambda host: host == "inside")
    server.redirects["/0.jpg"] = "http://inside/1.jpg"
    with pytest.raises(addresses.UnreadAddressError, match="into a private network"):
        addresses.read_image(server.url("/0.jpg"))


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://me:secret@host/a.jpg", "https://host/a.jpg"),
        ("S3://bucket/a b.jpg", "s3://bucket/a b.jpg"),
        ("https://host/a?key=1", "https://host/a?5d5a2f99dc82"),
    ],
)
def test_ids_hold_no_secret(address: str, name: str) -> None:
    assert name_address(address) == name


def test_names_are_unlike_for_other_queries() -> None:
    assert name_address("https://host/a?key=1") != name_address("https://host/a?key=2")
