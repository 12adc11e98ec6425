"""Probes of `hostile.py` for files of weights, and for the hub that has pretrained ones."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hostile_probe import Probe, Refusal
from huggingface_hub import constants
from safetensors.torch import save, save_file
from support.http_server import running
from torch import Tensor

from threefold.models.local_weights import load_local
from threefold.models.member import create_backbone
from threefold.recipe.schema import MemberSpec

NAME = "test_resnet.r160_in1k"
SPEC = MemberSpec(name="m", backbone=NAME, img_size=32)
COMMIT = "0" * 40

State = dict[str, Tensor]


@functools.cache
def state() -> State:
    """Weights of a network with a classifier."""
    torch.manual_seed(5)
    return dict(timm.create_model("test_resnet", num_classes=1000).state_dict())


def _below(prefix: str, tensors: State) -> State:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _other(tensors: State) -> State:
    return {name: tensor + 1 for name, tensor in tensors.items()}


def _spoilt(value: float) -> State:
    weight = state()["conv1.0.weight"].clone()
    weight[0, 0, 0, 0] = value
    return state() | {"conv1.0.weight": weight}


def weights() -> Iterator[Probe]:
    """Files of weights in the forms of other programs, and files that hold something else."""
    forms: dict[str, Callable[[], Any]] = {
        "plain": state,
        "module.": lambda: _below("module.", state()),
        "_orig_mod.": lambda: _below("_orig_mod.", state()),
        "Lightning": lambda: {"state_dict": _below("model.", state()), "epoch": 3},
        "model": lambda: {"model": state(), "optimizer": {"step": torch.ones(1)}},
        "EMA beside others": lambda: {"state_dict": _other(state()), "state_dict_ema": state()},
    }
    for name, make in forms.items():
        yield Probe(f"weights: {name}", lambda root, make=make: _loads(_saved(root, make())), True)
    yield Probe("weights: safetensors", _loads_safetensors, True)
    refused: dict[str, tuple[Callable[[], Any], str]] = {
        "a list": (lambda: list(state().values()), "no tensors by name, but a list"),
        "NaN": (lambda: _spoilt(float("nan")), "weights are not finite"),
        "infinity": (lambda: _spoilt(float("inf")), "weights are not finite"),
        "another network": (lambda: {"a.b": torch.ones(2)}, "do not fit the backbone"),
        "two networks": (
            lambda: _below("a.", state()) | _below("b.", _other(state())),
            "several networks",
        ),
    }
    for name, (make, words) in refused.items():
        yield Probe(
            f"weights: {name}",
            lambda root, make=make: _loads(_saved(root, make())),
            Refusal(words),
        )
    for suffix in (".pth", ".safetensors"):
        cannot = Refusal("cannot read the weights file|do not fit the backbone")
        for name, write in FILES.items():
            yield Probe(
                f"weights: {name} named {suffix}",
                lambda root, w=write, s=suffix: _loads(w(root / f"w{s}")),
                cannot,
            )
    yield Probe("weights: a pickle that runs code", _runs_code, Refusal("cannot read the weights"))


def _saved(root: Path, content: Any) -> Path:
    torch.save(content, root / "w.pth")
    return root / "w.pth"


def _loads(path: Path) -> bool:
    """Whether a file's weights are those of `state`."""
    backbone = timm.create_model("test_resnet", num_classes=0)
    load_local(backbone, path)
    return _are_right(backbone)


def _are_right(backbone: Any) -> bool:
    loaded = backbone.state_dict()
    return all(torch.equal(tensor, state()[name]) for name, tensor in loaded.items())


def _loads_safetensors(root: Path) -> bool:
    save_file(state(), root / "w.safetensors")
    return _loads(root / "w.safetensors")


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _sparse(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(50 << 30)
    return path


def _sparse_tensor(path: Path) -> Path:
    """A file of 50 GB of which a sound header says that it is one tensor."""
    size = 50 << 30
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"conv1.0.weight": tensor}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return path


def _text(path: Path) -> Path:
    path.write_text("<!doctype html><p>404")
    return path


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


FILES: dict[str, Callable[[Path], Path]] = {
    "a pipe": _pipe,
    "a sparse file of 50 GB": _sparse,
    "a tensor of 50 GB": _sparse_tensor,
    "an HTML page": _text,
    "a folder": _folder,
    "nothing": lambda path: path,
}


