"""Classifier heads: [recurrent] -> Gaussian noise -> [fully connected, ReLU] -> linear (paper figure 2).

The paper feeds the recurrent layer one time step, the pooled features. With one step and a zero initial state the
recurrent weights are multiplied by zero: they neither act nor get a gradient, and the forget gate (and, without
`reset_after`, the reset gate) multiplies zero too. The one-step layers below are the same functions without those
weights. Heads that run over the rows or the places of the feature map are really recurrent and use torch's layers.

Equation 1 of the paper prints a sigmoid for the simple RNN; the authors' runs used tanh (Keras' default), and so do we.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from threefold.errors import RecipeError
from threefold.models__recurrent import (
    RECURRENT,
    OneStepGRU,
    OneStepLSTM,
    OneStepRNN,
    glorot_uniform,
    split_kind,
)
from threefold.recipe_schema import HeadSpec

MLP_WIDTH = 1024
"""Width of the hidden layer of `kind = "mlp"` where `fc` is not set (the paper's smallest)."""


class GaussianNoise(nn.Module):
    """Adds noise of standard deviation `std` while training; does nothing in evaluation."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """Return x, with noise in training mode; any shape."""
        return x + self.std * torch.randn_like(x) if self.training and self.std else x


class Head(nn.Module):
    """What maps a backbone's features to logits; built by `build_head`.

    Args:
        spec: the head's table of a recipe.
        num_features: channels c of the features.
        num_classes: logits k.

    Raises:
        RecipeError: the options of `spec` contradict each other.
    """

    takes_map: bool
    """True: the input is the feature map (b, c, h, w). False: it is pooled features (b, c)."""

    def __init__(self, spec: HeadSpec, num_features: int, num_classes: int) -> None:
        super().__init__()
        _check(spec)
        cell, _ = split_kind(spec.kind)
        self.sequence, self.takes_map = spec.sequence, spec.sequence != "pooled"
        width = spec.units if cell else num_features
        self.recurrent = _recurrent(spec, num_features)
        self.noise = GaussianNoise(spec.noise)
        hidden = _hidden_width(spec)
        self.fc = nn.Sequential(nn.Linear(width, hidden), nn.ReLU()) if hidden else nn.Identity()
        self.classifier = nn.Linear(hidden or width, num_classes)
        if spec.activation == "keras":
            for linear in (*self.fc.children(), self.classifier):
                if isinstance(linear, nn.Linear):
                    glorot_uniform(linear, linear.in_features + linear.out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (b, c), or a feature map (b, c, h, w) where `takes_map`, to logits (b, k)."""
        x = self._last_outputs(features) if self.takes_map else self.recurrent(features)
        return cast("Tensor", self.classifier(self.fc(self.noise(x))))

    def _last_outputs(self, feature_map: Tensor) -> Tensor:
        """Run over the map; each direction gives its output after its last step, as Keras does."""
        steps = feature_map.mean(dim=3) if self.sequence == "rows" else feature_map.flatten(2)
        outputs, _ = self.recurrent(steps.transpose(1, 2))
        width = cast("int", self.recurrent.hidden_size)
        return torch.cat((outputs[:, -1, :width], outputs[:, 0, width:]), dim=1)


def _check(spec: HeadSpec) -> None:
    """Refuse what would otherwise be ignored."""
    cell, directions = split_kind(spec.kind)
    if cell and spec.units % directions:
        raise RecipeError(
            f"head.kind = {spec.kind}", expected="an even number of units", got=spec.units
        )
    if spec.sequence == "pooled":
        return
    where = f"head.sequence = {spec.sequence}"
    if not cell:
        raise RecipeError(
            where, expected="a recurrent kind", got=spec.kind, fix='set head.sequence = "pooled"'
        )
    if spec.activation == "keras":
        raise RecipeError(
            where,
            expected='activation = "torch"',
            got="keras",
            fix="hard sigmoid gates are one-step only",
        )
    if cell == "gru" and not spec.reset_after:
        raise RecipeError(
            where, expected="reset_after = true", got="false", fix="that GRU is one-step only"
        )


def _hidden_width(spec: HeadSpec) -> int:
    return spec.fc or (MLP_WIDTH if spec.kind == "mlp" else 0)


def _recurrent(spec: HeadSpec, num_features: int) -> nn.Module:
    cell, directions = split_kind(spec.kind)
    if cell is None:
        return nn.Identity()
    if spec.sequence != "pooled":
        return RECURRENT[cell](
            num_features, spec.units // directions, batch_first=True, bidirectional=directions == 2
        )
    if cell == "gru":
        form = partial(OneStepGRU, reset_after=spec.reset_after)
        return form(num_features, spec.units, activation=spec.activation, directions=directions)
    layer = OneStepLSTM if cell == "lstm" else OneStepRNN
    return layer(num_features, spec.units, activation=spec.activation, directions=directions)


def build_head(spec: HeadSpec, num_features: int, num_classes: int) -> Head:
    """Build the head that a recipe asks for.

    Args:
        spec: the head's table of a recipe.
        num_features: channels c of the backbone's features.
        num_classes: logits k.

    Returns:
        Head: maps (b, c), or (b, c, h, w) where its `takes_map` is true, to logits (b, k).

    Raises:
        RecipeError: the options of `spec` contradict each other.
    """
    return Head(spec, num_features, num_classes)


def describe(spec: HeadSpec) -> str:
    """One plain sentence that says what the head computes, for the report."""
    cell, directions = split_kind(spec.kind)
    hidden = _hidden_width(spec)
    if cell is None:
        through = f" through a hidden layer of {hidden} units" if hidden else ""
        return f"Linear classifier on the pooled features{through}."
    after = f", then a hidden layer of {hidden} units" if hidden else ""
    name = ("Bidirectional " if directions == 2 else "") + cell.upper()
    if spec.sequence == "pooled":
        layer = "dense tanh layer" if cell == "rnn" else "gated dense layer"
        why = "the recurrent weights cannot act, so this is a"
        return f"{name} over one time step: {why} {layer} of {spec.units} units{after}."
    steps = (
        "rows of the feature map, top to bottom"
        if spec.sequence == "rows"
        else "places of the feature map, row by row"
    )
    return f"{name} over the {steps}: really recurrent, {spec.units} units{after}."
