"""Recurrent layers over one time step, without the weights that cannot act, and their full forms in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, cast

import torch
from torch import Tensor, nn

from threefold.errors import RecipeError
from threefold.recipe_schema import HeadKind

Activation = Literal["torch", "keras"]


Cell = Literal["rnn", "gru", "lstm"]


STORED_GATES: dict[Cell, int] = {"rnn": 1, "gru": 3, "lstm": 4}
"""Blocks of weights in the full form of each layer."""


RECURRENT: dict[Cell, type[nn.RNN] | type[nn.GRU] | type[nn.LSTM]] = {
    "rnn": nn.RNN,
    "gru": nn.GRU,
    "lstm": nn.LSTM,
}
"""Torch's layer for each cell."""


def hard_sigmoid(x: Tensor) -> Tensor:
    """Keras 2.2's gate: 0.2 x + 0.5 kept to 0..1. Keras 3 and torch give that name to x / 6 + 0.5."""
    return torch.clamp(0.2 * x + 0.5, 0.0, 1.0)


class OneStep(nn.Module):
    """A recurrent layer applied to one time step from a zero state: features (b, in_features) -> (b, units).

    The base of the three layers below. All live gates are one linear layer. A bidirectional layer is the same function
    with the weights of both directions stacked: `units` counts both, in each gate the forward one first.

    Args:
        in_features: width of the input.
        units: outputs, both directions together.
        gate_order: where each live gate stands in the weights of torch's full layer.
        activation: torch = sigmoid gates, torch's initialisation; keras = Keras 2.2's hard sigmoid and initialisation.
        directions: 1, or 2 for a bidirectional layer.

    Raises:
        RecipeError: `units` cannot be shared between the directions.
    """

    cell: Cell

    def __init__(
        self,
        in_features: int,
        units: int,
        gate_order: tuple[int, ...],
        activation: Activation,
        directions: int,
    ) -> None:
        super().__init__()
        if units % directions:
            raise RecipeError("units of a bidirectional head", expected="an even number", got=units)
        self.units, self.gate_order = units, gate_order
        self.activation, self.directions = activation, directions
        self.input = nn.Linear(in_features, len(gate_order) * units)
        if activation == "keras":
            # Keras draws all gates of one direction as one matrix, the dead ones too.
            glorot_uniform(
                self.input, in_features + STORED_GATES[self.cell] * (units // directions)
            )
            return
        nn.init.uniform_(self.input.weight, -self.bound, self.bound)
        with torch.no_grad():  # torch stores two biases, which act as their sum
            self.input.bias.copy_(self._uniform(self.input.bias) + self._uniform(self.input.bias))

    @property
    def bound(self) -> float:
        """Largest weight that torch's initialisation draws: 1 / sqrt(units of one direction)."""
        return 1.0 / math.sqrt(self.units // self.directions)

    def _uniform(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).uniform_(-self.bound, self.bound)

    def _gate(self, x: Tensor) -> Tensor:
        return hard_sigmoid(x) if self.activation == "keras" else torch.sigmoid(x)

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Every live gate before its nonlinearity, each (b, units)."""
        return cast("Tensor", self.input(x)).chunk(len(self.gate_order), dim=1)


class OneStepRNN(OneStep):
    """tanh(W x + b): paper eq. 1 with h = 0 and the tanh that ran."""

    cell = "rnn"

    def __init__(
        self, in_features: int, units: int, *, activation: Activation = "torch", directions: int = 1
    ) -> None:
        super().__init__(in_features, units, (0,), activation, directions)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (b, in_features) to (b, units)."""
        return torch.tanh(self._parts(x)[0])


class OneStepLSTM(OneStep):
    """o tanh(i g), gates in the order i, g, o: paper eqs. 5 to 9 with h = c = 0. The forget gate multiplies zero."""

    cell = "lstm"

    def __init__(
        self, in_features: int, units: int, *, activation: Activation = "torch", directions: int = 1
    ) -> None:
        super().__init__(in_features, units, (0, 2, 3), activation, directions)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (b, in_features) to (b, units)."""
        i, g, o = self._parts(x)
        return self._gate(o) * torch.tanh(self._gate(i) * torch.tanh(g))


class OneStepGRU(OneStep):
    """(1 - z) n: paper eqs. 10 to 13 with h = 0 (eq. 13 calls z what Keras and torch call 1 - z).

    With `reset_after` (torch, TF 2) n = tanh(W x + b + r b_h) and the gates are r, z, n: the reset gate lives through
    the recurrent bias b_h. Without it (Keras 2.2, the paper's runs) n = tanh(W x + b) and the gates are z, n.
    """

    cell = "gru"

    def __init__(
        self,
        in_features: int,
        units: int,
        *,
        activation: Activation = "torch",
        directions: int = 1,
        reset_after: bool = True,
    ) -> None:
        super().__init__(
            in_features, units, (0, 1, 2) if reset_after else (1, 2), activation, directions
        )
        self.reset_after = reset_after
        if reset_after:
            self.hidden_bias = nn.Parameter(torch.zeros(units))
            if activation == "torch":
                with torch.no_grad():  # the two biases of n act apart, so neither is a sum
                    self.hidden_bias.copy_(self._uniform(self.hidden_bias))
                    self.input.bias[-units:] = self._uniform(self.hidden_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (b, in_features) to (b, units)."""
        if self.reset_after:
            r, z, n = self._parts(x)
            return (1.0 - self._gate(z)) * torch.tanh(n + self._gate(r) * self.hidden_bias)
        z, n = self._parts(x)
        return (1.0 - self._gate(z)) * torch.tanh(n)


def glorot_uniform(linear: nn.Linear, fans: int) -> None:
    """Keras' start: uniform within sqrt(6 / (fan in + fan out)), no bias."""
    bound = math.sqrt(6.0 / fans)
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)


def collapse(module: nn.RNN | nn.GRU | nn.LSTM) -> OneStep:
    """The one-step layer that computes what `module` does on sequences of length one from a zero state.

    Raises:
        RecipeError: several layers, no bias, an LSTM projection, or an RNN with ReLU.
    """
    if module.num_layers != 1 or not module.bias or module.proj_size or module.mode == "RNN_RELU":
        raise RecipeError(
            "cannot collapse this layer",
            expected="one layer with bias, tanh, no projection",
            got=module,
        )
    directions = 2 if module.bidirectional else 1
    layers: dict[str, type[OneStepRNN] | type[OneStepLSTM] | type[OneStepGRU]]
    layers = {"RNN_TANH": OneStepRNN, "LSTM": OneStepLSTM, "GRU": OneStepGRU}
    step = layers[module.mode](
        module.input_size, directions * module.hidden_size, directions=directions
    )
    step.to(cast("Tensor", module.weight_ih_l0))
    with torch.no_grad():
        for full, live in zip(_full_parts(module), _live_parts(step), strict=True):
            weight, bias, hidden_bias = (part[list(step.gate_order)] for part in full[:3])
            if isinstance(step, OneStepGRU):
                live[2].copy_(hidden_bias[-1])
                hidden_bias[-1] = 0.0  # a copy: `module` stays as it is
            live[0].copy_(weight)
            live[1].copy_(bias + hidden_bias)
    return step


def expand(
    step: OneStep, dead_init: Callable[[Tensor], object] = nn.init.zeros_
) -> nn.RNN | nn.GRU | nn.LSTM:
    """The torch layer (batch first) that computes what `step` does when it is given one time step and no state.

    Args:
        step: a one-step layer.
        dead_init: fills each block of dead weights in place, for example `nn.init.orthogonal_`. Dead biases are zero.

    Raises:
        RecipeError: torch has no such layer: hard sigmoid gates, or a GRU without reset_after.
    """
    if step.activation == "keras" and step.cell != "rnn":
        raise RecipeError(
            "torch has no recurrent layer with hard sigmoid gates", fix="use activation = torch"
        )
    if isinstance(step, OneStepGRU) and not step.reset_after:
        raise RecipeError(
            "torch has no GRU that resets before the product", fix="use reset_after = true"
        )
    width = step.units // step.directions
    module = RECURRENT[step.cell](
        step.input.in_features, width, batch_first=True, bidirectional=step.directions == 2
    )
    module.to(step.input.weight)
    with torch.no_grad():
        for full, live in zip(_full_parts(module), _live_parts(step), strict=True):
            for block in (*full[0], *full[3]):
                dead_init(block)
            full[1].zero_()
            full[2].zero_()
            full[0][list(step.gate_order)] = live[0]
            full[1][list(step.gate_order)] = live[1]
            if isinstance(step, OneStepGRU):
                full[2][-1] = live[2]
    return module


def _full_parts(
    module: nn.RNN | nn.GRU | nn.LSTM,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each direction: input weights, input bias, hidden bias, hidden weights; gates along the first axis."""
    for suffix in ("_l0", "_l0_reverse")[: 2 if module.bidirectional else 1]:
        names = (f"weight_ih{suffix}", f"bias_ih{suffix}", f"bias_hh{suffix}", f"weight_hh{suffix}")
        tensors = [module.get_parameter(name).detach() for name in names]
        weight, bias, hidden_bias, hidden = (
            part.view(-1, module.hidden_size, *part.shape[1:]) for part in tensors
        )
        yield weight, bias, hidden_bias, hidden


def _live_parts(step: OneStep) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each direction: weights, bias (live gates along the first axis), hidden bias (empty unless it acts apart)."""
    shape = (step.directions, step.units // step.directions)
    weight = step.input.weight.detach().view(-1, *shape, step.input.in_features)
    bias = step.input.bias.detach().view(-1, *shape)
    apart = isinstance(step, OneStepGRU) and step.reset_after
    hidden_bias = (
        step.get_parameter("hidden_bias").detach().view(shape)
        if apart
        else bias.new_empty(shape[0], 0)
    )
    for direction in range(step.directions):
        yield weight[:, direction], bias[:, direction], hidden_bias[direction]


def full_parameters(
    kind: HeadKind, in_features: int, units: int, *, reset_after: bool = True, keras: bool = True
) -> int:
    """Weights that Keras (or torch) stores for the recurrent layer of a head, dead ones included; 0 for linear and mlp.

    Raises:
        RecipeError: `keras=False` with a GRU without reset_after, which torch does not have.
    """
    cell, directions = split_kind(kind)
    if cell is None:
        return 0
    if cell == "gru" and not (reset_after or keras):
        raise RecipeError(
            "torch has no GRU that resets before the product", fix="count it with keras=True"
        )
    width = units // directions
    biases = 1 if keras and not (cell == "gru" and reset_after) else 2
    return directions * STORED_GATES[cell] * width * (in_features + width + biases)


def split_kind(kind: HeadKind) -> tuple[Cell | None, int]:
    """Which recurrent cell a kind of head uses, and how many directions."""
    if kind in ("linear", "mlp"):
        return None, 1
    return cast("Cell", kind.removeprefix("bi")), 2 if kind.startswith("bi") else 1
