"""Checkpoints of a stage: the best weights, their acceptance, and the state to resume from.

The resume file holds the SHA-256 of the rest, then safetensors with plain values in its
metadata. A file that is damaged, or belongs to another stage, start weights, seed or version of
torch, is ignored: the stage starts over and ends at the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Generator, Tensor

from threefold.errors import RunError, is_out_of_memory, out_of_memory
from threefold.files import check_regular, write_bytes
from threefold.stats.bootstrap import row_weights
from threefold.training.distributed.fsdp import part_of, whole
from threefold.training.truth import metric_value, right_share, row_losses, weighted_metric

State = dict[str, Tensor]

SAVE_INTERVAL: Final = 60.0
"""Least seconds between two resume files: short epochs are not worth the writing."""

GATE_RESAMPLES: Final = 500
"""Bootstrap draws for the standard error of a metric's rise."""

_DIGEST: Final = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Checkpoint:
    """Weights and how they do on the select rows.

    Attributes:
        state: the network's state dict.
        probs: (n, k) the network's probabilities.
        labels: (n,) class numbers, or targets (n, k).
        epoch: number of the epoch, -1 before the first.
        metric: what checkpoints are compared by (`train.metric`).
    """

    state: State
    probs: np.ndarray
    labels: np.ndarray
    epoch: int
    metric: str = "accuracy"

    @cached_property
    def correct(self) -> np.ndarray:
        """Which rows are answered correctly: (n,) booleans, or shares of right labels."""
        return right_share(self.probs, self.labels)

    @cached_property
    def losses(self) -> np.ndarray:
        """Negative log-likelihoods (n,)."""
        if self.labels.ndim == 2:
            return row_losses(np.clip(self.probs, 1e-7, 1 - 1e-7), self.labels)
        of_labels = np.clip(self.probs[np.arange(len(self.labels)), self.labels], 1e-7, 1.0)
        return np.asarray(-np.log(of_labels).astype(np.float64))

    @property
    def accuracy(self) -> float:
        """Share of the rows, or of all their labels, answered correctly."""
        return float(self.correct.mean())

    @cached_property
    def score(self) -> float:
        """The metric on the rows; NaN if it is not defined on them."""
        if self.metric == "accuracy":
            return self.accuracy
        if self.metric == "log_loss":
            return float(self.losses.mean())
        return metric_value(self.metric, self.probs.astype(np.float64), self.labels)

    @property
    def plain_score(self) -> float | None:
        """The score as JSON has it: None where it is not defined."""
        return None if math.isnan(self.score) else self.score

    def better_than(self, other: Checkpoint) -> bool:
        """Compare the metric; a tie goes to the lower log loss (as in the authors' code).

        So does a metric that is not defined on the select rows.
        """
        mine, others = self.score, other.score
        if self.metric != "log_loss" and mine != others and not math.isnan(mine - others):
            return mine > others
        return float(self.losses.mean()) < float(other.losses.mean())


class Acceptance(NamedTuple):
    """Whether a stage's best weights replace those it started from, and why."""

    accepted: bool
    reason: str


def accept_stage(
    start: Checkpoint, best: Checkpoint, *, first: bool, enabled: bool = True
) -> Acceptance:
    """Decide whether a stage's best weights replace those it started from.

    Where the test is enabled (`train.gate`, honest protocol only), the paired fall of the log loss
    or the paired rise of the metric on the select rows must exceed its standard error. Otherwise,
    and after a first stage, the best checkpoint is always accepted.

    Args:
        start: the weights before the stage.
        best: the best of its epochs, or `start` itself.
        first: whether the stage started from a random head.
        enabled: whether improvements are tested against their noise.
    """
    if best is start:
        return Acceptance(False, "no epoch was better on the select rows")
    if first:
        return Acceptance(True, "first stage")
    if not enabled:
        return Acceptance(True, "not tested against noise")
    loss_fall, loss_error = _paired(start.losses - best.losses)
    accepted = loss_fall > loss_error
    figures = []
    if best.metric != "log_loss":
        rise, error = _metric_rise(start, best)
        accepted = accepted or rise > error
        figures.append(f"select {best.metric.replace('_', ' ')} {rise:+.4f} +- {error:.4f}")
    figures.append(f"log loss {-loss_fall:+.4f} +- {loss_error:.4f}")
    verdict = "improved by more than its noise" if accepted else "within its noise"
    return Acceptance(accepted, f"{verdict}: {', '.join(figures)}")


