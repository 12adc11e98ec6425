"""The server answers as the file does, and refuses bad requests with a reason as JSON."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from support.server import CLASSES, MEMBERS, UNCERTAIN, card, picture, serving, write_model

import threefold
from threefold.errors import RecipeError, RunError
from threefold.runtime.model import Model
from threefold.serving import app, limits
from threefold.serving.limits import ServerLimits
from threefold.training.run import Run

RED, GREEN = picture((200, 30, 30)), picture((30, 200, 30), (9, 9), "JPEG")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return threefold.load(write_model(tmp_path_factory.mktemp("model") / "m.onnx"))


@pytest.fixture
def client(model: Model) -> Iterator[TestClient]:
    with TestClient(app.make_app(model)) as running:
        yield running


def post(client: Any, *contents: bytes, **options: Any) -> Any:
    """Send images to /predict, named 0.png, 1.png and so on."""
    files = [("files", (f"{i}.png", c, "image/png")) for i, c in enumerate(contents)]
    return client.post("/predict", files=files, **options)


def post_body(client: Any, content: Any, media_type: str) -> Any:
    """Send a request body to /predict as it is."""
    return client.post("/predict", content=content, headers={"content-type": media_type})


def top_probs(answer: dict[str, Any]) -> list[float]:
    """The probabilities that an answer names, in the order of the classes."""
    by_label = {entry["label"]: entry["probability"] for entry in answer["top"]}
    return [by_label[label] for label in CLASSES]


def error_code(response: Any, status: int) -> str:
    """Check that a response is an error of that status in the documented form; return its code."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert {"code", "message"} <= set(error) <= {"code", "message", "file"}
    assert not re.search(r"Traceback|File \"|/tmp|site-packages|\.py|object at 0x", response.text)
    return str(error["code"])


def test_answers_are_those_of_the_file(finished: Run) -> None:
    images = [Path(finished.recipe.data.root) / i for i in finished.sources.test.ids]  # type: ignore[union-attr]
    model = threefold.load(finished.dir / "model.onnx")
    output = model.infer(images)
    files = [("files", (path.name, path.read_bytes(), "image/png")) for path in images]

    with TestClient(app.make_app(model)) as client:
        answers = client.post("/predict?top=3", files=files).json()["answers"]

    assert [answer["file"] for answer in answers] == [path.name for path in images]
    for answer, probs, rows in zip(answers, output.probs, output.member_probs, strict=True):
        assert top_probs(answer) == pytest.approx(probs.tolist(), abs=1e-6)
        assert answer["label"] == CLASSES[probs.argmax()]
        assert set(answer["members"]) == {"plain", "gated"}
        shown = [member["probability"] for member in answer["members"].values()]
        assert shown == pytest.approx(rows.max(1).tolist(), abs=1e-6)


def test_multipart_and_base64_give_the_same_answers(client: TestClient) -> None:
    texts = [base64.b64encode(content).decode() for content in (RED, GREEN)]

    form = post(client, RED, GREEN).json()["answers"]
    tree = client.post("/predict", json={"images": texts}).json()["answers"]

    assert [answer["file"] for answer in tree] == ["image 0", "image 1"]
    assert [{**a, "file": ""} for a in form] == [{**a, "file": ""} for a in tree]
    assert [answer["label"] for answer in form] == ["red", "green"]
    assert set(form[0]["members"]) == set(MEMBERS)


def test_top(client: TestClient) -> None:
    files = {"files": ("a", RED)}

    first_three = post(client, RED).json()["answers"][0]["top"]
    first = client.post("/predict?top=1", files=files).json()["answers"][0]["top"]

    assert len(first_three) == 3
    assert len(first) == 1
    for bad in ("0", "-1", "x", "1e9"):
        response = client.post(f"/predict?top={bad}", files=files)
        assert error_code(response, 400) == "bad_request"


