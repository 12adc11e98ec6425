"""The page of `threefold ui` over runs of a stand-in for its child process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from support.server import wait_until, write_model
from threefold.errors import DataError
from threefold.json_files import write_json
from threefold.serving.ui import make_ui_app
from threefold.serving.ui_jobs import STATE_FOLDER, Workbench
from threefold.serving.ui_uploads import UploadLimits, Uploads

KEY = "the-key"
WORKER = [sys.executable, str(Path(__file__).with_name("ui_worker.py"))]


def resolve(name: str) -> str:
    """Return the full path of what exists."""
    if not Path(name).exists():
        raise DataError("no such folder or table", where=name)
    return str(Path(name).resolve())


def make_workbench(runs: Path) -> Workbench:
    """Make a workbench whose runs are finished once they have a file."""
    return Workbench(runs, WORKER, resolve, lambda f: {"finished": (f / "model.onnx").exists()})


def make_client(
    workbench: Workbench, limits: UploadLimits | None = None, key: str = KEY
) -> TestClient:
    """Make a client that has opened the page with a key."""
    uploads = Uploads(workbench.runs / STATE_FOLDER / "uploads", limits)
    app = make_ui_app(workbench, uploads, KEY)
    client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    client.get("/", params={"key": key})
    return client


def write_photos(folder: Path) -> Path:
    """Make a folder that stands for images, and the file that training will export."""
    (folder / "photos").mkdir(parents=True)
    (folder / "runs").mkdir()
    write_model(folder / "runs" / "colours.onnx")
    return folder / "photos"


def write_planned(runs: Path, name: str, data: Path, budget: str = "5m") -> str:
    """Write the files of a run that is checked and planned, without a process; returns its name."""
    state, settings = runs / STATE_FOLDER / name, {"budget": budget, "quality": "good"}
    tree = {"data": str(data), "created": 1.0, "task": "plan", "since": 2.0, "settings": settings}
    write_json(state / "state.json", tree)
    write_json(state / "check.json", {"classes": {}, "findings": [], "usable": True})
    write_json(state / "plan.json", {"decisions": [], "members": [], "settings": settings})
    events = [{"event": "task", "task": "plan"}, {"event": "done", "task": "plan"}]
    lines = [json.dumps(event) + "\n" for event in events]
    (state / "events.jsonl").write_text("".join(lines))
    (runs / name).mkdir()
    (runs / name / "recipe.toml").write_text("")
    return name


def wait_for(client: TestClient, name: str, outcome: str = "done") -> dict[str, Any]:
    """Wait until a task of a run has ended, and check how; returns the run."""
    run: dict[str, Any] = wait_until(
        lambda: (tree := client.get(f"/runs/{name}").json())["running"] == "" and tree
    )
    assert run["outcome"] == outcome, run
    return run
