"""Ensembles: the members' probabilities (m, n, k) to one answer (n, k), in scikit-learn's grammar.

`to_module()` gives the same arithmetic as a torch module for export; torch is imported only there and to train the
stacked ensemble. Fit on out-of-fold rows: on rows that members were trained on, their probabilities say nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import softmax

from threefold.errors import DataError, RecipeError, RunError
from threefold.predictions import FLOOR, check_labels, check_probs

if TYPE_CHECKING:
    from torch import Tensor, nn


class Ensemble(ABC):
    """What every ensemble can do; subclasses fill in `_fit`, `_combine` and `to_module`.

    Attributes:
        needs_fit: whether `fit` learns anything; where it does not, `predict_proba` works at once.
        seed: for methods that draw random numbers; the others ignore it.
    """

    needs_fit: ClassVar[bool] = True
    seed: int = 0
    _state: ClassVar[tuple[str, ...]] = ()

    def fit(self, probs: npt.ArrayLike, labels: npt.ArrayLike) -> Self:
        """Learn from probabilities (m, n, k) and labels (n,).

        Raises:
            DataError: probabilities or labels are not usable.
        """
        array = check_probs(probs, 3)
        self._fit(array, check_labels(labels, *array.shape[1:]))
        return self

    def predict_proba(self, probs: npt.ArrayLike) -> np.ndarray:
        """Probabilities (n, k) float64 from the members' (m, n, k).

        Raises:
            DataError: probabilities are not usable, or of other members or classes than in `fit`.
            RunError: not fitted.
        """
        self._require_fit()
        return self._combine(check_probs(probs, 3))

    def predict(self, probs: npt.ArrayLike) -> np.ndarray:
        """Class numbers (n,); ties go to the first class."""
        return np.asarray(self.predict_proba(probs).argmax(-1))

    def state(self) -> dict[str, np.ndarray]:
        """The fitted arrays, by name.

        Raises:
            RunError: not fitted.
        """
        self._require_fit()
        return {name: np.asarray(getattr(self, name)) for name in self._state}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """An ensemble that predicts as the one whose `state` this is.

        Raises:
            DataError: an array is missing.
        """
        ensemble = cls()
        for name in cls._state:
            if name not in state:
                raise DataError(
                    f"not the state of a {cls.__name__}", expected=", ".join(cls._state), got=", ".join(state)
                )
            setattr(ensemble, name, np.asarray(state[name]))
        return ensemble

    @abstractmethod
    def to_module(self) -> nn.Module:
        """The same as a torch module: (b, m, k) to (b, k)."""

    @abstractmethod
    def _combine(self, probs: np.ndarray) -> np.ndarray: ...

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:  # noqa: B027 (methods without parameters need none)
        """Learn nothing, unless a subclass does."""

    def _require_fit(self) -> None:
        if self.needs_fit and not hasattr(self, self._state[0]):
            raise RunError("the ensemble is not fitted", where=type(self).__name__, fix="call fit(probs, labels) first")


class MeanEnsemble(Ensemble):
    """Average of the members' probabilities (the paper's AVG-Softmax)."""

    needs_fit = False

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        return np.asarray(probs.mean(0, dtype=np.float64))

    def to_module(self) -> nn.Module:
        """Mean over the members' axis."""
        from torch import nn

        class Mean(nn.Module):
            def forward(self, probs: Tensor) -> Tensor:
                return probs.mean(1)

        return Mean()


class PrunedEnsemble(Ensemble):
    """Keep each member's `keep` largest values, zero the rest, average (the paper's EXT-Softmax, Algorithm 2).

    Ties keep the first class. The average is divided by its sum, which changes no answer. Keeping all classes is the
    mean.

    Raises:
        RecipeError: keep is below 1.
    """

    needs_fit = False
    _state = ("keep",)

    def __init__(self, keep: int = 1) -> None:
        if keep < 1:
            raise RecipeError(
                "a pruned ensemble keeps at least one value", where="keep", expected="1 or more", got=keep
            )
        self.keep = keep

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """An ensemble that predicts as the one whose `state` this is."""
        ensemble = super().from_state(state)
        ensemble.keep = int(ensemble.keep)
        return ensemble

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        kept = np.where(_largest(probs, self.keep), probs, 0).sum(0, dtype=np.float64)
        return np.asarray(kept / kept.sum(-1, keepdims=True))

    def to_module(self) -> nn.Module:
        """The largest values by repeated argmax, which breaks ties alike in numpy, torch and ONNX (top-k does not)."""
        return _pruning_module(self.keep, values=True)


