"""POST /explain: the map of the file, for one class, without keeping others from their answers."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from support.server import CLASSES, card, encode, picture, post, serving, wait_until, write_model

from threefold.runtime.heat import occlusion_heat, overlay
from threefold.runtime.model import Model
from threefold.serving import app, explain
from threefold.serving.limits import ServerLimits

PIXELS = np.full((42, 63, 3), 90, np.uint8)
PIXELS[:12, 45:] = (250, 20, 20)
SPOTTED = encode(PIXELS, "PNG")
"""Grey, with red at the top right."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(write_model(tmp_path_factory.mktemp("model") / "m.onnx"))


@pytest.fixture
def client(model: Model) -> Iterator[TestClient]:
    with TestClient(app.make_app(model)) as running:
        yield running


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """An event before which no explanation takes a step."""
    event = threading.Event()
    prepare = explain._prepare

    def slow(*args: Any) -> Any:
        event.wait(30)
        return prepare(*args)

    monkeypatch.setattr(explain, "_prepare", slow)
    yield event
    event.set()


def ask(address: str, content: bytes = SPOTTED, query: str = "") -> httpx.Response:
    """Send one image to /explain."""
    files = {"files": ("a.png", content)}
    return httpx.post(f"{address}/explain{query}", files=files, timeout=60)


