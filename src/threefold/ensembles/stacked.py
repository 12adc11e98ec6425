"""The paper's trained combiner, E2E-3M: a small network on the members' concatenated softmaxes.

It is trained and evaluated in numpy, because importing torch alone takes six seconds of a command
that takes ten. torch is imported only for export.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
from scipy.special import softmax
from threadpoolctl import threadpool_limits

from threefold.ensembles.averaging import MeanEnsemble
from threefold.ensembles.base import Ensemble, check_fitted_on, combine_by_block
from threefold.ensembles.cross_fit import stratified_parts
from threefold.predictions.checks import FLOOR
from threefold.scratch import row_blocks, scratch, take_rows
from threefold.stats.one_standard_error import simplest

if TYPE_CHECKING:
    from torch import Tensor, nn

MANY: Final = 16
"""Members above which the fit is short if there are many rows.

The paper has three members; with many, the full fit takes minutes.
"""

ROWS: Final = 8_000
"""Rows from which the fit may be short; with fewer its steps are many epochs, and it overfits."""

RANK: Final = 64
"""Number of leading input directions that the short fit uses."""

STEPS: Final = 200
"""Number of steps of the short fit."""

SHARES: Final = tuple(i / 10 for i in range(11))
"""Shares of the network that the shrunk stacked ensemble chooses from."""


class StackedEnsemble(Ensemble):
    """The paper's E2E-3M head: a small network on the members' concatenated softmaxes.

    m*k -> Linear(hidden) -> LeakyReLU(0.2) -> Dropout(0.5) -> Linear(k) -> softmax (section 3.3,
    Algorithm 1); 167,946 parameters for three members and ten classes. It is trained on cached
    probabilities, which equals training behind frozen members. Initialization and Adam's epsilon
    are those of Keras. The number of epochs is fixed, so that no row is used to stop. The same seed
    gives the same weights.

    With more than MANY members, ROWS rows or more and no `epochs`, the fit is short: the hidden
    layer is fitted on the RANK leading directions of the inputs, which gradient descent stays close
    to anyway, for STEPS steps at 20 times the learning rate with a linear decay to zero. The
    network has the same form. With 55 members and 26,000 rows this takes seconds instead of minutes
    and was no worse; with 1,000 rows it overfits (docs/LOG.md).

    Args:
        hidden: width of the hidden layer.
        epochs: None = 40, or enough for 600 steps if there are few rows (fewer leave the softmax
            flat), or the short fit.
        lr: Adam's learning rate.
        batch_size: rows per step.
        seed: seed of the weights, the order of rows and the dropout.

    Attributes:
        hidden_weight_, hidden_bias_, output_weight_, output_bias_: float32, as in torch.nn.Linear.
    """

    _low_rank: tuple[np.ndarray, np.ndarray] | None = None
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
        self.hidden = hidden
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.seed = seed

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        m, n, k = probs.shape
        inputs = scratch((n, m * k), np.float32)
        for rows in row_blocks(n, m * k):
            inputs[rows] = probs[:, rows].swapaxes(0, 1).reshape(-1, m * k)
        short = self.epochs is None and m > MANY and m * k > RANK and n >= ROWS
        directions = _leading_directions(inputs) if short else None
        weights = self._train(
            inputs if directions is None else inputs @ directions, labels, k, directions
        )
        for name, value in zip(StackedEnsemble._state, weights, strict=True):
            setattr(self, name, value)
        self._low_rank = None
        if directions is not None:
            self._low_rank = directions, self.hidden_weight_
            self.hidden_weight_ = self.hidden_weight_ @ directions.T

    def _train(
        self, inputs: np.ndarray, labels: np.ndarray, k: int, directions: np.ndarray | None
    ) -> list[np.ndarray]:
        """Train a network and return its weights and biases.

        Args:
            inputs: (n, m k), or (n, RANK) if projected on `directions`.
            labels: (n,).
            k: number of classes.
            directions: (m k, RANK) for the short fit, else None.
        """
        rng, n, short = np.random.default_rng(self.seed), len(labels), directions is not None
        width = inputs.shape[1] if directions is None else len(directions)
        hidden = glorot_uniform(rng, self.hidden, width)
        output = glorot_uniform(rng, k, self.hidden)
        if directions is not None:
            hidden = hidden @ directions
        network = [hidden, np.zeros(self.hidden, np.float32), output, np.zeros(k, np.float32)]
        adam = _Adam(network)
        # Steps take milliseconds: threads gain little, and make the rounding depend on the cores.
        with threadpool_limits(1, "blas"):
            for step, rows in enumerate(self.batches(rng, n, short)):
                mask = dropout_mask(rng, (len(rows), self.hidden))
                lr = 20 * self.lr * (1 - step / STEPS) if short else self.lr
                adam.step(gradients(network, inputs[rows], labels[rows], mask), lr)
        return network

    def batches(self, rng: np.random.Generator, n: int, short: bool) -> Iterator[np.ndarray]:
        """Yield the row numbers of every step: whole epochs, or STEPS steps if `short`."""
        steps_per_epoch = -(-n // self.batch_size)
        epochs = -(-(STEPS if short else 600) // steps_per_epoch)
        if self.epochs is not None:
            epochs = self.epochs
        elif not short:
            epochs = max(40, epochs)
        batches = (
            rows
            for _ in range(epochs)
            for rows in np.array_split(rng.permutation(n), steps_per_epoch)
        )
        yield from islice(batches, STEPS if short else None)

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        m, n, k = probs.shape
        check_fitted_on(self.hidden_weight_.shape[1], m * k, "members times classes")
        check_fitted_on(self.output_weight_.shape[0], k, "classes")
        inputs = probs.swapaxes(0, 1).reshape(n, m * k).astype(np.float32)
        # Blocks of 256 rows fit the cache.
        return np.concatenate([self._answer(inputs[i : i + 256]) for i in range(0, n, 256)])

    def _answer(self, inputs: np.ndarray) -> np.ndarray:
        if self._low_rank is not None:
            directions, weight = self._low_rank
            hidden = (inputs @ directions) @ weight.T + self.hidden_bias_
        else:
            hidden = inputs @ self.hidden_weight_.T + self.hidden_bias_
        np.maximum(hidden, 0.2 * hidden, out=hidden)  # LeakyReLU
        logits = hidden @ self.output_weight_.T + self.output_bias_
        return np.asarray(softmax(logits.astype(np.float64), axis=-1))

    def to_module(self) -> nn.Module:
        """Return the trained network as a torch module in evaluation mode."""
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

    The share is chosen by cross-fitting in `parts` parts: the smallest of 0, 0.1, ... 1 within one
    standard error of the least log loss, so that a network that is not distinguishable from the
    mean is left out. That takes `parts` more fits of the network. From ROWS rows on it takes none:
    the network is fitted on five sixths of the rows, and the share is chosen on the others. All
    arguments are those of StackedEnsemble.

    Attributes:
        share_: () the share of the network.
    """

    _state = (*StackedEnsemble._state, "share_")
    share_: np.ndarray
    parts: int = 3

    def _fit(self, probs: np.ndarray, labels: np.ndarray) -> None:
        many = len(labels) >= ROWS
        part = stratified_parts(labels, parts=6 if many else self.parts)
        # Of the answers only the right classes' probabilities count here.
        mean = probs[:, np.arange(len(labels)), labels].mean(0, dtype=np.float64)
        stacked, answered = mean.copy(), np.zeros(len(labels), bool)
        values = np.unique(part) if part.any() else np.array([], int)
        for value in values[:1] if many else values:
            inside = part == value
            super()._fit(take_rows(probs, ~inside), labels[~inside])
            answers = combine_by_block(super()._combine, take_rows(probs, inside))
            stacked[inside] = answers[np.arange(len(answers)), labels[inside]]
            answered |= inside
        rows = np.flatnonzero(answered if answered.any() else ~answered)
        self.share_ = _choose_share(stacked[rows], mean[rows])
        if not many:
            super()._fit(probs, labels)

    def _combine(self, probs: np.ndarray) -> np.ndarray:
        return np.asarray(
            self.share_ * super()._combine(probs)
            + (1 - self.share_) * MeanEnsemble()._combine(probs)
        )

    def to_module(self) -> nn.Module:
        """Return the mix of the trained network and the mean as a torch module."""
        import torch

        class Mixed(torch.nn.Module):
            def __init__(self, network: nn.Module, share: float) -> None:
                super().__init__()
                self.network, self.share = network, share

            def forward(self, probs: Tensor) -> Tensor:
                mixed: Tensor = self.share * self.network(probs) + (1 - self.share) * probs.mean(1)
                return mixed

        return Mixed(super().to_module(), float(self.state()["share_"])).eval()


