"""Recurrent layers over one time step, without the weights that have no effect.

The paper feeds its recurrent layers one time step, the pooled features. With one step and a zero
initial state the recurrent weights are multiplied by zero: they have no effect and get no gradient.
The forget gate, and without `reset_after` the reset gate, also multiplies zero. The layers here are
the same functions without those weights; `collapse` and `expand` convert from and to torch's
layers.

Equation 1 of the paper prints a sigmoid for the simple RNN. The authors' runs used tanh, Keras'
default, and so do these layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from threefold.errors import RecipeError
from threefold.recipe.schema import HeadKind

Activation = Literal["torch", "keras"]
Cell = Literal["rnn", "gru", "lstm"]

STORED_GATES: dict[Cell, int] = {"rnn": 1, "gru": 3, "lstm": 4}
"""Number of gates in torch's and Keras' full layers."""

RECURRENT: dict[Cell, type[nn.RNN] | type[nn.GRU] | type[nn.LSTM]] = {
    "rnn": nn.RNN,
    "gru": nn.GRU,
    "lstm": nn.LSTM,
}
"""torch's layer for each cell."""


def hard_sigmoid(x: Tensor) -> Tensor:
    """Compute 0.2 x + 0.5, clipped to 0..1, as in Keras 2.2; Keras 3 and torch use x / 6 + 0.5."""
    return torch.clamp(0.2 * x + 0.5, 0.0, 1.0)


