"""Who may use the page of `threefold ui`, and what it takes: keys, origins, uploads, places."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from support.ui import KEY, make_client, make_workbench, write_photos

from threefold.serving.limits import Refusal
from threefold.serving.ui_uploads import UploadLimits, Uploads

BYTES = {"content-type": "application/octet-stream"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path)


@pytest.fixture
def client(photos: Path) -> Iterator[TestClient]:
    limits = UploadLimits(files=3, bytes=100, disk_reserve=0)
    with make_client(make_workbench(photos.parent / "runs"), limits) as running:
        yield running


@pytest.mark.parametrize("key", ["", "wrong", KEY[:-1], KEY + "é"])
def test_without_the_key_nothing_is_shown(photos: Path, key: str) -> None:
    client = make_client(make_workbench(photos.parent / "runs"), key=key)

    for path in ("/", "/ui.js", "/state", "/places", "/runs/x", f"/state?key={KEY}"):
        response = client.get(path)
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "no_key"
    assert client.post("/runs", json={"data": str(photos)}).status_code == 403
    assert client.post("/try/x/predict").status_code == 403


def test_the_key_moves_into_a_cookie_of_this_site(photos: Path) -> None:
    client = make_client(make_workbench(photos.parent / "runs"), key="")

    cookie = client.get("/", params={"key": KEY}).headers["set-cookie"]

    assert cookie == f"threefold-ui={KEY}; HttpOnly; SameSite=Strict; Path=/"
    assert client.get("/state").status_code == 200


def test_other_origins_and_hosts_are_refused(client: TestClient, photos: Path) -> None:
    body = {"data": str(photos)}

    for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}):
        assert client.post("/runs", json=body, headers=headers).status_code in (403, 421)
        assert client.get("/places", headers=headers).status_code in (403, 421)
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {"content-type": media_type}
        assert client.post("/runs", content="{}", headers=headers).status_code in (400, 415)
        assert client.post("/uploads", content="{}", headers=headers).status_code in (400, 415)
    assert client.get("/state").json()["runs"] == []
    assert "default-src 'none'" in client.get("/").headers["content-security-policy"]


def begin(client: TestClient) -> str:
    return str(client.post("/uploads", json={}).json()["upload"])


def send(client: TestClient, upload: str, name: str, content: bytes, offset: int = 0) -> int:
    """Send a piece; returns the status."""
    query: dict[str, str | int] = {"name": name, "offset": offset}
    url = f"/uploads/{upload}"
    return client.put(url, params=query, content=content, headers=BYTES).status_code


def test_files_arrive_in_pieces(client: TestClient) -> None:
    upload = begin(client)

    assert send(client, upload, "photos/cat/1.png", b"abc") == 200
    assert send(client, upload, "photos/cat/1.png", b"XX", offset=2) == 200
    assert send(client, upload, "photos/cat/1.png", b"YYY", offset=2) == 200  # again
    assert send(client, upload, "photos/cat/1.png", b"z", offset=9) == 409
    assert send(client, upload, "photos/empty.png", b"") == 200
    folder = Path(client.post(f"/uploads/{upload}/finish", json={}).json()["data"])

    assert folder.name == "photos"
    assert (folder / "cat/1.png").read_bytes() == b"abYYY"
    assert (folder / "empty.png").read_bytes() == b""
    assert send(client, upload, "photos/late.png", b"x") == 404


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../../x", "a\\..\\x", "C:/x", ".hidden", "a/.b/c", "", "a\0b", "a" * 300],
)
def test_files_stay_in_their_upload(client: TestClient, photos: Path, name: str) -> None:
    before = sorted(photos.parent.rglob("*"))
    upload = begin(client)

    assert send(client, upload, name, b"x") == 400

    client.post(f"/uploads/{upload}/discard", json={})
    after = {*photos.parent.rglob("*")} - {*before}
    assert {path.name for path in after} <= {".ui", "uploads"}


def test_limits_of_an_upload(client: TestClient) -> None:
    upload = begin(client)

    assert send(client, upload, "a", b"x" * 60) == 200
    assert send(client, upload, "b", b"x" * 60) == 413
    assert send(client, upload, "b", b"x") == send(client, upload, "c", b"x") == 200
    assert send(client, upload, "d", b"x") == 413
    assert send(client, upload, "a/b", b"x") == 413
    assert send(client, "gone", "a", b"x") == 404
    big = client.put(f"/uploads/{upload}?name=a", content=b"x" * (41 * 2**20), headers=BYTES)
    assert big.status_code == 413


def test_a_full_disk_is_said_at_once(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, UploadLimits(disk_reserve=2**62))

    with pytest.raises(Refusal, match="the disk is nearly full"):
        uploads.write(uploads.begin(), "a.png", 0, b"x")


def test_nothing_sent_is_no_upload(client: TestClient) -> None:
    upload = begin(client)

    assert client.post(f"/uploads/{upload}/finish", json={}).status_code == 400
    assert client.post(f"/uploads/{upload}/discard", json={}).status_code == 200
    assert client.post(f"/uploads/{upload}/discard", json={}).status_code == 404


def test_images_that_were_sent_in_vain_are_deleted(client: TestClient, tmp_path: Path) -> None:
    outside = tmp_path / "kept.txt"
    outside.write_text("mine")
    uploads = Uploads(tmp_path / "uploads")
    upload = uploads.begin()
    uploads.write(upload, "a/1.png", 0, b"x")
    path = uploads.finish(upload)

    uploads.delete_with(outside)
    uploads.delete_with(tmp_path / "uploads")
    assert path.exists()
    uploads.delete_with(path / "gone")

    assert not path.exists()
    assert outside.exists()


def test_places_lists_folders_and_data_files(client: TestClient, photos: Path) -> None:
    for name in ("cats.zip", "rows.csv", "notes.txt", ".hidden.zip"):
        (photos.parent / name).write_text("")
    (photos.parent / ".secret").mkdir()

    found = client.get("/places", params={"path": str(photos.parent)}).json()

    assert found["folders"] == ["photos", "runs"]
    assert found["files"] == ["cats.zip", "rows.csv"]
    assert found["parent"] == str(photos.parent.parent)
    missing = client.get("/places", params={"path": str(photos / "gone")})
    assert missing.status_code == 404
    assert "No such file" in missing.json()["error"]["message"]
    assert client.get("/places", params={"path": "a\0b"}).status_code == 404