class _Code:
    """Pickled, it is a call of os.mkdir."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)


def _runs_code(root: Path) -> None:
    (root / "w.pth").write_bytes(pickle.dumps(_Code(root / "hacked"), protocol=2))
    try:
        _loads(root / "w.pth")
    finally:
        assert not (root / "hacked").exists(), "the code was run"


def hub() -> Iterator[Probe]:
    """Hubs that are away, that are none, and whose files are hostile."""
    yield Probe("hub: away", lambda _: _from_hub({}, away=True), Refusal("no model hub: Connect"))
    yield Probe("hub: silent", _silent, Refusal("no model hub"))
    for status in (200, 403, 407, 500):
        yield Probe(
            f"hub: a proxy that answers {status}",
            lambda _, status=status: _from_hub({}, status=status),
            Refusal("no model hub"),
        )
    sound = save(state())
    card = {"architecture": "resnet50", "num_classes": 7, "pretrained_cfg": {"url": "file:///x"}}
    yield Probe("hub: weights", lambda _: _from_hub({"model.safetensors": sound}), True)
    yield Probe(
        "hub: weights beside a hostile config.json",
        lambda _: _from_hub({"model.safetensors": sound, "config.json": json.dumps(card).encode()}),
        True,
    )
    refused = Refusal("cannot get pretrained weights: member m.*; got (?!no model hub)")
    bodies = {
        "no weights": {"README.md": b"---\nlicense: [\n"},
        "weights cut short": {"model.safetensors": sound[:-1000]},
        "an HTML page as weights": {"model.safetensors": b"<!doctype html><p>404"},
        "weights of another network": {"model.safetensors": save({"a.b": torch.ones(2)})},
        "NaN among the weights": {"model.safetensors": save(_spoilt(float("nan")))},
    }
    for name, files in bodies.items():
        yield Probe(f"hub: {name}", lambda _, files=files: _from_hub(files), refused)
    yield Probe(
        "hub: a body shorter than it says",
        lambda _: _from_hub({"model.safetensors": sound}, missing=1000),
        refused,
    )
    yield Probe("hub: a pickle that runs code", _hub_runs_code, refused)
    yield Probe(
        "hub: a stranger's repository",
        lambda _: create_backbone(SPEC.model_copy(update={"backbone": "hf-hub:evil/net"})),
        Refusal("unknown backbone: member m; got hf-hub:evil/net"),
    )


def _hub_runs_code(root: Path) -> None:
    try:
        _from_hub({"pytorch_model.bin": pickle.dumps(_Code(root / "hacked"), protocol=2)})
    finally:
        assert not (root / "hacked").exists(), "the code was run"


def _silent(_: Path) -> None:
    began = time.monotonic()
    try:
        _from_hub({}, wait=60.0)
    finally:
        assert time.monotonic() - began < 20, "it took too long"


def _from_hub(files: dict[str, bytes], away: bool = False, **how: Any) -> bool:
    """Create a backbone with the weights of a hub that has some files; whether they are right."""
    with tempfile.TemporaryDirectory() as cache, _serving(files, **how) as address:
        endpoint = "http://127.0.0.1:9" if away else address
        settings = {
            "ENDPOINT": endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": cache,
            "HF_HUB_OFFLINE": False,
        }
        with ExitStack() as stack:
            for name, value in settings.items():
                stack.enter_context(patch.object(constants, name, value))
            return _are_right(create_backbone(SPEC))


@contextmanager
def _serving(
    files: dict[str, bytes], status: int = 0, wait: float = 0.0, missing: int = 0
) -> Iterator[str]:
    """Serve files as the hub does.

    Args:
        files: the repository's content by name.
        status: answer everything with this status and without the hub's headers.
        wait: seconds before an answer.
        missing: bytes that each body is shorter than its length says.
    """
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            body = self._answer()
            self.wfile.write(body[: len(body) - missing])

        def _answer(self) -> bytes:
            stop.wait(wait)
            body = files.get(self.path.rpartition("/")[2])
            self.send_response(status or (404 if body is None else 200))
            if not status:
                self.send_header("X-Repo-Commit", COMMIT)
                if body is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                else:
                    self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            return body or b""

        def log_message(self, *_: object) -> None: ...

    with running(Handler) as address:
        try:
            yield address
        finally:
            stop.set()  # answers that still wait would keep the server
