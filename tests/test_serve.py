"""The server answers as the file does, and refuses what it cannot read."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

import threefold
from threefold import serve
from threefold.run import Run


@pytest.fixture(scope="module")
def client(finished: Run) -> TestClient:
    return TestClient(serve.make_app(threefold.load(finished.dir / "model.onnx")))


def test_answers_are_the_files(client: TestClient, finished: Run) -> None:
    paths = [Path(finished.recipe.data.root) / i for i in finished.sources.test.ids[:3]]  # type: ignore[union-attr]
    answers = client.post("/predict", files=[("files", (p.name, p.read_bytes(), "image/png")) for p in paths]).json()[
        "answers"
    ]
    expected = threefold.load(finished.dir / "model.onnx").predict_proba(paths)
    assert [a["top"][0]["probability"] for a in answers] == pytest.approx(expected.max(1).tolist(), abs=1e-6)
    assert set(answers[0]["members"]) == {"plain", "gated"}


def test_health_and_docs(client: TestClient) -> None:
    assert client.get("/health").json()["status"] == "ok"
    assert client.get("/openapi.json").status_code == 200


def test_bad_input_is_refused_without_details_of_the_machine(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = client.post("/predict", files=[("files", ("x.jpg", b"not a picture", "image/jpeg"))])
    assert bad.status_code == 415
    assert "x.jpg" in bad.json()["detail"]
    assert "Traceback" not in bad.text
    monkeypatch.setattr(serve, "MAX_BYTES", 10)
    assert client.post("/predict", files=[("files", ("x.jpg", b"0" * 11, "image/jpeg"))]).status_code == 413
    assert (
        client.post("/predict", files=[("files", (f"{i}.jpg", b"0", "image/jpeg")) for i in range(65)]).status_code
        == 413
    )
    assert client.post("/predict").status_code == 422
