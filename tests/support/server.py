"""A tiny model whose answers tell images apart, and a server around it."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
from onnx import TensorProto, helper
from PIL import Image

from threefold.runtime.model import KEY, Model
from threefold.serving import app
from threefold.serving.limits import ServerLimits

UNCERTAIN: dict[str, Any] = {
    "conformal": [
        {
            "by_class": False,
            "state": {
                "method": "lac",
                "by_class": False,
                "never_empty": True,
                "alpha": 0.1,
                "n": 500,
                "k": 3,
                "thresholds": [0.8],
            },
            "n": 1000,
            "coverage": 0.912,
            "interval": [0.893, 0.928],
            "mean_size": 1.2,
            "single": 0.8,
            "rows": "test",
        },
    ],
    "unknown": {
        "state": {"score": "1 - max", "rate": 0.05, "n": 500, "threshold": 0.6},
        "rate": 0.05,
        "measured": 0.048,
        "n": 1000,
    },
}
"""Keys of a model card with prediction sets and a threshold for unknown images."""
CLASSES, MEMBERS = ("blue", "green", "red"), ("sharp", "soft")


def card(**changes: Any) -> dict[str, Any]:
    """Make a model card as `export` writes it."""
    score = {
        "accuracy": 0.884,
        "interval": [0.863, 0.902],
        "level": 0.95,
        "rows": "test",
        "n": 1000,
        "protocol": "honest",
        "fitted_on": "oof",
    }
    return {
        "format": 1,
        "name": "colours",
        "classes": list(CLASSES),
        "members": list(MEMBERS),
        "method": "mean",
        "temperature": 1.23,
        "score": score,
        "backbones": ["mean + linear", "mean + gru"],
        "n_train": 3000,
        "digest": "0123456789abcdef",
        "versions": {"threefold": "0.1.0", "torch": "2.15.0"},
        "parity": {"images": 16, "max_difference": 3e-7, "top1_agreement": 1.0, "tolerance": 1e-4},
        **changes,
    }


def colour_graph() -> onnx.ModelProto:
    """Make a graph that classifies the mean colour; images of different colour differ in answer."""
    node, tensor, value = helper.make_node, helper.make_tensor, helper.make_tensor_value_info
    nodes = [
        node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        node("MatMul", ["means", "weights"], ["logits"]),
        node("Unsqueeze", ["logits", "one"], ["rows"]),
        node("Mul", ["rows", "scales"], ["scaled"]),
        node("Softmax", ["scaled"], ["member_probs"], axis=-1),
        node("ReduceMean", ["member_probs", "one"], ["probs"], keepdims=0),
    ]
    weights = np.eye(3, dtype=np.float32)[::-1] / 40
    initializers = [
        tensor("axes", TensorProto.INT64, [2], [1, 2]),
        tensor("one", TensorProto.INT64, [1], [1]),
        tensor("weights", TensorProto.FLOAT, [3, 3], weights.tobytes(), raw=True),
        tensor("scales", TensorProto.FLOAT, [2, 1], [1.0, 0.25]),
    ]
    outputs = [
        value("probs", TensorProto.FLOAT, ["b", 3]),
        value("member_probs", TensorProto.FLOAT, ["b", 2, 3]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [value("images", TensorProto.UINT8, ["b", "h", "w", 3])],
        outputs,
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def write_model(
    path: Path,
    model: onnx.ModelProto | None = None,
    model_card: dict[str, Any] | str | None = None,
) -> Path:
    """Write a model file.

    Args:
        path: the file.
        model: the graph (default: `colour_graph()`).
        model_card: the card, or a text in its place (default: `card()`).
    """
    model = colour_graph() if model is None else model
    content = card() if model_card is None else model_card
    text = content if isinstance(content, str) else json.dumps(content)
    helper.set_model_props(model, {KEY: text})
    path.write_bytes(model.SerializeToString())
    return path


def picture(
    colour: tuple[int, int, int], size: tuple[int, int] = (12, 8), kind: str = "PNG", **options: Any
) -> bytes:
    """Encode an image of one colour."""
    return encode(Image.new("RGB", size, colour), kind, **options)


def encode(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    """Encode an image as a file."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def wait_until(condition: Any, seconds: float = 60) -> Any:
    """Wait until a function returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.02)
    return value


@contextmanager
def serving(path: Path, limits: ServerLimits | None = None, **options: Any) -> Iterator[str]:
    """Run a server on a free port of this machine, in a thread; yields its URL."""
    limits = limits or ServerLimits()
    with in_thread(*app.make_server(Model(path), "127.0.0.1", 0, limits, **options)) as address:
        yield address


@contextmanager
def in_thread(server: Any, listener: socket.socket) -> Iterator[str]:
    """Run uvicorn on a listener in a thread; yields its URL, and closes both at the end."""
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended before it started"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


SERVER = """
import json, sys, pathlib
from threefold.errors import ThreefoldError
from threefold.serving.app import run_server
from threefold.serving.limits import ServerLimits
limits, options = ServerLimits(**json.loads(sys.argv[2])), json.loads(sys.argv[3])
ready = lambda url: print(url, flush=True)
try:
    run_server(pathlib.Path(sys.argv[1]), limits=limits, ready=ready, **options)
except ThreefoldError as error:
    sys.exit(str(error))
"""


@contextmanager
def server_process(
    path: Path, limits: ServerLimits | None = None, port: int = 0, workers: int = 1
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server in a process of its own; yields the process and its URL."""
    values = json.dumps(asdict(limits or ServerLimits()))
    options = json.dumps({"port": port, "workers": workers})
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(path), values, options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        yield server, server.stdout.readline().strip()
    finally:
        server.kill()
        server.communicate()


def post(address: str, content: bytes, name: str = "a.png") -> httpx.Response:
    """Send one image to /predict."""
    return httpx.post(f"{address}/predict", files={"files": (name, content)}, timeout=300)
