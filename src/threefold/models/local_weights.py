"""Weights from a local file: a state dict in one of the forms that training programs write.

The tensors are found by the names that the backbone gives them. They may lie in a table of a
checkpoint (`state_dict`, `model`, `state_dict_ema`, ...) and below a prefix (`module.` of
distributed training, `_orig_mod.` of torch.compile, `model.` of Lightning, ...).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from threefold.errors import RecipeError, shorten

DEPTH: Final = 3
"""Tables within tables that are searched for tensors."""


class _Part(NamedTuple):
    """The tensors of a file that have the backbone's names, below one prefix of one table."""

    place: str
    tensors: dict[str, Tensor]


def load_local(backbone: nn.Module, path: Path) -> None:
    """Load a local .safetensors or .pth file; only the classifier may differ.

    Averaged weights (a place whose name has `ema` in it) come before others.

    Raises:
        RecipeError: the file cannot be read, holds no tensors or those of another network, holds
            several networks of this kind, or a weight is not finite.
    """
    content = _read(path)
    target = backbone.state_dict()
    parts = [part for table in _tables(content) for part in _parts(*table, target)]
    if not parts:
        names = [name for _, tensors in _tables(content) for name in tensors]
        found = f"tensors {shorten(names, 3)}"
        if not names:
            keys = f" with {shorten(map(str, content), 5)}" if isinstance(content, Mapping) else ""
            found = f"no tensors by name, but a {type(content).__name__}{keys}"
        raise RecipeError(
            "weights do not fit the backbone",
            where=path,
            expected=f"tensors {shorten(target, 3)}",
            got=f"{len(target)} of {len(target)} tensors are missing: the file holds {found}",
            fix="give the file of weights of this backbone",
        )
    whole = [part for part in parts if not _misfits(part, target)]
    if not whole:
        _refuse(max(parts, key=lambda part: len(part.tensors)), target, path)
    averaged = [part for part in whole if "ema" in part.place.lower()]
    best = (averaged or whole)[0]
    others = [part for part in (averaged or whole)[1:] if not _equal(part, best)]
    if others:
        raise RecipeError(
            "the file holds several networks of this kind",
            where=path,
            expected="one",
            got=", ".join(part.place for part in (best, *others)),
            fix="save the state dict of one of them to a file of its own",
        )
    spoilt = [n for n in target if not torch.isfinite(best.tensors[n]).all()]
    if spoilt:
        raise RecipeError(
            "weights are not finite",
            where=path,
            expected="numbers",
            got=f"NaN or infinity in {shorten(spoilt, 3)}",
            fix="give the file of an earlier epoch",
        )
    backbone.load_state_dict({name: best.tensors[name] for name in target})


def _read(path: Path) -> Any:
    """Read the content of the file, without running any code in it."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        reason = " ".join(str(error).split())
        # torch's own words advise to unpickle the file, which may run code in it.
        is_unsafe = "weights_only" in reason or "Weights only" in reason
        raise RecipeError(
            "cannot read the weights file",
            where=path,
            got="something else than tensors"
            if is_unsafe
            else f"{type(error).__name__}: {reason[:160]}",
            fix="give a state dict saved as .safetensors or .pth (tensors only)",
        ) from None


def _tables(content: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every table in the file that holds tensors, with its place."""
    if not isinstance(content, Mapping):
        return
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if tensors:
        yield place, tensors
    if depth < DEPTH:
        for key, value in content.items():
            yield from _tables(value, f"{place}{key}/", depth + 1)


def _parts(place: str, tensors: dict[str, Tensor], target: Mapping[str, Tensor]) -> list[_Part]:
    """Return the tensors with the backbone's names, by the prefix before these names."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        words = name.split(".")
        for start in range(len(words)):
            rest = ".".join(words[start:])
            if rest in target:
                prefix = name.removesuffix(rest)
                parts.setdefault(prefix, {})[rest] = tensor
    return [_Part(f"{place}{prefix}*", found) for prefix, found in parts.items()]


def _misfits(part: _Part, target: Mapping[str, Tensor]) -> list[str]:
    """Return the backbone's tensors that are missing or have another shape."""
    return [
        name
        for name, tensor in target.items()
        if name not in part.tensors or part.tensors[name].shape != tensor.shape
    ]


def _equal(part: _Part, other: _Part) -> bool:
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in part.tensors.items())


def _refuse(part: _Part, target: Mapping[str, Tensor], path: Path) -> None:
    """Say what the best part of the file lacks.

    Raises:
        RecipeError: always.
    """
    misfits = _misfits(part, target)
    first = misfits[0]
    got = "it is missing"
    if first in part.tensors:
        got = f"shape {tuple(part.tensors[first].shape)}"
    raise RecipeError(
        "weights do not fit the backbone",
        where=path,
        expected=f"{first} of shape {tuple(target[first].shape)}",
        got=f"{got}; {len(misfits)} of {len(target)} tensors are missing or have another shape "
        f"in the file's {part.place}",
        fix="name the backbone that the weights were trained for, with its size",
    )
