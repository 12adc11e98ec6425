"""Slow, greedy, hostile and leaving clients, through real sockets; and an orderly end."""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from support.server import picture, post, server_process, serving, write_model

from threefold.serving import app
from threefold.serving.limits import ServerLimits

RED = picture((200, 30, 30))
BOUNDARY = b"--b\r\ncontent-disposition: form-data; name=files; filename=a.png\r\n\r\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.onnx")


OPENED: list[socket.socket] = []


@pytest.fixture(autouse=True)
def close_all() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    OPENED.append(socket.create_connection((host, int(port)), timeout=30))
    return OPENED[-1]


def head(length: int | None, more: str = "") -> bytes:
    size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    return f"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: multipart/form-data; boundary=b\r\n{size}\r\n{more}\r\n".encode()


def answer(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and JSON of what a server says before it closes or waits."""
    found = b""
    while b"\r\n\r\n" not in found or len(found.partition(b"\r\n\r\n")[2]) < int(
        re.search(rb"content-length: (\d+)", found)[1]
    ):  # type: ignore[index]
        part = connection.recv(65536)
        assert part, found
        found += part
    top, _, body = found.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(body)


def closed(connection: socket.socket) -> bool:
    """Whether the server closes the connection within the timeout."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def test_slow_senders_are_answered_and_left(path: Path) -> None:
    """A header that does not end, a body that does not end, nothing at all; others are answered meanwhile."""
    with serving(path, ServerLimits(header_seconds=1, body_seconds=2)) as address:
        silent, slow_head, slow_body = connect(address), connect(address), connect(address)
        slow_head.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n")
        slow_body.sendall(head(1000) + BOUNDARY)
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.1):
                for connection, drop in ((slow_head, b"x: y\r\n"), (slow_body, b"x")):
                    with suppress(OSError):
                        connection.sendall(drop)

        dripping = threading.Thread(target=drip, daemon=True)
        dripping.start()
        assert post(address, RED).status_code == 200
        for connection in (silent, slow_head, slow_body):
            status, told = answer(connection)
            assert (status, told["error"]["code"]) == (408, "slow")
            assert closed(connection)
        stop.set()
        dripping.join()
        assert 'route="/predict",status="408"} 1.0' in httpx.get(f"{address}/metrics").text


def test_who_goes_on_sending_after_the_answer_is_cut_off(path: Path) -> None:
    with serving(path, ServerLimits(body_bytes=1000, header_seconds=1)) as address:
        connection = connect(address)
        connection.sendall(head(10**9) + BOUNDARY)
        assert answer(connection)[0] == 413
        _until(lambda: not _takes(connection))


def _takes(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"x")
    except OSError:  # reset, or broken pipe
        return False
    return True


def test_a_gigabyte_is_refused_by_its_header_or_where_it_passes_the_limit(path: Path) -> None:
    with serving(path) as address:
        connection = connect(address)
        connection.sendall(head(2**30))
        assert answer(connection)[1]["error"]["code"] == "too_many_bytes"
        connection = connect(address)
        connection.sendall(head(None) + f"{len(BOUNDARY):x}\r\n".encode() + BOUNDARY + b"\r\n")
        sent = 0
        chunk = b"100000\r\n" + bytes(2**20) + b"\r\n"
        while sent < 40 and not _readable(connection):
            connection.sendall(chunk)
            sent += 1
        status, told = answer(connection)
        assert (status, told["error"]["code"]) == (413, "too_many_bytes")
        assert "threefold_request_bytes 0.0" in httpx.get(f"{address}/metrics").text


