"""The child process of `threefold ui`, and what it and the page's server hand to each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.disk import files_up_to
from support.tiny_runs import make_folder

from threefold.cli import ui_worker
from threefold.cli.ui import describe_run, resolve_data
from threefold.errors import DataError
from threefold.json_files import read_json, write_json
from threefold.recipe.recipe import Job
from threefold.serving.ui_jobs import UNWRITTEN
from threefold.training.progress.event_watcher import EventLog, EventWatcher
from threefold.training.run import Run


def work(monkeypatch: pytest.MonkeyPatch, task: str, state: Path, run: Path) -> dict[str, Any]:
    """Do a task in this process; returns its last event."""
    monkeypatch.setattr(sys, "argv", ["ui_worker", task, str(state), str(run)])
    ui_worker.main()
    lines = (state / "events.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["event"] == "task"
    last: dict[str, Any] = json.loads(lines[-1])
    return last


@pytest.fixture
def state(tmp_path: Path) -> Path:
    data = str(make_folder(tmp_path / "photos", per_class=4))
    settings = {"budget": "1s", "quality": "good"}
    write_json(tmp_path / "state/state.json", {"data": data, "settings": settings})
    return tmp_path / "state"


def test_check_counts_images_and_files_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch, state: Path
) -> None:
    (state.parent / "photos/red/bad.png").write_bytes(b"x")

    last = work(monkeypatch, "check", state, state.parent / "run")

    found = read_json(state / "check.json")
    assert (last["event"], found["usable"], found["skipped"]) == ("done", True, 1)
    assert found["classes"]["red"] == {"train": 4}


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch, state: Path) -> None:
    run = state.parent / "run"
    run.mkdir()
    (run / "mine.txt").write_text("mine")

    last = work(monkeypatch, "plan", state, run)

    assert (last["event"], last["task"]) == ("failed", "plan")
    assert last["message"].startswith("the folder is not empty and not a run: ")
    assert [path.name for path in run.iterdir()] == ["mine.txt"]


def test_a_plan_that_has_begun_is_kept(monkeypatch: pytest.MonkeyPatch, state: Path) -> None:
    run = state.parent / "run"
    write_json(run / "run.json", {})
    (run / "recipe.toml").write_text("mine")
    write_json(state / "plan.json", {})

    last = work(monkeypatch, "plan", state, run)

    assert last["message"].startswith("training has begun with its plan")
    assert (run / "recipe.toml").read_text() == "mine"


def test_faults_are_one_line_and_logged(
    monkeypatch: pytest.MonkeyPatch, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (state / "state.json").write_text("{}")

    last = work(monkeypatch, "check", state, state.parent / "run")

    assert last["message"] == f"this is a fault of threefold: KeyError: {state / 'log.txt'}"
    assert "Traceback" in capsys.readouterr().err


def test_events_of_a_run_can_be_read_at_once(tmp_path: Path) -> None:
    path, job = tmp_path / "events.jsonl", Job("a", 0, "one")
    path.write_text('{"event": "cut')
    watcher = EventWatcher(EventLog(path))

    watcher.plan([job], [40])
    watcher.job(job, skipped=False)
    watcher.batch(8)
    watcher.batch(8)  # within a second: no line of its own
    watcher.epoch({"epoch": 0, "loss": float("nan"), "select_accuracy": 0.5, "lr": 1})
    watcher.note("line\nbreak")

    _, *lines = path.read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert [event.pop("event") for event in events] == ["jobs", "job", "progress", "epoch", "note"]
    assert all(event.pop("time") > 0 for event in events)
    assert events[:2] == [
        {"jobs": [["a", "fold0", "one"]], "images": [40]},
        {"job": ["a", "fold0", "one"], "skipped": False},
    ]
    assert events[2:] == [
        {"job": ["a", "fold0", "one"], "images": 8},
        {
            "job": ["a", "fold0", "one"],
            "epoch": 0,
            "loss": "NaN",
            "select_accuracy": 0.5,
            "images": 16,
        },
        {"text": "line\nbreak"},
    ]


def test_events_name_their_job_where_several_run(tmp_path: Path) -> None:
    one, two = Job("a", 0, "one"), Job("a", 1, "one")
    watcher = EventWatcher(EventLog(tmp_path / "events.jsonl"))
    watcher.job(one, skipped=False)
    watcher.job(two, skipped=False)

    watcher.focus(one)
    watcher.batch(8)
    watcher.focus(two)
    watcher.batch(4)
    watcher.ended(one)
    watcher.ended(two, done=False)

    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    told = [
        (e["event"], e["job"][1], e.get("images", e.get("done"))) for e in map(json.loads, lines)
    ]
    assert told[2:] == [
        ("progress", "fold0", 8),
        ("progress", "fold1", 4),
        ("ended", "fold0", True),
        ("ended", "fold1", False),
    ]


def test_the_page_gets_the_scores_of_a_run(finished: Run) -> None:
    found = describe_run(finished.dir)

    results = finished.results
    assert results.expected is not None
    assert (found["metric"], found["expected"]["value"]) == ("accuracy", results.expected.accuracy)
    assert [score["name"] for score in found["scores"] if score["chosen"]][:1] == [results.chosen]
    assert len(found["scores"]) == len(results.scores)
    assert found["finished"]
    json.dumps(found)


def test_data_are_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)

    assert resolve_data(" photos ") == str(tmp_path / "photos")
    for name in ("", "gone", "https://example.org/photos.zip"):
        with pytest.raises(DataError):
            resolve_data(name)


def test_an_event_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in place of a folder")

    log = EventLog(tmp_path / "file" / "events.jsonl")

    assert not log.write("note", text="a")
    assert EventLog(tmp_path / "events.jsonl").write("note", text="a")


def test_a_full_disk_is_the_exit_code(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ui_worker", "check", str(state), str(state / "run")])

    with files_up_to(0), pytest.raises(SystemExit) as stop:
        ui_worker.main()

    assert stop.value.code == UNWRITTEN