class VoteEnsemble(Ensemble):
    """Share of the members whose first choice a class is (EXT-Softmax as the authors coded it for CIFAR and SVHN).

    Ties go to the first class, within a member and between classes.
    """

    needs_fit = False

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        return np.asarray(_largest(probs, 1).mean(0, dtype=np.float64))

    def to_module(self) -> nn.Module:
        """Mean over the members of the one-hot first choice."""
        return _pruning_module(1, values=False)


class _LinearEnsemble(Ensemble):
    """Average of the members with learned weights, `weights_` (m,), which sum to 1."""

    _state = ("weights_",)
    weights_: np.ndarray

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        _check_fitted_on(len(self.weights_), len(probs), "members")
        return np.asarray(np.tensordot(self.weights_, probs, 1))

    def to_module(self) -> nn.Module:
        """Weighted sum over the members' axis."""
        import torch

        self._require_fit()

        class Weighted(torch.nn.Module):
            weights: Tensor

            def __init__(self, weights: np.ndarray) -> None:
                super().__init__()
                self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32)[:, None])

            def forward(self, probs: Tensor) -> Tensor:
                return (probs * self.weights).sum(1)

        return Weighted(self.weights_)


class WeightedEnsemble(_LinearEnsemble):
    """Weights on the simplex that minimise log loss, shrunk toward equal weights.

    The penalty is `ridge` * |w - 1/m|^2 against the summed log loss, a Gaussian prior of standard deviation
    1 / sqrt(2 * ridge) on each weight: it decides where rows are few and vanishes where they are many.
    """

    def __init__(self, ridge: float = 10.0) -> None:
        self.ridge = ridge

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        m, n, _ = probs.shape
        hits = probs[:, np.arange(n), labels].astype(np.float64)

        def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
            mixed, away = weights @ hits + FLOOR, weights - 1 / m
            value = -np.log(mixed).sum() + self.ridge * away @ away
            slope = -(hits / mixed).sum(1) + 2 * self.ridge * away
            return value / n, slope / n

        found = minimize(
            loss,
            np.full(m, 1 / m),
            jac=True,
            method="SLSQP",
            bounds=[(0, 1)] * m,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            options={"ftol": 1e-10, "maxiter": 500},
        )
        if not found.success:
            raise RunError("the members' weights did not converge", got=found.message, fix="raise ridge")
        weights = np.clip(found.x, 0, None)
        self.weights_ = weights / weights.sum()


