"""The server answers as the file does, refuses what it cannot read, and says why in one kind of JSON."""

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
from threefold.serving import app
from threefold.serving.limits import ServerLimits
from threefold.training.run import Run

RED, GREEN = picture((200, 30, 30)), picture((30, 200, 30), (9, 9), "JPEG")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return threefold.load(write_model(tmp_path_factory.mktemp("model") / "m.onnx"))


@pytest.fixture
def client(model: Model) -> Iterator[TestClient]:
    with TestClient(app.make_app(model)) as found:
        yield found


def post(client: Any, *contents: bytes, **options: Any) -> Any:
    return client.post(
        "/predict",
        files=[("files", (f"{i}.png", c, "image/png")) for i, c in enumerate(contents)],
        **options,
    )


def why(response: Any, status: int) -> str:
    """The code of a refusal; its body is the one kind of error."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert {"code", "message"} <= set(error) <= {"code", "message", "file"}
    assert not re.search(r"Traceback|File \"|/tmp|site-packages|\.py|object at 0x", response.text)
    return str(error["code"])


def test_answers_are_those_of_the_file(finished: Run) -> None:
    path = finished.dir / "model.onnx"
    images = [Path(finished.recipe.data.root) / i for i in finished.sources.test.ids]  # type: ignore[union-attr]
    output = threefold.load(path).infer(images)
    probs, members = output.probs, output.member_probs
    with TestClient(app.make_app(threefold.load(path))) as client:
        answers = client.post(
            "/predict?top=3",
            files=[("files", (p.name, p.read_bytes(), "image/png")) for p in images],
        ).json()["answers"]
    assert [a["file"] for a in answers] == [p.name for p in images]
    for answer, expected, opinions in zip(answers, probs, members, strict=True):
        found = {t["label"]: t["probability"] for t in answer["top"]}
        assert [found[c] for c in ("blue", "green", "red")] == pytest.approx(
            expected.tolist(), abs=1e-6
        )
        assert answer["label"] == ("blue", "green", "red")[expected.argmax()]
        assert set(answer["members"]) == {"plain", "gated"}
        assert [m["probability"] for m in answer["members"].values()] == pytest.approx(
            opinions.max(1).tolist(), abs=1e-6
        )


def test_multipart_and_base64_give_the_same_answers(client: TestClient) -> None:
    form = post(client, RED, GREEN).json()["answers"]
    tree = client.post(
        "/predict", json={"images": [base64.b64encode(c).decode() for c in (RED, GREEN)]}
    ).json()["answers"]
    assert [a["file"] for a in tree] == ["image 0", "image 1"]
    assert [{**a, "file": ""} for a in form] == [{**a, "file": ""} for a in tree]
    assert [a["label"] for a in form] == ["red", "green"]
    assert set(form[0]["members"]) == set(MEMBERS)


def test_top(client: TestClient) -> None:
    assert len(post(client, RED).json()["answers"][0]["top"]) == 3
    assert (
        len(client.post("/predict?top=1", files={"files": ("a", RED)}).json()["answers"][0]["top"])
        == 1
    )
    for bad in ("0", "-1", "x", "1e9"):
        assert (
            why(client.post(f"/predict?top={bad}", files={"files": ("a", RED)}), 400)
            == "bad_request"
        )


def test_many_clients_at_once_are_not_mixed_up(model: Model) -> None:
    """Images of two sizes and their own colours from 24 threads, each answer compared with the file's for that image."""
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
        found = {t["label"]: t["probability"] for t in answer["top"]}
        assert [found[c] for c in CLASSES] == pytest.approx(probs.tolist(), abs=1e-6)
    batches = float(re.search(r"threefold_batch_images_count ([\d.]+)", metrics)[1])  # type: ignore[index]
    assert "threefold_images_total 200.0" in metrics
    assert batches < 200  # some shared a batch


