"""Several server processes on one port: they add up, replace each other, and end together."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from support.server import picture, post, server_process, wait_until, write_model

from threefold.errors import RunError
from threefold.runtime.model import FULL
from threefold.serving import app, workers
from threefold.serving.limits import ServerLimits

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs descriptors to pass on")


def list_processes(*selection: str) -> list[int]:
    """The processes that `ps` selects and that have not ended."""
    command = ["ps", "-o", "pid=,stat=", *selection]
    found = subprocess.run(command, capture_output=True, text=True)
    lines = map(str.split, found.stdout.splitlines())
    return [int(process) for process, state in lines if not state.startswith("Z")]


def children(server: subprocess.Popen[str]) -> list[int]:
    """The processes of a server that live."""
    return list_processes("--ppid", str(server.pid))


def is_alive(process: int) -> bool:
    """Whether a process lives."""
    return bool(list_processes("-p", str(process)))


def counted(address: str) -> float:
    """Answered requests to /predict, as /metrics has them."""
    text = httpx.get(f"{address}/metrics").text
    found = re.search(r'threefold_requests_total\{route="/predict",status="200"\} (\S+)', text)
    return float(found[1]) if found else 0.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.onnx")


def test_both_processes_answer_and_metrics_add_up(path: Path) -> None:
    with server_process(path, workers=2) as (server, address):
        processes = children(server)
        answers = [post(address, picture((255, 0, 0))) for _ in range(24)]
        first, second = counted(address), counted(address)

    assert len(processes) == 2
    assert [answer.json()["answers"][0]["label"] for answer in answers] == ["red"] * 24
    assert (first, second) == (24, 24)


def test_a_process_that_dies_is_replaced(path: Path) -> None:
    with server_process(path, workers=2) as (server, address):
        killed, spared = children(server)
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: len(set(children(server)) - {killed, spared}) == 1)
        answers = [post(address, picture((255, 0, 0))).status_code for _ in range(16)]
        server.terminate()
        _, said = server.communicate(timeout=60)

    assert answers == [200] * 16
    assert "a server process was ended by SIGKILL" in said
    assert server.returncode == 0


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_all_in_order(path: Path, number: int) -> None:
    with server_process(path, workers=2) as (server, _):
        processes = children(server)
        server.send_signal(number)
        _, said = server.communicate(timeout=60)

    assert (server.returncode, said) == (0, "")
    assert not any(map(is_alive, processes))


@pytest.mark.slow
def test_processes_end_when_their_parent_is_killed(path: Path) -> None:
    with server_process(path, workers=2) as (server, _):
        processes = children(server)
        server.kill()
        wait_until(lambda: not any(map(is_alive, processes)))


@pytest.mark.slow
def test_a_file_that_changed_is_not_served_beside_the_old_one(path: Path) -> None:
    with server_process(path, workers=2) as (server, _):
        write_model(path)
        os.utime(path, (0, 0))
        os.kill(children(server)[0], signal.SIGKILL)
        _, said = server.communicate(timeout=60)

    assert server.returncode == 1
    assert "the model's file has changed while it was served" in said.splitlines()[-1]


@pytest.mark.slow
def test_a_port_that_processes_share_is_in_use(path: Path) -> None:
    with server_process(path, workers=2) as (_, address):
        port = int(address.rpartition(":")[2])
        with server_process(path, port=port, workers=2) as (second, nothing):
            _, said = second.communicate(timeout=60)

    assert nothing == ""
    assert said.startswith(f"cannot listen: 127.0.0.1:{port}; got Address already in use")


def test_processes_that_cannot_start_are_one_clear_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.sys, "executable", shutil.which("false"))
    version = workers.FileVersion.of(path)
    settings = workers.WorkerSettings(path, version, 1, "", (), ServerLimits(), FULL)

    with pytest.raises(RunError, match="processes do not start; got 3 that ended") as error:
        workers.run_workers(settings, "127.0.0.1", 0, 2)

    assert "\n" not in str(error.value)


def test_no_process_starts_for_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nothing")
    before = threading.active_count()

    with pytest.raises(Exception, match=re.escape(str(path))):
        app.run_server(path, port=0, workers=2)

    assert threading.active_count() == before