class GreedyEnsemble(_LinearEnsemble):
    """Members chosen one at a time, with replacement, for accuracy, then log loss (Caruana et al. 2004).

    At most `max_members` picks, three as in the paper's top-3; the best beginning of the sequence is kept.
    """

    def __init__(self, max_members: int = 3) -> None:
        if max_members < 1:
            raise RecipeError(
                "a greedy ensemble has a member", where="max_members", expected="1 or more", got=max_members
            )
        self.max_members = max_members

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        m, n, k = probs.shape
        total, picks, scores = np.zeros((n, k)), [], []
        for size in range(1, self.max_members + 1):
            trials = [_rank((total + member) / size, labels) for member in probs]
            best = max(range(m), key=lambda i: trials[i])
            total += probs[best]
            picks.append(best)
            scores.append(trials[best])
        size = max(range(len(scores)), key=lambda i: scores[i]) + 1
        self.weights_ = np.bincount(picks[:size], minlength=m) / size


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps of milliseconds gain nothing from threads, and lose much where other processes want the cores too."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class StackedEnsemble(Ensemble):
    """The paper's E2E-3M head: a small network on the members' concatenated softmaxes (section 3.3, Algorithm 1).

    m*k -> Linear(hidden) -> LeakyReLU(0.2) -> Dropout(0.5) -> Linear(k) -> softmax; 167,946 parameters for three
    members and ten classes. Trained on cached probabilities, which equals training behind frozen members. Keras'
    initialisation and Adam epsilon; a fixed number of epochs, so that no row is used to stop. Same seed, same weights.

    Args:
        hidden: width of the hidden layer.
        epochs: None = 40, or as many as make 600 steps where rows are few: fewer leave the softmax flat.
        lr: Adam's learning rate.
        batch_size: rows per step.
        seed: of the weights, the order of rows and the dropout.

    Attributes:
        hidden_weight_, hidden_bias_, output_weight_, output_bias_: float32, as in torch.nn.Linear.
    """

    _state = ("hidden_weight_", "hidden_bias_", "output_weight_", "output_bias_")
    hidden_weight_: np.ndarray
    hidden_bias_: np.ndarray
    output_weight_: np.ndarray
    output_bias_: np.ndarray

    def __init__(
        self, hidden: int = 4096, *, epochs: int | None = None, lr: float = 1e-4, batch_size: int = 200, seed: int = 0
    ) -> None:
        self.hidden, self.epochs, self.lr, self.batch_size, self.seed = hidden, epochs, lr, batch_size, seed

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        import torch

        m, n, k = probs.shape
        inputs, targets = torch.tensor(probs.swapaxes(0, 1), dtype=torch.float32), torch.tensor(labels)
        draw, steps = np.random.default_rng(self.seed), -(-n // self.batch_size)
        with _one_thread(), torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.manual_seed(self.seed)  # the CPU's only: torch.manual_seed would touch the GPU's
            network = stacked_network(m, k, self.hidden)
            optimizer = torch.optim.Adam(network.parameters(), lr=self.lr, eps=1e-7)
            epochs = max(40, -(-600 // steps)) if self.epochs is None else self.epochs
            for rows in (rows for _ in range(epochs) for rows in np.array_split(draw.permutation(n), steps)):
                optimizer.zero_grad()
                kept = torch.from_numpy(_coin_flips(draw, (len(rows), self.hidden)))
                logits = network[4](network[:3](inputs[rows]) * (2.0 * kept))
                torch.autograd.backward(torch.nn.functional.cross_entropy(logits, targets[rows]))
                optimizer.step()
        for name, parameter in zip(self._state, network.parameters(), strict=True):
            setattr(self, name, parameter.detach().numpy().copy())

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        m, n, k = probs.shape
        _check_fitted_on(self.hidden_weight_.shape[1], m * k, "members times classes")
        _check_fitted_on(self.output_weight_.shape[0], k, "classes")
        inputs = probs.swapaxes(0, 1).reshape(n, m * k).astype(np.float32)
        return np.concatenate([self._answer(inputs[i : i + 8192]) for i in range(0, n, 8192)])  # bounds the memory

    def _answer(self, inputs: np.ndarray) -> np.ndarray:
        hidden = inputs @ self.hidden_weight_.T + self.hidden_bias_
        logits = np.where(hidden > 0, hidden, 0.2 * hidden) @ self.output_weight_.T + self.output_bias_
        return np.asarray(softmax(logits.astype(np.float64), axis=-1))

    def to_module(self) -> nn.Module:
        """The trained network, dropout off."""
        import torch

        hidden, inputs = self.state()["hidden_weight_"].shape
        k = len(self.output_bias_)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            network = stacked_network(inputs // k, k, hidden)
            for name, parameter in zip(self._state, network.parameters(), strict=True):
                parameter.copy_(torch.tensor(getattr(self, name)))
        return network.eval()


def _largest(probs: np.ndarray, keep: int) -> np.ndarray:
    """True at the `keep` largest values of the last axis, the first ones on ties."""
    mask = np.zeros(probs.shape, dtype=bool)
    for _ in range(min(keep, probs.shape[-1])):
        first = np.where(mask, -1, probs).argmax(-1)
        np.put_along_axis(mask, first[..., None], True, -1)
    return mask


def _pruning_module(keep: int, values: bool) -> nn.Module:
    """(b, m, k) to (b, k): the `keep` largest values of each member, or ones in their places, averaged to sum 1."""
    import torch

    class Pruning(torch.nn.Module):
        def forward(self, probs: Tensor) -> Tensor:
            classes = torch.arange(probs.shape[-1], device=probs.device)
            mask = torch.zeros_like(probs, dtype=torch.bool)
            for _ in range(min(keep, probs.shape[-1])):
                mask = mask | (classes == torch.where(mask, -1.0, probs).argmax(-1, keepdim=True))
            kept = torch.where(mask, probs if values else 1.0, 0.0).sum(1)
            return kept / kept.sum(-1, keepdim=True)

    return Pruning()


def stacked_network(m: int, k: int, hidden: int) -> nn.Sequential:
    """Algorithm 1's network with Keras' initialisation: Glorot uniform kernels, zero biases."""
    from torch import nn

    first, last = nn.Linear(m * k, hidden), nn.Linear(hidden, k)
    for layer in (first, last):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), first, nn.LeakyReLU(0.2), nn.Dropout(0.5), last, nn.Softmax(-1))


def _coin_flips(draw: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Fair zeros and ones, uint8: dropout at rate 1/2 from random bits; torch's own takes half of a step's time."""
    count = shape[0] * shape[1]
    return np.unpackbits(np.frombuffer(draw.bytes(-(-count // 8)), np.uint8), count=count).reshape(shape)


def _rank(probs: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """What the greedy ensemble maximises: accuracy, then the log likelihood."""
    hits = probs[np.arange(len(labels)), labels]
    return float((probs.argmax(-1) == labels).mean()), float(np.log(np.maximum(hits, FLOOR)).mean())


def _check_fitted_on(fitted: int, got: int, what: str) -> None:
    if fitted != got:
        raise DataError(f"the ensemble was fitted on other {what}", expected=fitted, got=got)
