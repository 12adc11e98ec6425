"""Slow, greedy, hostile and leaving clients, through real sockets; and an orderly end."""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from support.server import (
    colour_graph,
    picture,
    post,
    server_process,
    serving,
    wait_until,
    write_model,
)

from threefold.serving import app
from threefold.serving.limits import ServerLimits
from threefold.serving.middleware import GRACE_SECONDS

RED = picture((200, 30, 30))
PART = b"--b\r\ncontent-disposition: form-data; name=files; filename=a.png\r\n\r\n"
END = b"\r\n--b--\r\n"
Connect = Callable[[str], socket.socket]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.onnx")


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Opens a connection to a server's URL; all are closed after the test."""
    connections: list[socket.socket] = []

    def open_connection(address: str) -> socket.socket:
        host, port = address.removeprefix("http://").split(":")
        connections.append(socket.create_connection((host, int(port)), timeout=30))
        return connections[-1]

    yield open_connection
    for connection in connections:
        connection.close()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """An event before which no model answers."""
    event = threading.Event()
    infer = app.ModelInference.__call__

    def slow(*args: Any) -> Any:
        event.wait(30)
        return infer(*args)

    monkeypatch.setattr(app.ModelInference, "__call__", slow)
    yield event
    event.set()


def request_head(length: int | None) -> bytes:
    """The header of a form for /predict; without a length the body comes in chunks."""
    framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    lines = [
        "POST /predict HTTP/1.1",
        "host: 127.0.0.1",
        "content-type: multipart/form-data; boundary=b",
        framing,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def read_response(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Read one response: its status and JSON."""
    received = b""
    while True:
        part = connection.recv(65536)
        assert part, received
        received += part
        head, separator, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if separator and length is not None and len(body) >= int(length[1]):
            return int(head.split()[1]), json.loads(body)


def read_error(connection: socket.socket) -> tuple[int, str]:
    """Read one response that is an error: its status and code."""
    status, tree = read_response(connection)
    return status, tree["error"]["code"]


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def read_to_end(connection: socket.socket) -> None:
    """Read until the server closes the connection; fails at the timeout."""
    with suppress(ConnectionResetError):
        while connection.recv(65536):
            pass


def can_send(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"x")
    except OSError:  # reset, or broken pipe
        return False
    return True


def has_data(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        connection.settimeout(30)


def metrics_of(address: str) -> str:
    return httpx.get(f"{address}/metrics").text


def wait_for_requests(address: str, count: int) -> None:
    """Wait until the server has that many requests to /predict in flight."""
    line = f"threefold_requests_in_flight {count}.0"
    wait_until(lambda: line in metrics_of(address), 20)


@pytest.mark.slow
def test_slow_senders_are_refused(path: Path, connect: Connect) -> None:
    """No header, a header and a body that do not end; other clients are answered meanwhile."""
    with serving(path, ServerLimits(header_seconds=1, body_seconds=2)) as address:
        silent, slow_head, slow_body = connect(address), connect(address), connect(address)
        slow_head.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n")
        slow_body.sendall(request_head(1000) + PART)
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
            assert read_error(connection) == (408, "slow")
            read_to_end(connection)
        stop.set()
        dripping.join()
        assert 'route="/predict",status="408"} 1.0' in metrics_of(address)


def test_sending_after_the_answer_is_cut_off(path: Path, connect: Connect) -> None:
    with serving(path, ServerLimits(body_bytes=1000, header_seconds=1)) as address:
        connection = connect(address)
        connection.sendall(request_head(10**9) + PART)

        assert read_response(connection)[0] == 413
        wait_until(lambda: not can_send(connection), 20)


def test_a_gigabyte_is_refused_by_its_header(path: Path, connect: Connect) -> None:
    with serving(path) as address:
        connection = connect(address)

        connection.sendall(request_head(2**30))

        assert read_error(connection) == (413, "too_many_bytes")


def test_chunks_are_refused_where_they_pass_the_limit(path: Path, connect: Connect) -> None:
    chunk = b"100000\r\n" + bytes(2**20) + b"\r\n"
    with serving(path) as address:
        connection = connect(address)
        connection.sendall(request_head(None) + f"{len(PART):x}\r\n".encode() + PART + b"\r\n")

        for _ in range(40):
            if has_data(connection):
                break
            connection.sendall(chunk)

        assert read_error(connection) == (413, "too_many_bytes")
        assert "threefold_request_bytes 0.0" in metrics_of(address)


def test_more_requests_than_can_be_answered(path: Path, gate: threading.Event) -> None:
    with serving(path, ServerLimits(requests=3)) as address, ThreadPoolExecutor(3) as pool:
        running = [pool.submit(post, address, RED) for _ in range(3)]
        wait_for_requests(address, 3)

        refused = post(address, RED)

        assert error_of(refused) == (429, "busy")
        assert refused.headers["retry-after"] == "1"
        assert httpx.get(f"{address}/health").status_code == 200
        gate.set()
        assert [request.result().status_code for request in running] == [200] * 3
        assert post(address, RED).status_code == 200


@pytest.mark.slow
def test_stalled_requests_give_way(path: Path, connect: Connect) -> None:
    limits = ServerLimits(requests=3, body_seconds=60)
    with serving(path, limits) as address:
        stalled = [connect(address) for _ in range(3)]
        for connection in stalled:
            connection.sendall(request_head(1000) + PART)
        wait_for_requests(address, 3)

        early = post(address, RED)
        time.sleep(GRACE_SECONDS)
        late = post(address, RED)

        assert error_of(early) == (429, "busy")
        assert late.status_code == 200
        assert read_error(stalled[0]) == (408, "slow")
        assert not has_data(stalled[1])
        for connection in stalled:
            connection.close()


@pytest.mark.slow
def test_stalled_bytes_give_way(path: Path, connect: Connect) -> None:
    limits = ServerLimits(total_bytes=100_000, body_seconds=60)
    with serving(path, limits) as address:
        small, large = connect(address), connect(address)
        small.sendall(request_head(90_000) + PART)
        large.sendall(request_head(90_000) + PART + bytes(80_000))
        wait_for_requests(address, 2)
        time.sleep(GRACE_SECONDS)

        answer = post(address, RED + bytes(60_000))

        assert answer.status_code == 200
        assert read_error(large) == (408, "slow")
        assert not has_data(small)
        small.close()


def test_an_answer_that_takes_too_long(path: Path, gate: threading.Event) -> None:
    with serving(path, ServerLimits(answer_seconds=1)) as address:
        late = post(address, RED)

        assert error_of(late) == (503, "timeout")
        gate.set()
        assert post(address, RED).status_code == 200


def test_bytes_of_all_requests_together(path: Path, gate: threading.Event) -> None:
    big = RED + bytes(60_000)
    with serving(path, ServerLimits(total_bytes=100_000)) as address, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, address, big)
        wait_for_requests(address, 1)

        second = post(address, big)

        assert error_of(second) == (503, "full")
        gate.set()
        assert first.result().status_code == 200
        assert post(address, big).status_code == 200


def test_too_many_connections(path: Path, connect: Connect) -> None:
    with serving(path, ServerLimits(connections=20)) as address:
        crowd = [connect(address) for _ in range(20)]
        time.sleep(0.2)

        assert read_error(connect(address)) == (503, "full")
        for connection in crowd:
            connection.close()
        wait_until(lambda: post(address, RED).status_code == 200, 20)


@pytest.mark.parametrize(
    "noise",
    [
        b"\x16\x03\x01\x02\x00" + bytes(50),
        b"HELLO\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET /" + b"a" * 100_000,
    ],
    ids=["TLS", "a word", "two hosts", "a long path"],
)
def test_what_is_not_http(path: Path, connect: Connect, noise: bytes) -> None:
    with serving(path) as address:
        connection = connect(address)

        connection.sendall(noise)

        assert read_error(connection) == (400, "bad_request")
        assert post(address, RED).status_code == 200


def test_clients_that_leave_leave_nothing(path: Path, connect: Connect) -> None:
    head = request_head(500)
    request = head + PART + RED
    with serving(path) as address:
        for length in (10, 120, len(head), len(head + PART) + 20):
            for _ in range(10):
                connection = connect(address)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.sendall(request[:length])
                connection.close()

        wait_for_requests(address, 0)
        metrics = metrics_of(address)
        assert "threefold_request_bytes 0.0" in metrics
        assert "threefold_images_waiting 0.0" in metrics
        assert post(address, RED).status_code == 200


def test_clients_that_leave_are_no_errors_of_the_server(path: Path, connect: Connect) -> None:
    body = PART + RED
    with server_process(path) as (server, address):
        for _ in range(3):
            connection = connect(address)
            connection.sendall(request_head(len(body) + 100) + body)
            wait_for_requests(address, 1)
            connection.close()
            wait_for_requests(address, 0)

        metrics = metrics_of(address)
        server.terminate()
        log = server.communicate()[1]

    assert 'route="/predict",status="499"} 3.0' in metrics
    assert 'status="500"' not in metrics
    assert log == ""


def test_a_length_and_chunks_are_refused(path: Path, connect: Connect) -> None:
    """A proxy may take the one and the server the other for the end of the request."""
    smuggled = b"GET /card HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    head = request_head(None).replace(b"\r\n\r\n", b"\r\ncontent-length: 5\r\n\r\n")
    with serving(path) as address:
        connection = connect(address)
        connection.sendall(head + b"0\r\n\r\n" + smuggled)

        assert read_error(connection) == (400, "bad_request")
        read_to_end(connection)
        assert 'route="/card"' not in metrics_of(address)


def endless_graph() -> onnx.ModelProto:
    """A graph with a loop that does not end."""
    model = colour_graph()
    helper, tensor = onnx.helper, onnx.helper.make_tensor
    value = helper.make_tensor_value_info
    first = next(node for node in model.graph.node if node.op_type == "MatMul")
    first.output[0] = "early"
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["on"], ["still_on"]),
            helper.make_node("Add", ["state", "nothing"], ["next"]),
        ],
        "body",
        [
            value("turn", onnx.TensorProto.INT64, []),
            value("on", onnx.TensorProto.BOOL, []),
            value("state", onnx.TensorProto.FLOAT, None),
        ],
        [
            value("still_on", onnx.TensorProto.BOOL, []),
            value("next", onnx.TensorProto.FLOAT, None),
        ],
    )
    model.graph.initializer.extend(
        [
            tensor("turns", onnx.TensorProto.INT64, [], [2**62]),
            tensor("always", onnx.TensorProto.BOOL, [], [True]),
            tensor("nothing", onnx.TensorProto.FLOAT, [], [0.0]),
        ]
    )
    place = next(i for i, node in enumerate(model.graph.node) if node is first) + 1
    loop = helper.make_node("Loop", ["turns", "always", "early"], ["logits"], body=body)
    model.graph.node.insert(place, loop)
    return model


@pytest.mark.slow
def test_a_model_that_does_not_end_does_not_keep_the_server(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.onnx", endless_graph())
    limits = ServerLimits(answer_seconds=1, body_seconds=1)
    with server_process(path, limits) as (server, address):
        late = post(address, RED)
        server.terminate()

        assert error_of(late) == (503, "timeout")
        assert server.wait(20) == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_an_orderly_end_answers_what_is_in_flight(
    path: Path, connect: Connect, number: signal.Signals
) -> None:
    body = PART + RED + END

    def accepts(address: str) -> bool:
        try:
            connect(address).close()
        except ConnectionRefusedError:
            return False
        return True

    with server_process(path) as (server, address):
        half = connect(address)
        half.sendall(request_head(len(body)) + body[:100])
        idle = connect(address)
        wait_for_requests(address, 1)

        server.send_signal(number)
        wait_until(lambda: not accepts(address), 20)
        half.sendall(body[100:])

        status, tree = read_response(half)
        assert status == 200
        assert tree["answers"][0]["label"] == "red"
        read_to_end(idle)
        assert server.wait(20) == 0
        assert server.stderr is not None
        assert "Traceback" not in server.stderr.read()


def test_random_bytes_never_make_an_internal_error(path: Path) -> None:
    rng = np.random.default_rng(0)
    media_types = ("application/json", "multipart/form-data; boundary=b", "image/png")
    with serving(path) as address, httpx.Client(timeout=30) as client:
        for _ in range(60):
            media_type = media_types[rng.integers(3)]
            content = bytes(rng.integers(0, 256, rng.integers(0, 300), dtype=np.uint8))
            if rng.random() < 0.5:
                damaged = bytearray(PART + RED + END)
                damaged[rng.integers(len(damaged))] = rng.integers(256)
                content = bytes(damaged)

            response = client.post(
                f"{address}/predict", content=content, headers={"content-type": media_type}
            )

            assert response.status_code in (200, 400, 413, 415), response.text