def test_many_clients_at_once_are_not_mixed_up(model: Model) -> None:
    """Images of two sizes and their own colours, from 24 threads."""
    rng = np.random.default_rng(0)
    contents = [picture(tuple(rng.integers(0, 256, 3)), (8 + int(i) % 2, 7)) for i in range(200)]
    expected = model.predict_proba(contents)

    with (
        serving(model.path) as address,
        httpx.Client(base_url=address, timeout=60) as client,
        ThreadPoolExecutor(24) as pool,
    ):
        answers = list(pool.map(lambda c: post(client, c).json()["answers"][0], contents))
        metrics = client.get("/metrics").text

    for answer, probs in zip(answers, expected, strict=True):
        assert top_probs(answer) == pytest.approx(probs.tolist(), abs=1e-6)
    count = re.search(r"threefold_batch_images_count ([\d.]+)", metrics)
    assert count is not None
    assert float(count[1]) < 200  # some shared a batch
    assert "threefold_images_total 200.0" in metrics


def test_health_and_card(client: TestClient) -> None:
    health = client.get("/health").json()
    tree = client.get("/card").json()

    assert health == {"status": "ok"}
    # The graph of this file resizes images to the sizes of several members.
    assert tree.pop("limits")["pixels"] == ServerLimits().graph_pixels
    assert tree == card()


def test_metrics_count_requests_by_known_routes(client: TestClient) -> None:
    post(client, RED)
    post(client, b"x")
    client.get("/made/up/by/the/client")

    metrics = client.get("/metrics")

    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'threefold_requests_total{route="/predict",status="200"} 1.0' in metrics.text
    assert 'threefold_requests_total{route="/predict",status="415"} 1.0' in metrics.text
    assert "threefold_requests_in_flight 0.0" in metrics.text
    assert "threefold_request_bytes 0.0" in metrics.text
    assert "made" not in metrics.text


def test_the_description_names_routes_and_statuses(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]

    post_operation = paths["/predict"]["post"]
    media_types = {"multipart/form-data", "application/json"}
    statuses = {"200", "400", "401", "403", "408", "413", "415", "421", "429", "503", "default"}
    assert set(paths) == {"/predict", "/explain", "/health", "/card", "/metrics"}
    assert set(post_operation["requestBody"]["content"]) == media_types
    assert statuses == set(post_operation["responses"])  # 422 is never sent


def test_the_description_has_the_schema_of_answers(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()["components"]["schemas"]["Prediction"]
    answer = post(client, RED).json()["answers"][0]

    assert set(schema["required"]) <= set(answer) <= set(schema["properties"])
    assert json.dumps(schema)


def test_numbers_that_json_lacks_are_null(tmp_path: Path) -> None:
    score = {"accuracy": float("nan"), "interval": [0, float("inf")]}
    path = write_model(tmp_path / "m.onnx", model_card=card(score=score))

    with TestClient(app.make_app(threefold.load(path))) as client:
        tree = client.get("/card").json()

    assert tree["score"] == {"accuracy": None, "interval": [0, None]}


def test_sets_and_unknown_where_the_model_has_them(tmp_path: Path) -> None:
    model = threefold.load(write_model(tmp_path / "m.onnx", model_card=card(**UNCERTAIN)))
    contents = [RED, GREEN, picture((99, 99, 99))]

    with TestClient(app.make_app(model)) as client:
        answers = post(client, *contents).json()["answers"]
        tree = client.get("/card").json()

    unknown = [answer["unknown"] for answer in answers]
    assert tree["conformal"] == UNCERTAIN["conformal"]
    assert [answer["set"] for answer in answers] == model.predict_sets(contents)
    assert unknown == model.is_unknown(contents).tolist() == [False, False, True]
    assert [len(answer["set"]) for answer in answers] == [1, 1, 3]


def test_no_set_is_not_an_empty_set(client: TestClient) -> None:
    answer = post(client, RED).json()["answers"][0]

    assert not {"set", "unknown"} & set(answer)


JSON = "application/json"
FORM = "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("content", "media_type", "status", "code"),
    [
        (b"{}", JSON, 400, "bad_json"),
        (b"not json", JSON, 400, "bad_json"),
        (b"[" * 200_000, JSON, 400, "bad_json"),
        (b"\xff\xfe\x00", JSON, 400, "bad_json"),
        (b'{"images": "x"}', JSON, 400, "bad_json"),
        (b'{"images": [1]}', JSON, 400, "bad_json"),
        (b'{"images": []}', JSON, 400, "no_images"),
        (b'{"images": ["http://127.0.0.1/a.png"]}', JSON, 400, "bad_base64"),
        (b'{"images": ["file:///etc/passwd"]}', JSON, 400, "bad_base64"),
        (b'{"images": ["data:image/png;base64,AAAA"]}', JSON, 400, "bad_base64"),
        (b'{"images": ["AAAA"]}', JSON, 415, "not_an_image"),
        (b"x", "text/plain", 415, "media_type"),
        (b"x", "application/x-www-form-urlencoded", 415, "media_type"),
        (RED, "image/png", 415, "media_type"),
        (b"x", "multipart/form-data", 400, "bad_form"),
        (b"x", FORM, 400, "bad_form"),
        (b"--b\r\n\r\nx\r\n--b--\r\n", FORM, 400, "bad_form"),
    ],
)
def test_bodies_that_are_refused(
    client: TestClient, content: bytes, media_type: str, status: int, code: str
) -> None:
    response = post_body(client, content, media_type)

    assert error_code(response, status) == code


