"""A model that costs nothing to make and whose answers tell images apart, and a server around it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
"""Keys of a card with prediction sets and a threshold for unknown images."""
CLASSES, MEMBERS = ("blue", "green", "red"), ("sharp", "soft")


def card(**changes: Any) -> dict[str, Any]:
    """A model card as `api.export` writes it."""
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
    """Mean colour of the image -> softmax; the answer of two images differs unless their mean colours are equal."""
    node, tensor, value = helper.make_node, helper.make_tensor, helper.make_tensor_value_info
    nodes = [
        node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        node("MatMul", ["means", "weights"], ["logits"]),
        node("Mul", ["logits", "scales"], ["scaled"]),
        node("Softmax", ["scaled"], ["member_probs"], axis=-1),
        node("ReduceMean", ["member_probs", "one"], ["probs"], keepdims=0),
    ]
    weights = np.eye(3, dtype=np.float32)[::-1] / 40
    held = [
        tensor("axes", TensorProto.INT64, [2], [1, 2]),
        tensor("one", TensorProto.INT64, [1], [1]),
        helper.make_tensor("weights", TensorProto.FLOAT, [3, 3], weights.tobytes(), raw=True),
        tensor("scales", TensorProto.FLOAT, [2, 1], [1.0, 0.25]),
    ]
    nodes.insert(3, node("Unsqueeze", ["logits", "one"], ["rows"]))
    nodes[4] = node("Mul", ["rows", "scales"], ["scaled"])
    graph = helper.make_graph(
        nodes,
        "colours",
        [value("images", TensorProto.UINT8, ["b", "h", "w", 3])],
        [
            value("probs", TensorProto.FLOAT, ["b", 3]),
            value("member_probs", TensorProto.FLOAT, ["b", 2, 3]),
        ],
        held,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def write_model(path: Path, model: onnx.ModelProto | None = None, told: Any = None) -> Path:
    """Write a model file with a card; `told` may be a card, or the text that stands in its place."""
    model = model if model is not None else colour_graph()
    told = card() if told is None else told
    helper.set_model_props(model, {KEY: told if isinstance(told, str) else json.dumps(told)})
    path.write_bytes(model.SerializeToString())
    return path


def picture(
    colour: tuple[int, int, int], size: tuple[int, int] = (12, 8), kind: str = "PNG", **options: Any
) -> bytes:
    """An image file of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind, **options)
    return buffer.getvalue()


@contextmanager
def serving(path: Path, limits: ServerLimits | None = None, **options: Any) -> Iterator[str]:
    """A server on a free port of this machine, in a thread; gives its address."""
    server, listener = app.make_server(
        Model(path), "127.0.0.1", 0, limits or ServerLimits(), **options
    )
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


SERVER = """
import sys, pathlib
from threefold.serving.app import run_server
run_server(pathlib.Path(sys.argv[1]), port=0, ready=lambda address: print(address, flush=True))
"""


@contextmanager
def process(path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(path)],
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
    return httpx.post(f"{address}/predict", files={"files": (name, content)}, timeout=60)