def test_health_card_metrics_and_description(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    told = client.get("/card").json()
    assert told.pop("limits")["pixels"] == ServerLimits().pixels
    assert told == card()
    post(client, RED)
    post(client, b"x")
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'threefold_requests_total{route="/predict",status="200"} 1.0' in metrics.text
    assert 'threefold_requests_total{route="/predict",status="415"} 1.0' in metrics.text
    assert "threefold_requests_in_flight 0.0" in metrics.text
    assert "threefold_request_bytes 0.0" in metrics.text
    client.get("/made/up/by/the/client")
    assert "made" not in client.get("/metrics").text
    described = client.get("/openapi.json").json()["paths"]
    assert set(described) == {"/predict", "/health", "/card", "/metrics"}
    assert set(described["/predict"]["post"]["requestBody"]["content"]) == {
        "multipart/form-data",
        "application/json",
    }
    assert {"200", "400", "408", "413", "415", "429", "503"} <= set(
        described["/predict"]["post"]["responses"]
    )


def test_a_card_with_numbers_that_json_has_not(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "m.onnx",
        model_card=card(score={"accuracy": float("nan"), "interval": [0, float("inf")]}),
    )
    with TestClient(app.make_app(threefold.load(path))) as client:
        assert client.get("/card").json()["score"] == {"accuracy": None, "interval": [0, None]}


def test_sets_and_unknown_where_the_model_has_them(tmp_path: Path) -> None:
    model = threefold.load(write_model(tmp_path / "m.onnx", model_card=card(**UNCERTAIN)))
    contents = [RED, GREEN, picture((99, 99, 99))]
    with TestClient(app.make_app(model)) as client:
        answers = post(client, *contents).json()["answers"]
        assert client.get("/card").json()["conformal"] == UNCERTAIN["conformal"]
    assert [a["set"] for a in answers] == model.predict_sets(contents)
    assert (
        [a["unknown"] for a in answers]
        == model.is_unknown(contents).tolist()
        == [False, False, True]
    )
    assert [len(a["set"]) for a in answers] == [1, 1, 3]


def test_no_set_is_not_an_empty_set(client: TestClient) -> None:
    assert not {"set", "unknown"} & set(post(client, RED).json()["answers"][0])


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"{}", "application/json", 400, "bad_json"),
        (b"not json", "application/json", 400, "bad_json"),
        (b"[" * 200_000, "application/json", 400, "bad_json"),
        (b"\xff\xfe\x00", "application/json", 400, "bad_json"),
        (b'{"images": "x"}', "application/json", 400, "bad_json"),
        (b'{"images": [1]}', "application/json", 400, "bad_json"),
        (b'{"images": []}', "application/json", 400, "no_images"),
        (b'{"images": ["http://127.0.0.1/a.png"]}', "application/json", 400, "bad_base64"),
        (b'{"images": ["file:///etc/passwd"]}', "application/json", 400, "bad_base64"),
        (b'{"images": ["data:image/png;base64,AAAA"]}', "application/json", 400, "bad_base64"),
        (b'{"images": ["AAAA"]}', "application/json", 415, "not_an_image"),
        (b"x", "text/plain", 415, "media_type"),
        (b"x", "application/x-www-form-urlencoded", 415, "media_type"),
        (RED, "image/png", 415, "media_type"),
        (b"x", "multipart/form-data", 400, "bad_form"),
        (b"x", "multipart/form-data; boundary=b", 400, "bad_form"),
        (b"--b\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b", 400, "bad_form"),
    ],
)
def test_bodies_that_are_refused(
    client: TestClient, content: bytes, kind: str, status: int, code: str
) -> None:
    assert (
        why(client.post("/predict", content=content, headers={"content-type": kind}), status)
        == code
    )


def test_requests_that_are_refused(client: TestClient) -> None:
    assert why(client.post("/predict"), 415) == "media_type"
    assert why(client.post("/predict", files={"other": ("a.png", RED)}), 400) == "no_images"
    assert (
        why(client.post("/predict", data={"files": "text"}, files={"other": ("a.png", RED)}), 400)
        == "not_a_file"
    )
    assert why(client.get("/predict"), 405) == "http"
    assert why(client.get("/nothing"), 404) == "http"
    for path in ("/..%2f..%2fetc/passwd", "/web/../serve.py", "/predict/", "/docs", "/index.html"):
        assert client.get(path).status_code == 404


def test_the_file_that_is_bad_is_named(client: TestClient) -> None:
    refused = post(client, RED, b"not a picture", GREEN)
    assert why(refused, 415) == "not_an_image"
    assert refused.json()["error"]["file"] == "1.png"
    assert why(post(client, RED, RED[:-30]), 415) == "not_an_image"
    assert why(post(client, b""), 415) == "not_an_image"
    hostile = client.post("/predict", files=[("files", ("<script>\x1b[2J" * 100, b"x"))]).json()[
        "error"
    ]["file"]
    assert len(hostile) <= 200


