"""The page of `threefold ui` over HTTP: a run from its images to its file, stopped and resumed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from support.server import picture, wait_until
from support.ui import WORKER, make_client, make_workbench, wait_for, write_photos, write_planned

from threefold.serving.ui import PAGE
from threefold.serving.ui_jobs import UNWRITTEN, Workbench


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path)


@pytest.fixture
def workbench(photos: Path) -> Iterator[Workbench]:
    made = make_workbench(photos.parent / "runs")
    yield made
    made.close()


@pytest.fixture
def client(workbench: Workbench) -> Iterator[TestClient]:
    with make_client(workbench) as running:
        yield running


@pytest.fixture
def planned(photos: Path) -> str:
    """A run whose plan is ready."""
    return write_planned(photos.parent / "runs", "photos", photos)


@pytest.fixture
def endless(photos: Path) -> str:
    """A run whose plan is ready, and which trains until it is stopped."""
    return write_planned(photos.parent / "runs", "endless", photos, budget="0")


def start(client: TestClient, name: str) -> None:
    """Start to train, and wait until that has begun."""
    assert client.post(f"/runs/{name}/fit", json={}).json()["running"] == "fit"
    wait_until(lambda: client.get(f"/runs/{name}").json()["begun"])


def test_the_files_of_the_page_are_there(client: TestClient) -> None:
    for route in PAGE:
        assert client.get(route).status_code == 200
    assert client.get("/state").json()["runs"] == []


def test_a_run_goes_from_images_to_an_answer(client: TestClient, photos: Path) -> None:
    name = str(client.post("/runs", json={"data": str(photos)}).json()["name"])
    wait_for(client, name)
    assert client.post(f"/runs/{name}/plan", json={"budget": "5m"}).status_code == 200
    wait_for(client, name)
    planned = client.get(f"/runs/{name}").json()
    assert (name, planned["planned"], planned["begun"]) == ("photos", True, False)
    assert planned["check"]["classes"] == {"cat": {"train": 3}}
    assert planned["plan"]["settings"]["budget"] == "5m"

    client.post(f"/runs/{name}/fit", json={})
    run = wait_for(client, name)

    assert run["files"] == ["report.html", "model.onnx"]
    report = client.get(f"/runs/{name}/report.html")
    assert (report.text, "sandbox" in report.headers["content-security-policy"]) == (
        "<p>report</p>",
        True,
    )
    model = client.get(f"/runs/{name}/model.onnx")
    assert model.content == (photos.parent / "runs/photos/model.onnx").read_bytes()
    assert model.headers["content-disposition"] == 'attachment; filename="photos.onnx"'
    files = {"files": ("a.png", picture((200, 30, 30)))}
    answers = client.post(f"/try/{name}/predict?top=1", files=files).json()["answers"]
    assert answers[0]["label"] == "red"
    assert client.get(f"/try/{name}/").text.startswith("<!doctype html>")


def test_events_are_read_on_from_a_position(client: TestClient, photos: Path, planned: str) -> None:
    first = client.get(f"/runs/{planned}/events").json()
    path = photos.parent / "runs/.ui/photos/events.jsonl"
    with open(path, "a") as file:
        file.write('{"event": "note", "text": "a"}\n{"event": "cut sh')
    second = client.get(f"/runs/{planned}/events", params={"after": first["next"]}).json()

    assert [event["event"] for event in first["events"]] == ["task", "done"]
    assert second["events"] == [{"event": "note", "text": "a"}]
    assert second["next"] == path.read_bytes().rindex(b"\n") + 1


def test_stop_and_resume(client: TestClient, endless: str) -> None:
    start(client, endless)

    assert client.post(f"/runs/{endless}/fit", json={}).status_code == 409
    assert client.post(f"/runs/{endless}/stop", json={}).status_code == 200
    wait_for(client, endless, "stopped")
    assert client.post(f"/runs/{endless}/stop", json={}).status_code == 409
    assert client.post(f"/runs/{endless}/plan", json={}).status_code == 409

    assert client.post(f"/runs/{endless}/fit", json={}).json()["running"] == "fit"


def test_a_server_started_again_finds_what_is_at_work(
    client: TestClient, photos: Path, endless: str
) -> None:
    start(client, endless)

    with make_client(make_workbench(photos.parent / "runs")) as later:
        (run,) = later.get("/state").json()["runs"]
        assert (run["name"], run["running"]) == (endless, "fit")
        later.post(f"/runs/{endless}/stop", json={})
        wait_for(later, endless, "stopped")


def test_the_end_of_the_server_stops_training(
    client: TestClient, workbench: Workbench, endless: str
) -> None:
    start(client, endless)

    assert workbench.close() == [endless]

    assert wait_for(client, endless, "stopped")["begun"]


def test_one_run_trains_at_a_time(client: TestClient, endless: str, planned: str) -> None:
    client.post(f"/runs/{endless}/fit", json={})

    refused = client.post(f"/runs/{planned}/fit", json={})

    assert refused.status_code == 409
    assert refused.json()["error"]["message"].startswith("endless is at work; stop it or wait")
    assert client.post(f"/runs/{planned}/check", json={}).status_code == 200


def test_killed_work_is_called_interrupted(client: TestClient, photos: Path, planned: str) -> None:
    with open(photos.parent / "runs/.ui/photos/events.jsonl", "a") as file:
        file.write('{"event": "progress"}\n')

    assert client.get(f"/runs/{planned}").json()["outcome"] == "interrupted"


def test_runs_of_the_terminal_are_listed_and_left_alone(client: TestClient, photos: Path) -> None:
    folder = photos.parent / "runs/mine"
    folder.mkdir()
    (folder / "recipe.toml").write_text("")
    (folder / "run.json").write_text("{}")

    (run,) = client.get("/state").json()["runs"]
    assert (run["name"], run["own"], run["finished"]) == ("mine", False, False)
    for action in ("check", "plan", "fit", "discard"):
        assert client.post(f"/runs/mine/{action}", json={}).status_code == 409
    assert sorted(path.name for path in folder.iterdir()) == ["recipe.toml", "run.json"]


def test_a_run_is_discarded_with_the_images_that_were_sent(
    client: TestClient, photos: Path, planned: str
) -> None:
    upload = client.post("/uploads", json={}).json()["upload"]
    headers = {"content-type": "application/octet-stream"}
    for name in ("sent/cat/1.png", "sent/dog/1.png"):
        client.put(f"/uploads/{upload}", params={"name": name}, content=b"x", headers=headers)
    data = client.post(f"/uploads/{upload}/finish", json={}).json()["data"]
    name = str(client.post("/runs", json={"data": data}).json()["name"])
    wait_for(client, name)
    assert (name, Path(data, "cat/1.png").read_bytes()) == ("sent", b"x")

    for run in (name, planned):
        assert client.post(f"/runs/{run}/discard", json={}).status_code == 200

    assert client.get("/state").json()["runs"] == []
    assert not Path(data).exists()
    assert not (photos.parent / "runs/photos").exists()
    assert photos.exists()


def test_what_has_begun_is_not_discarded(client: TestClient, photos: Path, planned: str) -> None:
    (photos.parent / "runs/photos/run.json").write_text("{}")

    refused = client.post(f"/runs/{planned}/discard", json={})

    assert refused.status_code == 409
    assert str(photos.parent / "runs/photos") in refused.json()["error"]["message"]


def test_bad_data_is_one_line_and_no_run(client: TestClient) -> None:
    response = client.post("/runs", json={"data": "/nowhere/photos"})

    assert response.status_code == 400
    assert "\n" not in response.json()["error"]["message"]
    assert client.get("/state").json()["runs"] == []


@pytest.mark.parametrize(
    "body",
    [
        {"budget": "soon"},
        {"budget": "-5m"},
        {"quality": "perfect"},
        {"quality": "good", "set": "x"},
        {"skip_bad": "maybe"},
    ],
)
def test_bad_plans_start_nothing(client: TestClient, planned: str, body: dict[str, str]) -> None:
    assert client.post(f"/runs/{planned}/plan", json=body).status_code == 400
    assert client.get(f"/runs/{planned}").json()["running"] == ""


def test_training_needs_a_plan(client: TestClient, photos: Path, planned: str) -> None:
    (photos.parent / "runs/photos/recipe.toml").unlink()

    refused = client.post(f"/runs/{planned}/fit", json={})

    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "no_plan")


@pytest.mark.parametrize("name", ["gone", "%2e%2e", ".ui", "..%2fphotos", "colours.onnx"])
def test_other_names_are_no_runs(client: TestClient, name: str) -> None:
    for path in (f"/runs/{name}", f"/runs/{name}/events", f"/runs/{name}/report.html"):
        assert client.get(path).status_code == 404
    assert client.post(f"/try/{name}/predict").status_code == 404
    assert client.post(f"/runs/{name}/stop", json={}).status_code in (404, 405)


def test_new_runs_have_new_names_and_come_first(
    client: TestClient, photos: Path, planned: str
) -> None:
    name = client.post("/runs", json={"data": str(photos)}).json()["name"]

    names = [run["name"] for run in client.get("/state").json()["runs"]]
    assert names == [name, planned] == ["photos-2", "photos"]


def test_a_task_whose_end_cannot_be_written_has_failed(photos: Path) -> None:
    """A full disk also keeps the process from writing that the disk is full."""
    workbench = make_workbench(photos.parent / "runs")
    workbench.command = [sys.executable, "-c", f"raise SystemExit({UNWRITTEN})"]
    name = workbench.create(str(photos))
    with make_client(workbench) as client:
        run = wait_for(client, name, "failed")
        assert "cannot write in " in run["message"]
        assert "free disk space" in run["message"]

        workbench.command = WORKER
        workbench.start(name, "check", {})
        assert wait_for(client, name)["message"] == ""
