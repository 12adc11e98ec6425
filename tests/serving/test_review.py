"""The page of a review: decisions arrive in the file at once, and only this machine is answered."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from support.review import COPY, EMPTY, labels, write_photos

from threefold.errors import RunError
from threefold.evaluation.review import Review, open_review
from threefold.evaluation.review_state import ReviewState
from threefold.serving.review import make_review_app


@pytest.fixture(scope="module")
def review(tmp_path_factory: pytest.TempPathFactory) -> Review:
    return open_review(str(write_photos(tmp_path_factory.mktemp("photos"))))


@pytest.fixture
def state(review: Review, tmp_path: Path) -> ReviewState:
    return ReviewState(review, tmp_path / "clean.csv")


@pytest.fixture
def client(state: ReviewState) -> Iterator[TestClient]:
    with TestClient(make_review_app(state), base_url="http://127.0.0.1") as running:
        yield running


def test_the_page_lists_what_was_found(client: TestClient) -> None:
    tree = client.get("/items").json()

    assert [item["id"] for item in tree["items"]] == [COPY, EMPTY]
    assert tree["items"][0]["copy_of"] == "cat/0.png"
    assert tree["classes"] == ["cat", "dog"]
    for name in ("", "style.css", "review.css", "review.js", "icon.svg"):
        assert client.get(f"/{name}").status_code == 200


def test_each_decision_is_written_at_once(client: TestClient, state: ReviewState) -> None:
    assert not state.target.exists()

    client.post("/decide", json={"id": COPY, "action": "drop"})
    assert len(labels(state)) == 25
    assert COPY not in labels(state)

    answer = client.post("/decide", json={"id": EMPTY, "action": "relabel", "label": "dog"}).json()
    assert labels(state)[EMPTY] == "dog"
    assert answer == {"accept": 0, "relabel": 1, "drop": 1, "rows": 25}

    client.post("/decide", json={"id": COPY, "action": "undo"})
    client.post("/decide", json={"id": EMPTY, "action": "accept"})
    assert (labels(state)[COPY], labels(state)[EMPTY]) == ("dog", "cat")
    assert client.get("/items").json()["items"][1]["decision"] == {"action": "accept", "label": ""}


def test_pictures_are_small(client: TestClient) -> None:
    response = client.get("/picture", params={"id": EMPTY})

    with Image.open(io.BytesIO(response.content)) as image:
        assert (image.format, image.size) == ("PNG", (320, 160))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"id": "gone", "action": "drop"}, 400),
        ({"id": "cat/1.png", "action": "drop"}, 400),
        ({"id": EMPTY, "action": "relabel", "label": "cow"}, 400),
        ({"id": EMPTY, "action": "delete"}, 400),
        ({"id": EMPTY}, 400),
        ({"id": EMPTY, "action": "drop", "path": "/etc/passwd"}, 400),
    ],
)
def test_bad_decisions_change_nothing(
    client: TestClient, state: ReviewState, body: dict[str, Any], status: int
) -> None:
    response = client.post("/decide", json=body)

    assert response.status_code == status
    assert set(response.json()) == {"error"}
    assert (state.decisions, state.target.exists()) == ({}, False)


def test_only_images_of_the_data_set_are_sent(client: TestClient, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")

    for name in ("gone", str(tmp_path / "secret.png"), f"../{tmp_path.name}/secret.png", ""):
        assert client.get("/picture", params={"id": name}).status_code == 404


def test_pages_of_other_origins_are_refused(client: TestClient, state: ReviewState) -> None:
    body = {"id": COPY, "action": "drop"}
    text = '{"id": "cat/empty.png", "action": "drop"}'

    for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}):
        assert client.post("/decide", json=body, headers=headers).status_code in (403, 421)
        assert client.get("/items", headers=headers).status_code in (403, 421)
    for media_type in ("text/plain", "application/x-www-form-urlencoded"):
        headers = {"content-type": media_type}
        assert client.post("/decide", content=text, headers=headers).status_code in (400, 415)
    assert client.post("/decide", content=text).status_code in (400, 415)
    assert state.decisions == {}


def test_a_decision_that_cannot_be_written_is_not_kept(
    client: TestClient, state: ReviewState
) -> None:
    state.target = state.target / "file" / "clean.csv"
    state.target.parent.parent.write_text("a file where a folder should be")

    response = client.post("/decide", json={"id": COPY, "action": "drop"})

    assert response.status_code == 503
    assert state.decisions == {}


def test_no_decision_of_many_at_once_is_lost(
    state: ReviewState, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = []

    def write_slowly(path: Path, content: bytes) -> None:
        writes.append(content)
        time.sleep(0.02)
        path.write_bytes(content)

    monkeypatch.setattr("threefold.evaluation.review.write_bytes", write_slowly)
    actions = [(COPY, "drop"), (EMPTY, "accept")] * 20

    with ThreadPoolExecutor(len(actions)) as threads:
        answers = list(threads.map(lambda pair: state.decide(*pair), actions))

    assert len(writes) < len(actions) / 2
    assert len(answers) == len(actions)
    assert set(state.decisions) == {COPY, EMPTY}
    assert (len(labels(state)), COPY in labels(state)) == (25, False)


def test_a_file_of_the_user_is_not_replaced(review: Review, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("mine")

    with pytest.raises(RunError, match="the file exists"):
        ReviewState(review, tmp_path / "mine.csv")

    assert (tmp_path / "mine.csv").read_text() == "mine"
