"""A stage between two epochs, on disk: what it needs to go on to the same bits after it was killed.

One file: the SHA-256 of the rest, then safetensors with the plain values among its metadata. A file that is damaged, or of
another stage, other start weights, another seed or torch, is as none: the stage begins anew, and gives the same bits later.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Generator, Tensor

from threefold.files import write_bytes

EVERY: Final = 60.0
"""Seconds between two of these files: an epoch of seconds is not worth writing optimizer and weights for."""

_DIGEST: Final = hashlib.sha256().digest_size


class Midway(NamedTuple):
    """Tensors by name, and plain values that JSON gives back as they were."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors below a name, "name/rest" as "rest"."""
        start = f"{name}/"
        return {
            key.removeprefix(start): value
            for key, value in self.tensors.items()
            if key.startswith(start)
        }


def mark_of(words: object, state: Mapping[str, Tensor]) -> str:
    """What a file must be of to be gone on with: anything with a `repr`, this version of torch, and start weights."""
    digest = hashlib.sha256(repr((words, torch.__version__)).encode())
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(
            state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def save_midway(path: Path, mark: str, state: Midway) -> None:
    """Write a file in place of the one before.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    payload = save(tensors, {"values": json.dumps({"mark": mark, **state.values})})
    write_bytes(path, hashlib.sha256(payload).digest() + payload)


def load_midway(path: Path, mark: str) -> Midway | None:
    """What `save_midway` wrote under that mark; None where there is no such file, or it is damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    payload = data[_DIGEST:]
    if hashlib.sha256(payload).digest() != data[:_DIGEST]:
        return None
    length = int.from_bytes(payload[:8], "little")
    values = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"]["values"])
    return Midway(load(payload), values) if values.pop("mark") == mark else None


def optimizer_state(optimizer: torch.optim.Optimizer) -> Midway:
    """What an optimizer remembers of each parameter, by the parameter's number; rates are not state (`optim.lr_at`)."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for i, param in enumerate(_params(optimizer)):
        for key, value in optimizer.state.get(param, {}).items():
            (tensors if isinstance(value, Tensor) else values)[f"{i}/{key}"] = value
    return Midway(tensors, values)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_state` told, each tensor in its parameter's place and memory layout."""
    params = _params(optimizer)
    for name, value in {**tensors, **values}.items():
        number, _, key = name.partition("/")
        param = params[int(number)]
        if isinstance(value, Tensor):
            value = (
                torch.empty_like(param).copy_(value)
                if value.shape == param.shape
                else value.to(param.device)
            )
        optimizer.state[param][key] = value


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def random_state(device: torch.device, own: Mapping[str, Generator]) -> Midway:
    """Every generator that training draws from: torch's, Python's, numpy's, the accelerator's, and those of its own."""
    tensors = {name: generator.get_state() for name, generator in own.items()} | {
        "torch": torch.get_rng_state()
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    _, words, *rest = np.random.get_state(legacy=True)
    return Midway(
        tensors, {"python": random.getstate(), "numpy": [np.asarray(words).tolist(), *rest]}
    )


def restore_random(
    device: torch.device,
    own: Mapping[str, Generator],
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Any],
) -> None:
    """Put back what `random_state` told."""
    for name, generator in own.items():
        generator.set_state(tensors[name])
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    keys, *rest = values["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), *rest))