def test_limits_on_files_bytes_and_pixels(model: Model) -> None:
    limits = ServerLimits(files=2, file_bytes=500, body_bytes=2000, pixels=200, side=50)
    with TestClient(app.make_app(model, limits)) as client:
        assert post(client, RED, RED).status_code == 200
        assert why(post(client, RED, RED, RED), 413) == "too_many_files"
        assert why(client.post("/predict", json={"images": ["AAAA"] * 3}), 413) == "too_many_files"
        assert why(post(client, RED + bytes(500)), 413) == "too_many_bytes"
        assert why(post(client, bytes(3000)), 413) == "too_many_bytes"
        assert (
            why(
                client.post(
                    "/predict",
                    content=iter([bytes(900)] * 3),
                    headers={"content-type": "application/json"},
                ),
                413,
            )
            == "too_many_bytes"
        )
        assert why(post(client, picture((1, 2, 3), (15, 15))), 413) == "too_many_pixels"
        assert why(post(client, picture((1, 2, 3), (51, 2))), 413) == "too_long"


def test_a_model_that_fails_is_not_a_stack_trace(model: Model) -> None:
    failing = threefold.load(model.path)
    failing.session = type(
        "Session", (), {"run": lambda *_: (_ for _ in ()).throw(ValueError("secret /tmp/x"))}
    )()
    with TestClient(app.make_app(failing), raise_server_exceptions=False) as client:
        assert why(post(client, RED), 500) == "internal"
        assert "secret" not in post(client, RED).text


def test_the_api_key(model: Model) -> None:
    with TestClient(app.make_app(model, api_key="s3cret-ü")) as client:
        for path in ("/card", "/metrics"):
            assert why(client.get(path), 401) == "no_key"
        assert why(post(client, RED), 401) == "no_key"
        assert post(client, RED).headers["www-authenticate"] == "Bearer"
        for wrong in ("Bearer nope", "Bearer ", "Basic s3cret", "s3cret"):
            assert why(post(client, RED, headers={"authorization": wrong}), 401) == "no_key"
        right = {"authorization": "bearer s3cret-ü".encode()}
        assert (
            post(client, RED, headers=right).status_code
            == client.get("/card", headers=right).status_code
            == 200
        )
        assert client.get("/").status_code == client.get("/health").status_code == 200


def test_hosts_and_origins(model: Model) -> None:
    with TestClient(
        app.make_app(model, hosts={"127.0.0.1", "localhost", "[::1]"}),
        base_url="http://127.0.0.1:8000",
    ) as client:
        assert post(client, RED, headers={"origin": "http://127.0.0.1:8000"}).status_code == 200
        for origin in ("https://evil.example", "null", "http://127.0.0.1:9000"):
            assert why(post(client, RED, headers={"origin": origin}), 403) == "wrong_origin"
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
            assert why(client.get("/card", headers={"host": host}), 421) == "wrong_host"
        for host in ("localhost", "LOCALHOST:8000", "[::1]:8000", "127.0.0.1"):
            assert client.get("/card", headers={"host": host}).status_code == 200


def test_every_answer_has_the_headers_that_keep_it_in_its_place(client: TestClient) -> None:
    for response in (
        client.get("/"),
        client.get("/nothing"),
        post(client, b"x"),
        client.get("/app.js"),
    ):
        assert response.headers["content-security-policy"].startswith(
            "default-src 'none'; script-src 'self'"
        )
        assert "unsafe" not in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in response.headers


def test_the_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    for path in app.PAGE:
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
    assert ServerLimits().override(["pixels=5", "files=2"]) == ServerLimits(pixels=5, files=2)
    for bad in (
        "nothing=1",
        "pixels",
        "pixels=",
        "pixels=-1",
        "pixels=0",
        "pixels=1.5",
        "pixels=²",
    ):
        with pytest.raises(RecipeError, match=r"no such limit|not a limit"):
            ServerLimits().override([bad])


def test_a_port_in_use_is_one_clear_error(model: Model) -> None:
    with (
        serving(model.path) as address,
        pytest.raises(RunError, match=r"cannot listen: 127\.0\.0\.1:\d+; got Address"),
    ):
        app.run_server(model.path, port=int(address.rpartition(":")[2]))


def test_the_description_is_valid_json_schema_of_the_answers(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()["components"]["schemas"]["Prediction"]
    assert (
        set(schema["required"])
        <= set(post(client, RED).json()["answers"][0])
        <= set(schema["properties"])
    )
    assert json.dumps(schema)