def _metric_rise(start: Checkpoint, best: Checkpoint) -> tuple[float, float]:
    """Paired rise of the metric and its standard error, both NaN where it is not defined.

    Accuracy is a mean over rows. The error of other metrics is that of a paired bootstrap: both
    checkpoints are scored on the same draws of the rows.
    """
    if best.metric == "accuracy":
        return _paired(best.correct.astype(float) - start.correct.astype(float))
    function, n = weighted_metric(best.metric), len(best.labels)
    differences = []
    for weights in row_weights(n, None, GATE_RESAMPLES, seed=0):
        after, before = (
            function(checkpoint.probs.astype(np.float64), checkpoint.labels, weights)
            for checkpoint in (best, start)
        )
        differences.append(after - before)
    drawn = np.concatenate(differences)
    drawn = drawn[~np.isnan(drawn)]
    error = float(drawn.std(ddof=1)) if len(drawn) > 1 else math.nan
    return best.score - start.score, error


def _paired(differences: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of paired differences."""
    n = len(differences)
    error = float(differences.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    return float(differences.mean()), error


class ResumeState(NamedTuple):
    """Tensors by name, and plain values that survive JSON unchanged."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    def section(self, name: str) -> dict[str, Tensor]:
        """The tensors whose names begin with "name/", without that prefix."""
        prefix = f"{name}/"
        return {
            key.removeprefix(prefix): value
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }


def fingerprint(inputs: object, state: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything a resumed stage depends on.

    Args:
        inputs: anything with a stable `repr`.
        state: the start weights.

    Returns:
        A hex digest, which also covers the version of torch.
    """
    digest = hashlib.sha256(repr((inputs, torch.__version__)).encode())
    for name in sorted(state):
        digest.update(name.encode())
        flat = state[name].detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_resume_state(path: Path, mark: str, state: ResumeState) -> None:
    """Write a resume file, replacing the previous one.

    Args:
        path: the file.
        mark: the stage's `fingerprint`.
        state: what to restore later.

    Raises:
        RunError: the disk is full or the folder cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
    payload = save(tensors, {"values": json.dumps({"fingerprint": mark, **state.values})})
    write_bytes(path, hashlib.sha256(payload).digest() + payload)


def load_resume_state(path: Path, mark: str) -> ResumeState | None:
    """Read a resume file; None if it is missing, damaged, or has another fingerprint.

    Raises:
        RunError: it cannot be read.
    """
    try:
        check_regular(path)
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        if is_out_of_memory(error):
            raise out_of_memory(path, error) from None
        raise RunError(
            "cannot read the state of an interrupted stage",
            where=path,
            got=error,
            fix="make it readable, or delete it: then the stage starts over",
        ) from None
    payload = data[_DIGEST:]
    if hashlib.sha256(payload).digest() != data[:_DIGEST]:
        return None
    length = int.from_bytes(payload[:8], "little")
    values = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"]["values"])
    if values.pop("fingerprint") != mark:
        return None
    return ResumeState(load(payload), values)


def optimizer_state(optimizer: torch.optim.Optimizer) -> ResumeState:
    """The optimizer's state by parameter number; `lr_at` computes learning rates anew."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for i, param in enumerate(_params(optimizer)):
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{i}/{key}"] = whole(value)
            else:
                values[f"{i}/{key}"] = value
    return ResumeState(tensors, values)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: ResumeState) -> None:
    """Restore `optimizer_state`, each tensor on its parameter's device and in its memory layout."""
    params = _params(optimizer)
    for name, value in {**state.tensors, **state.values}.items():
        number, _, key = name.partition("/")
        param = params[int(number)]
        if isinstance(value, Tensor) and value.shape == param.shape:
            value = torch.empty_like(param).copy_(part_of(value, param))
        elif isinstance(value, Tensor):
            value = value.to(param.device)
        optimizer.state[param][key] = value


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def random_state(device: torch.device, generators: Mapping[str, Generator]) -> ResumeState:
    """The state of every generator in use: torch's, Python's, numpy's, CUDA's and the stage's own.

    Args:
        device: where training runs.
        generators: the stage's own generators by name.
    """
    tensors = {name: generator.get_state() for name, generator in generators.items()}
    tensors["torch"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    _, words, *rest = np.random.get_state(legacy=True)
    values = {"python": random.getstate(), "numpy": [np.asarray(words).tolist(), *rest]}
    return ResumeState(tensors, values)


def restore_random(
    device: torch.device, generators: Mapping[str, Generator], state: ResumeState
) -> None:
    """Restore `random_state`."""
    for name, generator in generators.items():
        generator.set_state(state.tensors[name])
    torch.set_rng_state(state.tensors["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state.tensors["cuda"], device)
    version, words, gauss = state.values["python"]
    random.setstate((version, tuple(words), gauss))
    keys, *rest = state.values["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), *rest))
