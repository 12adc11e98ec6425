"""Probes of `hostile.py` for image files, model files, what predict is given, and the server."""

from __future__ import annotations

import io
import json
import logging
import socket
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
from hostile_probe import Probe, Refusal
from onnx import TensorProto, helper
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.server import in_thread

from threefold.cli.console import print_json
from threefold.data.images import decode
from threefold.errors import ThreefoldError
from threefold.exporting import onnx_files
from threefold.runtime.model import Model
from threefold.runtime.predict import write_predictions
from threefold.serving.app import make_server
from threefold.serving.limits import ServerLimits

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
CARD: dict[str, Any] = {
    "format": 1,
    "name": "colours",
    "classes": ["red", "green", "blue"],
    "members": ["mean"],
}


def encode(kind: str, pixels: np.ndarray = PIXELS, **options: Any) -> bytes:
    """Encode pixels as a file."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


JPEG, PNG = encode("JPEG"), encode("PNG")
GIF = encode("GIF", PIXELS[..., 0])
GIF_HEADER = 13 + (3 << ((GIF[10] & 7) + 1))
"""Bytes before the first block, with the palette."""


def segment(marker: int, body: bytes) -> bytes:
    """A segment of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def chunk(kind: bytes, body: bytes, damage: int = 0) -> bytes:
    """A chunk of a PNG, whose checksum may be wrong."""
    checksum = zlib.crc32(kind + body) ^ damage
    return struct.pack(">L", len(body)) + kind + body + struct.pack(">L", checksum)


def blocks_beside_pixels() -> Iterator[Probe]:
    """Image files with more than pixels: what browsers show is read, in bounded time."""
    film = b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x02\xff\xd8" * 5000
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2 << 20)))
    sound = {
        "motion photo": (JPEG + film, JPEG),
        "3 MB of ICC in a JPEG": (
            JPEG[:2] + segment(0xE2, b"ICC_PROFILE\0" * 5000) * 50 + JPEG[2:],
            JPEG,
        ),
        "text of 80 MB in a PNG": (_in_png(b"zTXt", zlib.compress(bytes(80 << 20))), PNG),
        "damaged text in a PNG": (_in_png(b"zTXt", b"not zlib"), PNG),
        "ICC of 2 MB in a PNG": (PNG[:33] + profile + PNG[33:], PNG),
        "wrong checksum of a text": (PNG[:33] + chunk(b"tEXt", b"k\0v", 1) + PNG[33:], PNG),
        "bytes after a PNG": (PNG + film, PNG),
    }
    for name, (content, plain) in sound.items():
        yield Probe(
            f"blocks: {name}",
            lambda _, content=content: decode(content).tolist(),
            decode(plain).tolist(),
        )
    progressive = encode("JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    hostile = {
        "segments": JPEG[:2] + segment(0xE1, b"x" * 8) * 1_750_000 + JPEG[2:],
        "more than 100,000 segments": JPEG[:2] + segment(0xED, b"Photoshop 3.0\0") * 300_000,
        "scans": progressive[:-2] + scan * 5000,
        "chunks in a PNG": PNG[:33] + chunk(b"IDAT", b"") * 500_000 + PNG[33:],
        "blocks before the first frame": GIF[:GIF_HEADER] + b"!\xfe\0" * 500_000 + GIF[GIF_HEADER:],
    }
    for words, content in hostile.items():
        yield Probe(f"blocks: {words}", lambda _, content=content: decode(content), Refusal(words))
    yield Probe("blocks: a sparse file of 2 GB", _sparse, Refusal("more than the 1,073,741,824"))


def _in_png(kind: bytes, data: bytes) -> bytes:
    return PNG[:33] + chunk(kind, b"k\0\0" + data) + PNG[33:]


def _sparse(root: Path) -> Any:
    with (root / "a.jpg").open("wb") as file:
        file.write(JPEG)
        file.truncate(2**31)
    return decode(root / "a.jpg")


