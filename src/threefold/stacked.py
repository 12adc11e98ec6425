"""The paper's trained combiner, E2E-3M: a small network on the members' concatenated softmaxes; and the same, shrunk.

Trained and answered in numpy, which needs no start of torch (six seconds of a command that takes ten); torch is imported
only to export.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
from scipy.special import softmax
from threadpoolctl import threadpool_limits

from threefold.combiners import Ensemble, check_fitted_on
from threefold.crossfit import stratified_parts
from threefold.ensembles__averaging import MeanEnsemble
from threefold.predictions__checks import FLOOR

if TYPE_CHECKING:
    from torch import Tensor, nn

MANY: Final = 16
"""Members beyond which the fit is short where rows are many: the paper has three, and the full fit takes minutes there."""

ROWS: Final = 8_000
"""Rows from which on the fit may be short; with fewer its steps are many passes over them, and it overfits."""

RANK: Final = 64
"""Directions of the inputs that the short fit looks at."""

STEPS: Final = 200
"""Steps of the short fit."""

SHARES: Final = tuple(i / 10 for i in range(11))
"""Shares of the network that the shrunk stacked ensemble chooses from."""


class StackedEnsemble(Ensemble):
    """The paper's E2E-3M head: a small network on the members' concatenated softmaxes (section 3.3, Algorithm 1).

    m*k -> Linear(hidden) -> LeakyReLU(0.2) -> Dropout(0.5) -> Linear(k) -> softmax; 167,946 parameters for three
    members and ten classes. Trained on cached probabilities, which equals training behind frozen members. Keras'
    initialisation and Adam epsilon; a fixed number of epochs, so that no row is used to stop. Same seed, same weights.

    With more than MANY members, ROWS rows or more and no epochs given the fit is short: the hidden layer sees the RANK leading directions of
    the inputs, which gradient descent stays close to anyway, for STEPS steps at 20 times the learning rate, falling to
    nothing. The fitted network is of the same form. With 55 members of 26,000 rows that takes seconds in
    place of minutes and was no worse; with 1,000 rows it overfits (docs/LOG.md).

    Args:
        hidden: width of the hidden layer.
        epochs: None = 40, or as many as make 600 steps where rows are few: fewer leave the softmax flat. Or the short fit.
        lr: Adam's learning rate.
        batch_size: rows per step.
        seed: of the weights, the order of rows and the dropout.

    Attributes:
        hidden_weight_, hidden_bias_, output_weight_, output_bias_: float32, as in torch.nn.Linear.
    """

    _thin: tuple[np.ndarray, np.ndarray] | None = None
    _state: ClassVar[tuple[str, ...]] = (
        "hidden_weight_",
        "hidden_bias_",
        "output_weight_",
        "output_bias_",
    )
    hidden_weight_: np.ndarray
    hidden_bias_: np.ndarray
    output_weight_: np.ndarray
    output_bias_: np.ndarray

    def __init__(
        self,
        hidden: int = 4096,
        *,
        epochs: int | None = None,
        lr: float = 1e-4,
        batch_size: int = 200,
        seed: int = 0,
    ) -> None:
        self.hidden, self.epochs, self.lr, self.batch_size, self.seed = (
            hidden,
            epochs,
            lr,
            batch_size,
            seed,
        )

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        m, n, k = probs.shape
        inputs = np.ascontiguousarray(probs.swapaxes(0, 1), np.float32).reshape(n, m * k)
        short = self.epochs is None and m > MANY and m * k > RANK and n >= ROWS
        directions = _leading(inputs) if short else None
        weights = self._trained(
            inputs if directions is None else inputs @ directions, labels, k, directions
        )
        for name, value in zip(StackedEnsemble._state, weights, strict=True):
            setattr(self, name, value)
        self._thin = None
        if directions is not None:
            self._thin = directions, self.hidden_weight_
            self.hidden_weight_ = self.hidden_weight_ @ directions.T

    def _trained(
        self, inputs: np.ndarray, labels: np.ndarray, k: int, directions: np.ndarray | None
    ) -> list[np.ndarray]:
        """Weights and biases of a network on inputs (n, m k), or on their parts (n, RANK) along `directions`."""
        draw, n, short = np.random.default_rng(self.seed), len(labels), directions is not None
        width = inputs.shape[1] if directions is None else len(directions)
        hidden, output = _glorot(draw, self.hidden, width), _glorot(draw, k, self.hidden)
        if directions is not None:
            hidden = hidden @ directions  # the weights that it has along them
        network = [hidden, np.zeros(self.hidden, np.float32), output, np.zeros(k, np.float32)]
        adam = _Adam(network)
        with threadpool_limits(
            1, "blas"
        ):  # steps of milliseconds gain little from threads, and round as they are split
            for step, picked in enumerate(self._batches(draw, n, short)):
                kept = _coin_flips(draw, (len(picked), self.hidden))
                rate = 20 * self.lr * (1 - step / STEPS) if short else self.lr
                adam.step(_gradients(network, inputs[picked], labels[picked], kept), rate)
        return network

    def _batches(self, draw: np.random.Generator, n: int, short: bool) -> Iterator[np.ndarray]:
        """Row numbers of every step: whole epochs, or STEPS steps."""
        steps = -(-n // self.batch_size)
        least = -(-(STEPS if short else 600) // steps)
        epochs = self.epochs if self.epochs is not None else least if short else max(40, least)
        batches = (
            rows for _ in range(epochs) for rows in np.array_split(draw.permutation(n), steps)
        )
        yield from islice(batches, STEPS if short else None)

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        m, n, k = probs.shape
        check_fitted_on(self.hidden_weight_.shape[1], m * k, "members times classes")
        check_fitted_on(self.output_weight_.shape[0], k, "classes")
        inputs = probs.swapaxes(0, 1).reshape(n, m * k).astype(np.float32)
        return np.concatenate(
            [self._answer(inputs[i : i + 256]) for i in range(0, n, 256)]
        )  # what the cache holds

    def _answer(self, inputs: np.ndarray) -> np.ndarray:
        if self._thin is not None:  # the same product with far fewer multiplications
            hidden = (inputs @ self._thin[0]) @ self._thin[1].T + self.hidden_bias_
        else:
            hidden = inputs @ self.hidden_weight_.T + self.hidden_bias_
        np.maximum(hidden, 0.2 * hidden, out=hidden)  # LeakyReLU
        logits = hidden @ self.output_weight_.T + self.output_bias_
        return np.asarray(softmax(logits.astype(np.float64), axis=-1))

    def to_module(self) -> nn.Module:
        """The trained network, dropout off."""
        import torch

        hidden, inputs = self.state()["hidden_weight_"].shape
        k = len(self.output_bias_)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            network = stacked_network(inputs // k, k, hidden)
            for name, parameter in zip(StackedEnsemble._state, network.parameters(), strict=True):
                parameter.copy_(torch.tensor(getattr(self, name)))
        return network.eval()


class ShrunkStackedEnsemble(StackedEnsemble):
    """The stacked network mixed with the mean: share * stacked + (1 - share) * mean.

    The share is chosen on the rows of the fit, cross-fitted in `parts` parts: the smallest of 0, 0.1, ... 1 within one
    standard error of the least log loss (Breiman's rule), so that a network that cannot be told from the mean is left
    out. Costs `parts` fits of the network more; from ROWS rows on none: the network then never sees a sixth of them, on
    which the share is chosen. All arguments are those of StackedEnsemble.

    Attributes:
        share_: () the share of the network.
    """

    _state = (*StackedEnsemble._state, "share_")
    share_: np.ndarray
    parts: int = 3

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        many = len(labels) >= ROWS
        part, asked = (
            stratified_parts(labels, parts=6 if many else self.parts),
            np.zeros(len(labels), bool),
        )
        mean = MeanEnsemble().predict_proba(probs)
        stacked = mean.copy()
        for value in np.unique(part)[: 1 if many else None] if part.any() else ():
            held = part == value
            super()._fit(probs[:, ~held], labels[~held])
            stacked[held] = super()._combine(probs[:, held])
            asked |= held
        self.share_ = _share(stacked, mean, labels, asked if asked.any() else ~asked)
        if not many:
            super()._fit(probs, labels)

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        return np.asarray(
            self.share_ * super()._combine(probs)
            + (1 - self.share_) * MeanEnsemble()._combine(probs)
        )

    def to_module(self) -> nn.Module:
        """The trained network and the mean, mixed."""
        import torch

        class Mixed(torch.nn.Module):
            def __init__(self, network: nn.Module, share: float) -> None:
                super().__init__()
                self.network, self.share = network, share

            def forward(self, probs: Tensor) -> Tensor:
                mixed: Tensor = self.share * self.network(probs) + (1 - self.share) * probs.mean(1)
                return mixed

        return Mixed(super().to_module(), float(self.state()["share_"])).eval()


def _share(
    stacked: np.ndarray, mean: np.ndarray, labels: np.ndarray, asked: np.ndarray
) -> np.ndarray:
    """The share () of the network, chosen on the rows `asked`, which it has not seen."""
    rows = np.flatnonzero(asked)
    hits = [table[rows, labels[rows]] for table in (stacked, mean)]
    losses = np.array([-np.log(np.maximum(s * hits[0] + (1 - s) * hits[1], FLOOR)) for s in SHARES])
    away = losses - losses[losses.mean(1).argmin()]
    within = away.mean(1) <= away.std(1) / len(rows) ** 0.5
    return np.asarray(SHARES[int(within.argmax())])


def stacked_network(m: int, k: int, hidden: int) -> nn.Sequential:
    """Algorithm 1's network with Keras' initialisation: Glorot uniform kernels, zero biases."""
    from torch import nn

    first, last = nn.Linear(m * k, hidden), nn.Linear(hidden, k)
    for layer in (first, last):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(
        nn.Flatten(), first, nn.LeakyReLU(0.2), nn.Dropout(0.5), last, nn.Softmax(-1)
    )


def _leading(inputs: np.ndarray) -> np.ndarray:
    """The RANK directions (d, RANK) float32 in which inputs (n, d) are largest."""
    moments = (inputs.T @ inputs).astype(np.float64)
    return np.linalg.eigh(moments)[1][:, : -RANK - 1 : -1].astype(np.float32)


def _glorot(draw: np.random.Generator, out: int, width: int) -> np.ndarray:
    """Keras' initial kernel (out, width) float32: uniform, as wide as both sides allow (Glorot and Bengio 2010, eq. 16)."""
    bound = (6 / (out + width)) ** 0.5
    return draw.uniform(-bound, bound, (out, width)).astype(np.float32)


def _gradients(
    network: list[np.ndarray], inputs: np.ndarray, labels: np.ndarray, kept: np.ndarray
) -> list[np.ndarray]:
    """Gradients of the mean cross-entropy of one step with respect to weights and biases.

    Args:
        network: hidden weight (h, d) and bias, output weight (k, h) and bias.
        inputs: (b, d).
        labels: (b,).
        kept: (b, h) zeros and ones: which hidden units the dropout keeps.
    """
    weight, bias, output, shift = network
    hidden = inputs @ weight.T
    hidden += bias
    # LeakyReLU and dropout are one factor, 0, 0.4 or 2, forward and back; made of integers, since np.where takes five times as long.
    factor = np.multiply(
        ((hidden > 0).view(np.uint8) * 4 + 1) * kept, np.float32(0.4), dtype=np.float32
    )
    hidden *= factor
    logits = hidden @ output.T
    logits += shift
    wrong = softmax(logits, axis=1)
    wrong[np.arange(len(labels)), labels] -= 1
    wrong /= len(labels)
    back = wrong @ output
    back *= factor
    return [back.T @ inputs, back.sum(0), wrong.T @ hidden, wrong.sum(0)]


class _Adam:
    """Adam (Kingma and Ba 2015, Algorithm 1) with Keras' epsilon; changes the parameters in place."""

    def __init__(self, parameters: list[np.ndarray]) -> None:
        self.parameters, self.steps = parameters, 0
        self.moments = [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]

    def step(self, gradients: list[np.ndarray], lr: float) -> None:
        self.steps += 1
        first, second = 1 - 0.9**self.steps, (1 - 0.999**self.steps) ** 0.5
        for parameter, gradient, (mean, square) in zip(
            self.parameters, gradients, self.moments, strict=True
        ):
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient * gradient - square)
            scale = np.sqrt(square)
            scale /= second
            scale += 1e-7
            parameter -= (lr / first) * mean / scale


def _coin_flips(draw: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Fair zeros and ones, uint8: dropout at rate 1/2 from random bits; torch's own takes half of a step's time."""
    count = shape[0] * shape[1]
    return np.unpackbits(np.frombuffer(draw.bytes(-(-count // 8)), np.uint8), count=count).reshape(
        shape
    )
