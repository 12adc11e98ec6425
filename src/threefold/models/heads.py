"""Classifier heads: [recurrent] -> Gaussian noise -> [fully connected, ReLU] -> linear (figure 2).

On pooled features the recurrent layer sees one time step (see `recurrent`). Over the rows or the
positions of the feature map it sees several, and is a recurrent layer of torch.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from threefold.errors import RecipeError
from threefold.models.recurrent import (
    RECURRENT,
    OneStepGRU,
    OneStepLSTM,
    OneStepRNN,
    glorot_uniform,
    split_kind,
)
from threefold.recipe.schema import HeadSpec

InputForm = Literal["pooled", "levels", "map"]
"""What a head reads: the pooled features (b, c) of the last level; those of several levels side by
side, (b, c1 + c2 + ...); or the feature map (b, c, h, w)."""

MLP_WIDTH = 1024
"""Width of the hidden layer of `kind = "mlp"` if `fc` is 0: the smallest of the paper."""


class GaussianNoise(nn.Module):
    """Add noise of standard deviation `std` in training mode, and nothing in eval mode."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """Add noise to x, of any shape."""
        return x + self.std * torch.randn_like(x) if self.training and self.std else x


class Head(nn.Module):
    """Map the features of a backbone to logits; built by `build_head`.

    Args:
        spec: the head's table of a recipe.
        num_features: number of channels of the features.
        num_classes: number of logits k.

    Raises:
        RecipeError: the options of `spec` contradict each other.
    """

    takes_map: bool
    """Whether the input is the feature map (b, c, h, w) and not a vector of features (b, c)."""

    form: InputForm
    """Which features of the backbone the input is."""

    def __init__(self, spec: HeadSpec, num_features: int, num_classes: int) -> None:
        super().__init__()
        _check(spec)
        cell, _ = split_kind(spec.kind)
        self.sequence, self.takes_map = spec.sequence, spec.takes_map
        self.form = input_form(spec.sequence)
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
        """Map features of the head's form to logits (b, k)."""
        x = self._last_outputs(features) if self.takes_map else self.recurrent(features)
        return cast("Tensor", self.classifier(self.fc(self.noise(x))))

    def _last_outputs(self, feature_map: Tensor) -> Tensor:
        """Run over the map; return the output of each direction after its last step (as Keras)."""
        steps = feature_map.mean(dim=3) if self.sequence == "rows" else feature_map.flatten(2)
        outputs, _ = self.recurrent(steps.transpose(1, 2))
        width = cast("int", self.recurrent.hidden_size)
        return torch.cat((outputs[:, -1, :width], outputs[:, 0, width:]), dim=1)


def input_form(sequence: str) -> InputForm:
    """Return which features of the backbone a head with this `sequence` reads."""
    forms: dict[str, InputForm] = {"pooled": "pooled", "levels": "levels"}
    return forms.get(sequence, "map")


def _check(spec: HeadSpec) -> None:
    """Refuse options that would have no effect."""
    cell, directions = split_kind(spec.kind)
    if cell and spec.units % directions:
        raise RecipeError(
            f"head.kind = {spec.kind}", expected="an even number of units", got=spec.units
        )
    if not spec.takes_map:
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
    if spec.takes_map:
        return RECURRENT[cell](
            num_features, spec.units // directions, batch_first=True, bidirectional=directions == 2
        )
    if cell == "gru":
        form = partial(OneStepGRU, reset_after=spec.reset_after)
        return form(num_features, spec.units, activation=spec.activation, directions=directions)
    layer = OneStepLSTM if cell == "lstm" else OneStepRNN
    return layer(num_features, spec.units, activation=spec.activation, directions=directions)


def build_head(spec: HeadSpec, num_features: int, num_classes: int) -> Head:
    """Build the head of a recipe.

    Args:
        spec: the head's table of a recipe.
        num_features: number of channels of the features in the head's form.
        num_classes: number of logits k.

    Returns:
        A head that maps features of its form to logits (b, k).

    Raises:
        RecipeError: the options of `spec` contradict each other.
    """
    return Head(spec, num_features, num_classes)


def describe(spec: HeadSpec) -> str:
    """Describe a head in one sentence, for the report."""
    cell, directions = split_kind(spec.kind)
    hidden = _hidden_width(spec)
    depths = " of several depths of the backbone" if spec.sequence == "levels" else ""
    if cell is None:
        through = f" through a hidden layer of {hidden} units" if hidden else ""
        return f"Linear classifier on the pooled features{depths}{through}."
    after = f", then a hidden layer of {hidden} units" if hidden else ""
    name = ("Bidirectional " if directions == 2 else "") + cell.upper()
    if not spec.takes_map:
        layer = "dense tanh layer" if cell == "rnn" else "gated dense layer"
        return (
            f"{name} over one time step: the recurrent weights have no effect, so this is a "
            f"{layer} of {spec.units} units{after}."
        )
    steps = (
        "rows of the feature map, top to bottom"
        if spec.sequence == "rows"
        else "positions of the feature map, row by row"
    )
    return f"{name} over the {steps}: a recurrent layer of {spec.units} units{after}."