def graph(factor: float = 1.0, rows: int | None = None) -> onnx.ModelProto:
    """A graph whose answer is the mean colour, times a factor, or for a fixed number of rows."""
    node, value = helper.make_node, helper.make_tensor_value_info
    nodes = [
        node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        node("ReduceMean", ["floats", "axes"], ["means"], keepdims=0),
        node("Softmax", ["means"], ["shares"], axis=-1),
        node("Mul", ["shares", "factor"], ["scaled"]),
        node("Identity", ["scaled"], ["probs"])
        if rows is None
        else node("Expand", ["scaled", "shape"], ["probs"]),
        node("Unsqueeze", ["probs", "one"], ["member_probs"]),
    ]
    constants = [
        helper.make_tensor("axes", TensorProto.INT64, [2], [1, 2]),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        helper.make_tensor("factor", TensorProto.FLOAT, [], [factor]),
        helper.make_tensor("shape", TensorProto.INT64, [2], [rows or 1, 3]),
    ]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "colours",
            [value("images", TensorProto.UINT8, ["b", "h", "w", 3])],
            [
                value("probs", TensorProto.FLOAT, ["b", 3]),
                value("member_probs", TensorProto.FLOAT, ["b", 1, 3]),
            ],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


def write_model(root: Path, model: onnx.ModelProto | None = None, **card: Any) -> Path:
    """Write a model file as an export does."""
    model = graph() if model is None else model
    onnx_files.set_card(model, {**CARD, **card})
    (root / "m.onnx").write_bytes(onnx_files.serialize(model))
    return root / "m.onnx"


def models() -> Iterator[Probe]:
    """Model files that are damaged or lie, and what predict may be given."""
    for factor, words in ((float("nan"), "a probability of nan"), (-5.0, "a probability of -")):
        yield Probe(
            f"model: answers times {factor}",
            lambda root, f=factor: Model(write_model(root, graph(f))).predict(PIXELS),
            Refusal(words),
        )
    yield Probe(
        "model: answers for five images",
        lambda root: Model(write_model(root, graph(rows=5))).predict(PIXELS),
        Refusal("answers of shape"),
    )
    yield Probe("model: flipped bits that change an answer", _flips, 0)
    cards: dict[str, Any] = {
        "name is not text": {"name": ["a"]},
        "score.accuracy is not": {"score": {"accuracy": "high"}},
        "nested more than": {"more": json.loads("[" * 100 + "]" * 100)},
        "names": {"classes": ["a", "b", "c\x1b[2J"]},
    }
    for words, card in cards.items():
        yield Probe(
            f"card: {words}",
            lambda root, card=card: Model(write_model(root, **card)),
            Refusal(words),
        )
    forms: dict[str, Any] = {
        "a Pillow image": Image.fromarray(PIXELS),
        "bytes": PNG,
        "an array": PIXELS,
        "floats": PIXELS / 255,
        "a batch": PIXELS[None],
        "an open file": io.BytesIO(PNG),
    }
    for name, form in forms.items():
        yield Probe(
            f"predict: {name}",
            lambda root, form=form: Model(write_model(root)).predict(form),
            [CARD["classes"][PIXELS.mean((0, 1)).argmax()]],
        )
    for name, form in {"None": None, "a number": 5, "normalised": PIXELS - 128.0}.items():
        yield Probe(
            f"predict: {name}",
            lambda root, form=form: Model(write_model(root)).predict(form),
            Refusal("not an image"),
        )
    yield Probe("predict: a missing file before a sound one", _predict_both, (1, ["sound.png"]))
    yield Probe("json: numbers that JSON lacks", _print_numbers, {"a": None, "b": [None, 0.5]})


def _flips(root: Path) -> int:
    """Count the flipped bits that change an answer without an error."""
    path = write_model(root)
    content = path.read_bytes()
    right = Model(path).predict_proba(PIXELS)
    changed = 0
    for position in range(0, len(content), 23):
        damaged = bytearray(content)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        try:
            changed += not np.array_equal(Model(path).predict_proba(PIXELS), right)
        except ThreefoldError:
            continue
    return changed


def _predict_both(root: Path) -> tuple[int, list[str]]:
    (root / "sound.png").write_bytes(PNG)
    stream = io.StringIO()
    sources = [str(root / "nope.png"), str(root / "sound.png")]
    failed = write_predictions(stream, lambda _: None, write_model(root), sources, 1, "json")
    names = [Path(json.loads(line)["image"]).name for line in stream.getvalue().splitlines()]
    return failed, names