def metric(address: str, name: str) -> float:
    """The value of a metric without labels."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize("label", ["red", "blue", None])
def test_it_is_the_map_of_the_file(model: Model, client: TestClient, label: str | None) -> None:
    number = CLASSES.index(label or "red")
    heat = occlusion_heat(model, PIXELS, number)
    query = {"class": label} if label else {}

    tree = client.post("/explain", files={"files": ("a.png", SPOTTED)}, params=query).json()
    png = client.post(
        "/explain", files={"files": ("a.png", SPOTTED)}, params={**query, "format": "png"}
    )

    assert (tree["file"], tree["label"]) == ("a.png", label or "red")
    assert tree["probability"] == pytest.approx(heat.probability, abs=1e-6)
    assert tree["lowest"] == pytest.approx(heat.lowest, abs=1e-6)
    assert np.shape(tree["cells"]) == (7, 7)
    assert tree["cropped"] is False
    assert png.headers["content-type"] == "image/png"
    assert png.content == base64.b64decode(tree["picture"])
    expected = np.asarray(overlay(PIXELS, heat.map)).astype(int)
    assert np.abs(decoded(png.content) - expected).max() <= 1


def test_base64_and_a_crop(tmp_path: Path) -> None:
    part = {"filter": "triangle, antialiased", "resize": "crop", "pixels": 21}
    model = Model(write_model(tmp_path / "m.onnx", model_card=card(preprocessing=[part])))
    text = base64.b64encode(SPOTTED).decode()

    with TestClient(app.make_app(model)) as client:
        tree = client.post("/explain?class=red", json={"images": [text]}).json()

    assert tree["cropped"] is True
    heat = occlusion_heat(model, PIXELS, CLASSES.index("red")).map
    assert not heat[:, :10].any()  # what is cropped off
    shown = decoded(base64.b64decode(tree["picture"]))
    assert np.abs(shown - np.asarray(overlay(PIXELS, heat)).astype(int)).max() <= 1


def test_large_images_are_answered_and_shown_smaller(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "BATCH_PIXELS", 50 * 50)
    content = encode(Image.fromarray(PIXELS).resize((1260, 840), Image.Resampling.NEAREST), "PNG")

    small = client.post("/explain", files={"files": ("a.png", SPOTTED)}).json()
    large = client.post("/explain", files={"files": ("a.png", content)}).json()

    assert np.allclose(large["cells"], small["cells"], atol=0.02)
    assert decoded(base64.b64decode(large["picture"])).shape == (683, 1024, 3)


@pytest.mark.parametrize(
    ("files", "query", "status", "code"),
    [
        ([SPOTTED], "?class=violet", 400, "class"),
        ([SPOTTED], "?format=gif", 400, "bad_request"),
        ([], "", 415, "media_type"),
        ([SPOTTED, SPOTTED], "", 413, "too_many_files"),
        ([b"no image"], "", 415, "not_an_image"),
        ([SPOTTED[:-60]], "", 415, "not_an_image"),
        ([picture((1, 2, 3), (300, 200))], "", 413, "too_many_pixels"),
    ],
)
def test_what_is_refused(
    model: Model, files: list[bytes], query: str, status: int, code: str
) -> None:
    with TestClient(app.make_app(model, ServerLimits(pixels=50_000))) as client:
        parts = [("files", ("a.png", content)) for content in files]
        response = client.post(f"/explain{query}", files=parts)

    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert "1 files" not in response.text


def test_key_host_and_origin_are_those_of_predict(model: Model) -> None:
    with TestClient(app.make_app(model, api_key="k", hosts=["testserver"])) as client:

        def status(key: str, **headers: str) -> int:
            headers = {"authorization": f"Bearer {key}", **headers}
            return client.post(
                "/explain", files={"files": ("a", SPOTTED)}, headers=headers
            ).status_code

        assert status("k") == 200
        assert status("wrong") == 401
        assert status("k", origin="http://elsewhere.example") == 403
        assert status("k", host="elsewhere.example") == 421


def test_the_description_and_the_metrics_name_it(client: TestClient) -> None:
    client.post("/explain", files={"files": ("a.png", SPOTTED)})

    tree = client.get("/openapi.json").json()
    metrics = client.get("/metrics").text

    operation = tree["paths"]["/explain"]["post"]
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["properties"]["files"]["maxItems"] == 1
    assert set(operation["responses"]["200"]["content"]) == {"application/json", "image/png"}
    assert {"400", "413", "415", "429", "503"} <= set(operation["responses"])
    assert {parameter["name"] for parameter in operation["parameters"]} == {"class", "format"}
    assert 'threefold_requests_total{route="/explain",status="200"} 1.0' in metrics
    assert "threefold_explain_seconds_count 1.0" in metrics
    assert "threefold_predict_seconds_count 0.0" in metrics


def test_others_get_their_answers_meanwhile(model: Model, gate: threading.Event) -> None:
    with serving(model.path) as address, ThreadPoolExecutor(1) as pool:
        explained = pool.submit(ask, address)
        wait_until(lambda: metric(address, "threefold_requests_in_flight") == 1)

        answers = [post(address, SPOTTED).status_code for _ in range(3)]

        assert answers == [200] * 3
        assert not explained.done()
        gate.set()
        assert explained.result().status_code == 200


@pytest.mark.slow
def test_explanations_too_many_and_too_slow(model: Model, gate: threading.Event) -> None:
    limits = ServerLimits(explanations=2, explain_seconds=2)
    with serving(model.path, limits) as address, ThreadPoolExecutor(2) as pool:
        late = [pool.submit(ask, address) for _ in range(2)]
        wait_until(lambda: metric(address, "threefold_requests_in_flight") == 2)
        wait_until(lambda: ask(address).status_code == 429)

        codes = [request.result().json()["error"]["code"] for request in late]

        assert codes == ["timeout", "timeout"]
        gate.set()
        assert ask(address).status_code == 200


@pytest.mark.slow
def test_who_leaves_gives_the_place_to_others(model: Model, gate: threading.Event) -> None:
    with serving(model.path, ServerLimits(explanations=1)) as address:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/explain", files={"files": ("a", SPOTTED)}, timeout=1)
        assert ask(address).status_code == 429
        gate.set()

        wait_until(lambda: ask(address).status_code == 200)
        metrics = httpx.get(f"{address}/metrics").text

    assert 'route="/explain",status="499"} 1.0' in metrics