def _choose_share(stacked: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Choose the share () of the network by the right classes' probabilities (n,) of both.

    The network has not seen these rows.
    """
    log_likelihoods = [
        np.log(np.maximum(share * stacked + (1 - share) * mean, FLOOR)) for share in SHARES
    ]
    return np.asarray(SHARES[simplest(log_likelihoods).chosen])


def stacked_network(m: int, k: int, hidden: int) -> nn.Sequential:
    """Return Algorithm 1's network with Keras' initialization: Glorot kernels, zero biases."""
    from torch import nn

    first, last = nn.Linear(m * k, hidden), nn.Linear(hidden, k)
    for layer in (first, last):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(
        nn.Flatten(), first, nn.LeakyReLU(0.2), nn.Dropout(0.5), last, nn.Softmax(-1)
    )


def _leading_directions(inputs: np.ndarray) -> np.ndarray:
    """Return the RANK leading eigenvectors (d, RANK) float32 of the second moments of (n, d)."""
    moments = (inputs.T @ inputs).astype(np.float64)
    return np.linalg.eigh(moments)[1][:, : -RANK - 1 : -1].astype(np.float32)


def glorot_uniform(rng: np.random.Generator, out: int, width: int) -> np.ndarray:
    """Draw Keras' initial kernel (out, width) float32 (Glorot and Bengio 2010, eq. 16)."""
    bound = (6 / (out + width)) ** 0.5
    return rng.uniform(-bound, bound, (out, width)).astype(np.float32)


def gradients(
    network: list[np.ndarray], inputs: np.ndarray, labels: np.ndarray, mask: np.ndarray
) -> list[np.ndarray]:
    """Return the gradients of a step's mean cross-entropy by weights and biases.

    Args:
        network: hidden weight (h, d) and bias, output weight (k, h) and bias.
        inputs: (b, d).
        labels: (b,).
        mask: (b, h) zeros and ones: the hidden units that dropout keeps.
    """
    weight, bias, output, shift = network
    hidden = inputs @ weight.T
    hidden += bias
    # LeakyReLU and dropout are one factor, 0, 0.4 or 2, forward and back. Integer arithmetic makes
    # it five times faster than np.where.
    slope = (hidden > 0).view(np.uint8) * 4 + 1
    factor = np.multiply(slope * mask, np.float32(0.4), dtype=np.float32)
    hidden *= factor
    logits = hidden @ output.T
    logits += shift
    error = softmax(logits, axis=1)
    error[np.arange(len(labels)), labels] -= 1
    error /= len(labels)
    back = error @ output
    back *= factor
    return [back.T @ inputs, back.sum(0), error.T @ hidden, error.sum(0)]


class _Adam:
    """Adam (Kingma and Ba 2015, Algorithm 1) with Keras' epsilon; updates parameters in place."""

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


def dropout_mask(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Draw fair zeros and ones, uint8, from random bits: dropout at rate 1/2.

    Drawing floats as torch does would take half of a step's time.
    """
    count = shape[0] * shape[1]
    bits = np.frombuffer(rng.bytes(-(-count // 8)), np.uint8)
    return np.unpackbits(bits, count=count).reshape(shape)