def _print_numbers(_: Path) -> Any:
    stream = io.StringIO()
    with redirect_stdout(stream):
        print_json({"a": float("nan"), "b": [float("inf"), 0.5]})
    return json.loads(stream.getvalue(), parse_constant=float)


@contextmanager
def serving(path: Path, **options: Any) -> Iterator[str]:
    """Run a server on a free port of this machine; yields its URL."""
    limits = ServerLimits(**options.pop("limits", {}))
    server, listener = make_server(Model(path), "127.0.0.1", 0, limits, **options)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it notes what is not HTTP
    with in_thread(server, listener) as address:
        yield address


def status_of(address: str, request: bytes) -> int:
    """Send bytes, and return the status that comes back."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(request)
        return int(connection.recv(64).split()[1])


def requests() -> Iterator[Probe]:
    """Requests to a server."""
    head = b"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    raw = {
        "a length and chunks": (
            head + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        "a gigabyte": (head + b"content-length: 1073741824\r\n\r\n", 413),
        "two hosts": (b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
        "another host": (b"GET / HTTP/1.1\r\nhost: evil.example\r\n\r\n", 421),
        "HEAD": (b"HEAD /card HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n", 200),
        "not HTTP": (b"HELLO\r\n\r\n", 400),
    }
    for name, (request, status) in raw.items():
        yield Probe(f"serve: {name}", lambda root, r=request: _exchange(root, r), status)
    files = {
        "motion photo": (JPEG + b"\xff\xda\0\x02" * 5000, 200),
        "1.75 million segments": (JPEG[:2] + segment(0xE1, b"x" * 8) * 1_750_000, 415),
        "photo of 24 megapixels": (encode("JPEG", np.zeros((4000, 6000, 3), np.uint8)), 200),
        "text": (b"hello", 415),
    }
    part = {"filter": "triangle, antialiased", "resize": "squash", "pixels": 8}
    for name, (content, status) in files.items():
        yield Probe(
            f"serve: {name}",
            lambda root, c=content: _post(write_model(root, preprocessing=[part]), c),
            status,
        )
        yield Probe(
            f"explain: {name}",
            lambda root, c=content: _post(write_model(root, preprocessing=[part]), c, "explain"),
            status,
        )
    queries = {
        "no such class": ("class=%1b%5b31m", 400),
        "a class of a megabyte": ("class=" + "a" * (1 << 20), 400),
        "no such format": ("format=svg", 400),
        "two images": ("", 413),
    }
    for name, (query, status) in queries.items():
        yield Probe(
            f"explain: {name}",
            lambda root, q=query, n=name: _explain(root, q, 2 if n == "two images" else 1),
            status,
        )
    yield Probe("serve: a key that ends in a newline", _key, 200)
    yield Probe("serve: an aborted upload", _aborted, (True, False))
    for port in (80800, -1):
        yield Probe(
            f"serve: port {port}",
            lambda root, p=port: make_server(
                Model(write_model(root)), "127.0.0.1", p, ServerLimits()
            ),
            Refusal("cannot listen"),
        )


def _exchange(root: Path, request: bytes) -> int:
    with serving(write_model(root)) as address:
        return status_of(address, request)


def _post(path: Path, content: bytes, route: str = "predict") -> int:
    with serving(path) as address:
        return httpx.post(
            f"{address}/{route}", files={"files": ("a", content)}, timeout=120
        ).status_code


def _explain(root: Path, query: str, count: int) -> int:
    files = [("files", (f"{i}.png", PNG)) for i in range(count)]
    with serving(write_model(root)) as address:
        return httpx.post(f"{address}/explain?{query}", files=files, timeout=120).status_code


def _key(root: Path) -> int:
    with serving(write_model(root), api_key="s3cret\n") as address:
        headers = {"authorization": "Bearer s3cret"}
        return httpx.get(f"{address}/card", headers=headers).status_code


def _aborted(root: Path) -> tuple[bool, bool]:
    """Whether an upload that ends early counts as 499, and whether as 500."""
    with serving(write_model(root)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 99\r\n"
                b"content-type: application/json\r\n\r\n{"
            )
            time.sleep(0.5)
        time.sleep(0.5)
        metrics = httpx.get(f"{address}/metrics").text
    return 'status="499"' in metrics, 'status="500"' in metrics