def test_requests_that_are_refused(client: TestClient) -> None:
    other = {"other": ("a.png", RED)}

    assert error_code(client.post("/predict"), 415) == "media_type"
    assert error_code(client.post("/predict", files=other), 400) == "no_images"
    text = client.post("/predict", data={"files": "text"}, files=other)
    assert error_code(text, 400) == "not_a_file"
    assert error_code(client.get("/predict"), 405) == "http"
    assert error_code(client.get("/nothing"), 404) == "http"
    for path in ("/..%2f..%2fetc/passwd", "/web/../serve.py", "/predict/", "/docs", "/index.html"):
        assert client.get(path).status_code == 404


def test_the_file_that_is_bad_is_named(client: TestClient) -> None:
    second_bad = post(client, RED, b"not a picture", GREEN)
    long_name = client.post("/predict", files=[("files", ("<script>\x1b[2J" * 100, b"x"))])

    assert error_code(second_bad, 415) == "not_an_image"
    assert second_bad.json()["error"]["file"] == "1.png"
    assert error_code(post(client, RED, RED[:-30]), 415) == "not_an_image"
    assert error_code(post(client, b""), 415) == "not_an_image"
    assert len(long_name.json()["error"]["file"]) <= 200


def test_limits_on_files_bytes_and_pixels(model: Model) -> None:
    limits = ServerLimits(files=2, file_bytes=500, body_bytes=2000, pixels=200, side=50)
    with TestClient(app.make_app(model, limits)) as client:
        three_texts = client.post("/predict", json={"images": ["AAAA"] * 3})
        chunks = post_body(client, iter([bytes(900)] * 3), JSON)

        assert post(client, RED, RED).status_code == 200
        assert error_code(post(client, RED, RED, RED), 413) == "too_many_files"
        assert error_code(three_texts, 413) == "too_many_files"
        assert error_code(post(client, RED + bytes(500)), 413) == "too_many_bytes"
        assert error_code(post(client, bytes(3000)), 413) == "too_many_bytes"
        assert error_code(chunks, 413) == "too_many_bytes"
        assert error_code(post(client, picture((1, 2, 3), (15, 15))), 413) == "too_many_pixels"
        assert error_code(post(client, picture((1, 2, 3), (51, 2))), 413) == "too_long"


class FailingSession:
    """A session of onnxruntime that fails with a message nobody outside should see."""

    def run(self, *_: object) -> None:
        raise ValueError("secret /tmp/x")


def test_a_model_that_fails_is_not_a_stack_trace(model: Model) -> None:
    failing = threefold.load(model.path)
    failing.session = FailingSession()

    with TestClient(app.make_app(failing), raise_server_exceptions=False) as client:
        response = post(client, RED)

    assert error_code(response, 500) == "internal"
    assert "secret" not in response.text


def test_the_api_key(model: Model) -> None:
    right = {"authorization": "bearer s3cret-ü".encode()}
    with TestClient(app.make_app(model, api_key="s3cret-ü")) as client:
        for path in ("/card", "/metrics"):
            assert error_code(client.get(path), 401) == "no_key"
        assert error_code(post(client, RED), 401) == "no_key"
        assert post(client, RED).headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer nope", "Bearer ", "Basic s3cret", "s3cret"):
            response = post(client, RED, headers={"authorization": wrong})
            assert error_code(response, 401) == "no_key"
        assert post(client, RED, headers=right).status_code == 200
        assert client.get("/card", headers=right).status_code == 200
        assert client.get("/").status_code == 200
        assert client.get("/health").status_code == 200