def _readable(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        connection.setblocking(True)
        connection.settimeout(30)


@contextmanager
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The model does not answer before the event."""
    gate = threading.Event()
    real = app.make_inference

    def slow(model: Any) -> Any:
        run = real(model)
        return lambda images, policy: (gate.wait(30), run(images, policy))[1]

    monkeypatch.setattr(app, "make_inference", slow)
    yield gate
    gate.set()


def test_more_requests_than_can_be_answered(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        held(monkeypatch) as gate,
        serving(path, ServerLimits(requests=3)) as address,
        ThreadPoolExecutor(3) as pool,
    ):
        running = [pool.submit(post, address, RED) for _ in range(3)]
        _until(lambda: "threefold_requests_in_flight 3.0" in httpx.get(f"{address}/metrics").text)
        refused = post(address, RED)
        assert (
            refused.status_code,
            refused.json()["error"]["code"],
            refused.headers["retry-after"],
        ) == (
            429,
            "busy",
            "1",
        )
        assert httpx.get(f"{address}/health").status_code == 200
        gate.set()
        assert [f.result().status_code for f in running] == [200] * 3
        assert post(address, RED).status_code == 200


def _until(true: Any, seconds: float = 20) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.02)


def test_an_answer_that_takes_too_long(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(monkeypatch) as gate, serving(path, ServerLimits(answer_seconds=1)) as address:
        late = post(address, RED)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "timeout")
        gate.set()
        assert post(address, RED).status_code == 200


def test_bytes_of_all_requests_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = RED + bytes(60_000)
    with (
        held(monkeypatch) as gate,
        serving(path, ServerLimits(total_bytes=100_000)) as address,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(post, address, big)
        _until(lambda: "threefold_requests_in_flight 1.0" in httpx.get(f"{address}/metrics").text)
        second = post(address, big)
        assert (second.status_code, second.json()["error"]["code"]) == (503, "full")
        gate.set()
        assert first.result().status_code == 200
        assert post(address, big).status_code == 200


def test_connections_without_end(path: Path) -> None:
    with serving(path, ServerLimits(connections=20)) as address:
        crowd = [connect(address) for _ in range(20)]
        time.sleep(0.2)
        status, told = answer(connect(address))
        assert (status, told["error"]["code"]) == (503, "full")
        for connection in crowd:
            connection.close()
        _until(lambda: _works(address))


def _works(address: str) -> bool:
    return post(address, RED).status_code == 200


def test_what_is_not_http(path: Path) -> None:
    with serving(path) as address:
        for noise in (
            b"\x16\x03\x01\x02\x00" + bytes(50),
            b"HELLO\r\n\r\n",
            b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
            b"GET /" + b"a" * 100_000,
        ):
            connection = connect(address)
            connection.sendall(noise)
            status, told = answer(connection)
            assert (status, told["error"]["code"]) == (400, "bad_request")
        assert post(address, RED).status_code == 200


def test_clients_that_leave_leave_nothing(path: Path) -> None:
    with serving(path) as address:
        for cut in (10, 120, len(head(500)), len(head(500) + BOUNDARY) + 20):
            for _ in range(10):
                connection = connect(address)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.sendall((head(500) + BOUNDARY + RED)[:cut])
                connection.close()
        _until(lambda: "threefold_requests_in_flight 0.0" in httpx.get(f"{address}/metrics").text)
        text = httpx.get(f"{address}/metrics").text
        assert "threefold_request_bytes 0.0" in text
        assert "threefold_images_waiting 0.0" in text
        assert post(address, RED).status_code == 200


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_an_orderly_end_answers_what_is_in_flight(path: Path, sign: signal.Signals) -> None:
    with server_process(path) as (server, address):
        half = connect(address)
        body = BOUNDARY + RED + b"\r\n--b--\r\n"
        half.sendall(head(len(body)) + body[:100])
        idle = connect(address)
        _until(lambda: "threefold_requests_in_flight 1.0" in httpx.get(f"{address}/metrics").text)
        server.send_signal(sign)
        _until(lambda: not _accepts(address))
        half.sendall(body[100:])
        status, told = answer(half)
        assert status == 200
        assert told["answers"][0]["label"] == "red"
        assert closed(idle)
        assert server.wait(20) == 0
        assert server.stderr is not None
        assert "Traceback" not in server.stderr.read()


def _accepts(address: str) -> bool:
    try:
        connect(address).close()
    except ConnectionRefusedError:
        return False
    return True


def test_random_bytes_never_make_an_internal_error(path: Path) -> None:
    rng = np.random.default_rng(0)
    with serving(path) as address, httpx.Client(timeout=30) as client:
        for _ in range(60):
            kind = ("application/json", "multipart/form-data; boundary=b", "image/png")[
                rng.integers(3)
            ]
            content = bytes(rng.integers(0, 256, rng.integers(0, 300), dtype=np.uint8))
            if rng.random() < 0.5:
                damaged = bytearray(BOUNDARY + RED + b"\r\n--b--\r\n")
                damaged[rng.integers(len(damaged))] = rng.integers(256)
                content = bytes(damaged)
            response = client.post(
                f"{address}/predict", content=content, headers={"content-type": kind}
            )
            assert response.status_code in (200, 400, 413, 415), response.text