class OneStep(nn.Module):
    """Base of the recurrent layers over one time step from a zero state.

    `forward` maps features (b, in_features) to (b, units). All live gates are one linear layer. A
    bidirectional layer is the same function with the weights of both directions stacked: in each
    gate the forward direction comes first.

    Args:
        in_features: width of the input.
        units: number of outputs, both directions together.
        gate_order: position of each live gate in the weights of torch's full layer.
        activation: `torch` = sigmoid gates and torch's initialisation; `keras` = the hard sigmoid
            and the initialisation of Keras 2.2.
        directions: 1, or 2 for a bidirectional layer.

    Raises:
        RecipeError: `units` is not a multiple of `directions`.
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
            # Keras draws all gates of one direction as one matrix, dead gates included.
            glorot_uniform(
                self.input, in_features + STORED_GATES[self.cell] * (units // directions)
            )
            return
        nn.init.uniform_(self.input.weight, -self.bound, self.bound)
        bias = self.input.bias
        with torch.no_grad():  # torch stores two biases and adds them
            bias.copy_(self._uniform(bias) + self._uniform(bias))

    @property
    def bound(self) -> float:
        """Bound of torch's initialisation: 1 / sqrt(units of one direction)."""
        return 1.0 / math.sqrt(self.units // self.directions)

    def _uniform(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).uniform_(-self.bound, self.bound)

    def _gate(self, x: Tensor) -> Tensor:
        return hard_sigmoid(x) if self.activation == "keras" else torch.sigmoid(x)

    def _live_gates(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute every live gate before its nonlinearity, each (b, units)."""
        return cast("Tensor", self.input(x)).chunk(len(self.gate_order), dim=1)


class OneStepRNN(OneStep):
    """tanh(W x + b): paper eq. 1 with h = 0, and tanh as in the authors' runs."""

    cell = "rnn"

    def __init__(
        self, in_features: int, units: int, *, activation: Activation = "torch", directions: int = 1
    ) -> None:
        super().__init__(in_features, units, (0,), activation, directions)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (b, in_features) to (b, units)."""
        return torch.tanh(self._live_gates(x)[0])


class OneStepLSTM(OneStep):
    """o tanh(i g), with gates in the order i, g, o: paper eqs. 5 to 9 with h = c = 0."""

    cell = "lstm"

    def __init__(
        self, in_features: int, units: int, *, activation: Activation = "torch", directions: int = 1
    ) -> None:
        super().__init__(in_features, units, (0, 2, 3), activation, directions)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (b, in_features) to (b, units)."""
        i, g, o = self._live_gates(x)
        return self._gate(o) * torch.tanh(self._gate(i) * torch.tanh(g))


class OneStepGRU(OneStep):
    """(1 - z) n: paper eqs. 10 to 13 with h = 0; z of eq. 13 is 1 - z in Keras and torch.

    With `reset_after` (torch, TF 2) n = tanh(W x + b + r b_h) and the gates are r, z, n: the reset
    gate acts through the recurrent bias b_h. Without it (Keras 2.2, the paper's runs)
    n = tanh(W x + b) and the gates are z, n.
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
                with torch.no_grad():  # r scales one of the two biases of n, so they are not added
                    self.hidden_bias.copy_(self._uniform(self.hidden_bias))
                    self.input.bias[-units:] = self._uniform(self.hidden_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (b, in_features) to (b, units)."""
        if self.reset_after:
            r, z, n = self._live_gates(x)
            return (1.0 - self._gate(z)) * torch.tanh(n + self._gate(r) * self.hidden_bias)
        z, n = self._live_gates(x)
        return (1.0 - self._gate(z)) * torch.tanh(n)


def glorot_uniform(linear: nn.Linear, fans: int) -> None:
    """Initialise a layer as Keras does: uniform within sqrt(6 / (fan in + fan out)), zero bias."""
    bound = math.sqrt(6.0 / fans)
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)


def collapse(module: nn.RNN | nn.GRU | nn.LSTM) -> OneStep:
    """Build the one-step layer that equals `module` on sequences of length one from a zero state.

    Raises:
        RecipeError: the layer has several levels, no bias, an LSTM projection, or a ReLU.
    """
    if module.num_layers != 1 or not module.bias or module.proj_size or module.mode == "RNN_RELU":
        raise RecipeError(
            "cannot collapse this layer",
            expected="one layer with bias, tanh, no projection",
            got=module,
        )
    directions = 2 if module.bidirectional else 1
    layers: dict[str, type[OneStepRNN] | type[OneStepLSTM] | type[OneStepGRU]] = {
        "RNN_TANH": OneStepRNN,
        "LSTM": OneStepLSTM,
        "GRU": OneStepGRU,
    }
    step = layers[module.mode](
        module.input_size, directions * module.hidden_size, directions=directions
    )
    step.to(cast("Tensor", module.weight_ih_l0))
    with torch.no_grad():
        for full, live in zip(_full_weights(module), _live_weights(step), strict=True):
            gates = list(step.gate_order)
            hidden_bias = full.hidden_bias[gates]  # a copy, so `module` does not change
            if isinstance(step, OneStepGRU):
                live.hidden_bias.copy_(hidden_bias[-1])
                hidden_bias[-1] = 0.0
            live.input.copy_(full.input[gates])
            live.input_bias.copy_(full.input_bias[gates] + hidden_bias)
    return step


def expand(
    step: OneStep, dead_init: Callable[[Tensor], object] = nn.init.zeros_
) -> nn.RNN | nn.GRU | nn.LSTM:
    """Build torch's layer (batch first) that equals `step` on one time step from a zero state.

    Args:
        step: a one-step layer.
        dead_init: fills each block of dead weights in place, for example `nn.init.orthogonal_`.
            Dead biases are zero.

    Raises:
        RecipeError: torch has no such layer (hard sigmoid gates, or a GRU without reset_after).
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
        for full, live in zip(_full_weights(module), _live_weights(step), strict=True):
            gates = list(step.gate_order)
            for block in (*full.input, *full.hidden):
                dead_init(block)
            full.input_bias.zero_()
            full.hidden_bias.zero_()
            full.input[gates] = live.input
            full.input_bias[gates] = live.input_bias
            if isinstance(step, OneStepGRU):
                full.hidden_bias[-1] = live.hidden_bias
    return module


class _Weights(NamedTuple):
    """Weights of one direction, as views with the gates along the first axis."""

    input: Tensor
    input_bias: Tensor
    hidden_bias: Tensor
    """In a one-step layer (units,), and only of a GRU with `reset_after`; otherwise empty."""
    hidden: Tensor
    """Empty in a one-step layer."""


def _full_weights(module: nn.RNN | nn.GRU | nn.LSTM) -> Iterator[_Weights]:
    """Yield the weights of each direction of torch's layer."""
    for suffix in ("_l0", "_l0_reverse")[: 2 if module.bidirectional else 1]:
        names = (f"weight_ih{suffix}", f"bias_ih{suffix}", f"bias_hh{suffix}", f"weight_hh{suffix}")
        tensors = [module.get_parameter(name).detach() for name in names]
        yield _Weights(*(t.view(-1, module.hidden_size, *t.shape[1:]) for t in tensors))


def _live_weights(step: OneStep) -> Iterator[_Weights]:
    """Yield the weights of each direction of a one-step layer."""
    shape = (step.directions, step.units // step.directions)
    weight = step.input.weight.detach().view(-1, *shape, step.input.in_features)
    bias = step.input.bias.detach().view(-1, *shape)
    empty = bias.new_empty(shape[0], 0)
    hidden_bias = empty
    if isinstance(step, OneStepGRU) and step.reset_after:
        hidden_bias = step.hidden_bias.detach().view(shape)
    for i in range(step.directions):
        yield _Weights(
            input=weight[:, i], input_bias=bias[:, i], hidden_bias=hidden_bias[i], hidden=empty[i]
        )


def full_parameters(
    kind: HeadKind, in_features: int, units: int, *, reset_after: bool = True, keras: bool = True
) -> int:
    """Count the weights of a head's recurrent layer in Keras or torch, dead weights included.

    Args:
        kind: kind of the head; 0 weights for `linear` and `mlp`.
        in_features: width of the input.
        units: number of outputs, both directions together.
        reset_after: form of the GRU, see `OneStepGRU`.
        keras: count Keras' layer; False counts torch's.

    Raises:
        RecipeError: torch has no GRU without reset_after.
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
    """Return the recurrent cell of a kind of head (or None) and its number of directions."""
    cell = kind.removeprefix("bi")
    if cell not in RECURRENT:
        return None, 1
    return cell, 2 if kind.startswith("bi") else 1