def test_a_key_from_a_file_has_a_line_end(model: Model) -> None:
    key = {"authorization": "Bearer s3cret"}
    with TestClient(app.make_app(model, api_key=" s3cret\r\n")) as client:
        assert client.get("/card", headers=key).status_code == 200
        assert error_code(client.get("/card"), 401) == "no_key"


@pytest.mark.parametrize(("key", "reason"), [("\n", "is empty"), ("a\nb", "line breaks")])
def test_a_key_that_nobody_can_send_is_refused(model: Model, key: str, reason: str) -> None:
    with pytest.raises(RunError, match=reason):
        app.run_server(model.path, api_key=key)


def test_head_is_answered_where_get_is(client: TestClient) -> None:
    for path in ("/", "/app.js", "/health", "/card", "/metrics", "/openapi.json"):
        response = client.head(path)
        assert response.status_code == 200, path
        assert response.headers["content-type"] == client.get(path).headers["content-type"]

    refused = client.head("/predict")
    assert refused.status_code == 405
    assert refused.headers["allow"] == "POST"


def test_hosts_and_origins(model: Model) -> None:
    own = "http://127.0.0.1:8000"
    running = app.make_app(model, hosts={"127.0.0.1", "localhost", "[::1]"})
    with TestClient(running, base_url=own) as client:
        assert post(client, RED, headers={"origin": own}).status_code == 200
        for origin in ("https://evil.example", "null", "http://127.0.0.1:9000"):
            response = post(client, RED, headers={"origin": origin})
            assert error_code(response, 403) == "wrong_origin"
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
            response = client.get("/card", headers={"host": host})
            assert error_code(response, 421) == "wrong_host"
        for host in ("localhost", "LOCALHOST:8000", "[::1]:8000", "127.0.0.1"):
            assert client.get("/card", headers={"host": host}).status_code == 200


def test_every_answer_has_the_security_headers(client: TestClient) -> None:
    responses = [
        client.get("/"),
        client.get("/nothing"),
        post(client, b"x"),
        client.get("/app.js"),
    ]

    for response in responses:
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'")
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("path", app.PAGE)
def test_the_page_needs_nothing_from_elsewhere(client: TestClient, path: str) -> None:
    text = client.get(path).text

    assert len(text) < 14_000
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\sstyle=|\son\w+=\"|innerHTML|eval\(", text)


def test_the_query_does_not_change_the_page(client: TestClient) -> None:
    page = client.get("/")

    response = client.get("/?content=alert(1)&kind=text/javascript&media_type=text/javascript")

    assert response.content == page.content
    assert response.headers["content-type"] == "text/html; charset=utf-8"


def test_limits_by_name() -> None:
    limits = ServerLimits().override(["pixels=5", "files=2"])

    assert limits == ServerLimits(pixels=5, files=2)


@pytest.mark.parametrize(
    "assignment",
    ["nothing=1", "pixels", "pixels=", "pixels=-1", "pixels=0", "pixels=1.5", "pixels=²"],
)
def test_bad_limits_are_refused(assignment: str) -> None:
    with pytest.raises(RecipeError, match=r"no such limit|not a limit"):
        ServerLimits().override([assignment])


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 80800), ("127.0.0.1", -1), ("a" * 70, 0), ("no.invalid", 0)]
)
def test_an_address_that_does_not_exist_is_one_clear_error(
    model: Model, host: str, port: int
) -> None:
    with pytest.raises(RunError, match="cannot listen") as error:
        app.make_server(model, host, port, ServerLimits())
    assert "\n" not in str(error.value)


def test_connections_need_as_many_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(limits.resource, "setrlimit", lambda _, pair: asked.append(pair))

    limits.reserve_descriptors(ServerLimits(connections=500))
    with pytest.raises(RunError, match="5000 connections need more open files"):
        limits.reserve_descriptors(ServerLimits(connections=5000))

    assert asked == [(500 + limits.SPARE_DESCRIPTORS, 4096)]


def test_a_port_in_use_is_one_clear_error(model: Model) -> None:
    with (
        serving(model.path) as address,
        pytest.raises(RunError, match=r"cannot listen: 127\.0\.0\.1:\d+; got Address"),
    ):
        app.run_server(model.path, port=int(address.rpartition(":")[2]))
