"""One-step recurrent layers: equal to torch's and to Keras' layers, and the weights they lack."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.recurrent import KERAS_HEADS, RECURRENT_KINDS, from_keras, torch_layer
from torch import nn

from threefold.errors import RecipeError
from threefold.models.heads import build_head
from threefold.models.recurrent import (
    STORED_GATES,
    OneStep,
    OneStepGRU,
    OneStepLSTM,
    OneStepRNN,
    collapse,
    expand,
    full_parameters,
)
from threefold.recipe.schema import HeadSpec

LIVE_ROWS = {"rnn": [0], "gru": [0, 1, 2], "lstm": [0, 2, 3]}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", RECURRENT_KINDS)
def test_one_step_has_the_outputs_and_live_gradients_of_torch(
    kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    full = torch_layer(kind).to(dtype)
    step = collapse(full)
    x = torch.randn(7, 5, dtype=dtype, requires_grad=True)
    x_full = x.detach().clone().requires_grad_()

    output, expected = step(x), full(x_full.unsqueeze(1))[0][:, 0]
    slope = torch.randn_like(output)
    (output * slope).sum().backward()
    (expected * slope).sum().backward()

    torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)
    close = {"rtol": 0.0, "atol": 10 * tolerance}
    torch.testing.assert_close(x.grad, x_full.grad, **close)
    cell, directions = kind.removeprefix("bi"), 2 if kind.startswith("bi") else 1
    live, stored = LIVE_ROWS[cell], STORED_GATES[cell]
    for direction, suffix in enumerate(("_l0", "_l0_reverse")[:directions]):
        weight, bias, hidden_bias, hidden = (
            full.get_parameter(name + suffix).grad
            for name in ("weight_ih", "bias_ih", "bias_hh", "weight_hh")
        )
        grad = step.input.weight.grad.view(len(live), directions, 3, 5)[:, direction]
        torch.testing.assert_close(grad, weight.view(stored, 3, 5)[live], **close)
        grad = step.input.bias.grad.view(len(live), directions, 3)[:, direction]
        torch.testing.assert_close(grad, bias.view(stored, 3)[live], **close)
        if cell == "gru":
            grad = step.hidden_bias.grad.view(directions, 3)[direction]
            torch.testing.assert_close(grad, hidden_bias.view(3, 3)[2], **close)
            assert hidden_bias.view(3, 3)[2].abs().min() > 0
        assert not hidden.any(), "recurrent weights got a gradient"
        dead = [gate for gate in range(stored) if gate not in live]
        assert not weight.view(stored, 3, 5)[dead].any()
        assert not bias.view(stored, 3)[dead].any()


@pytest.mark.parametrize("kind", RECURRENT_KINDS)
def test_collapse_undoes_expand_whatever_the_dead_weights(kind: str) -> None:
    step = collapse(torch_layer(kind))

    x = torch.randn(4, 5)

    zeros, noise = expand(step), expand(step, dead_init=nn.init.normal_)

    assert not zeros.weight_hh_l0.any()
    assert noise.weight_hh_l0.abs().min() > 0
    for full in (zeros, noise):
        torch.testing.assert_close(full(x.unsqueeze(1))[0][:, 0], step(x), rtol=0, atol=1e-6)
        again = collapse(full)
        assert again.state_dict().keys() == step.state_dict().keys()
        for name, value in step.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name


def test_collapse_leaves_its_argument_as_it_was() -> None:
    full = torch_layer("bigru")
    before = {name: value.clone() for name, value in full.state_dict().items()}

    collapse(full)

    assert all(torch.equal(before[name], value) for name, value in full.state_dict().items())


def test_expand_refuses_what_torch_does_not_have() -> None:
    with pytest.raises(RecipeError, match="resets before"):
        expand(OneStepGRU(4, 4, reset_after=False))
    with pytest.raises(RecipeError, match="hard sigmoid"):
        expand(OneStepLSTM(4, 4, activation="keras"))
    assert isinstance(expand(OneStepRNN(4, 4, activation="keras")), nn.RNN)


@pytest.mark.parametrize(
    "module",
    [
        nn.LSTM(4, 4, num_layers=2),
        nn.LSTM(4, 4, proj_size=2),
        nn.GRU(4, 4, bias=False),
        nn.RNN(4, 4, nonlinearity="relu"),
    ],
    ids=["layers", "projection", "bias", "relu"],
)
def test_collapse_refuses_what_it_cannot_hold(module: nn.RNN | nn.GRU | nn.LSTM) -> None:
    with pytest.raises(RecipeError, match="one layer with bias"):
        collapse(module)


@pytest.mark.parametrize("name", ["rnn", "gru_after", "gru_before", "lstm", "bilstm"])
@pytest.mark.parametrize("gate", ["sigmoid", "hard"])
def test_one_step_is_keras(gate: str, name: str) -> None:
    layer = from_keras(f"{gate}/{name}", directions=2 if name == "bilstm" else 1)
    step = layer if isinstance(layer, OneStep) else collapse(layer)
    step.activation = "keras" if gate == "hard" else "torch"

    output = step(torch.from_numpy(KERAS_HEADS["inputs/one"][:, 0]))

    np.testing.assert_allclose(
        output.detach().numpy(), KERAS_HEADS[f"{gate}/{name}/output_one"], rtol=0, atol=1e-6
    )


# Recurrent layer with 2048 units: kind, reset_after, features, and the weights that Keras stores,
# that torch stores, and that are live.
COUNTS = [
    ("rnn", True, 2048, 8_390_656, 8_392_704, 4_196_352),
    ("gru", True, 2048, 25_178_112, 25_178_112, 12_591_104),
    ("gru", False, 2048, 25_171_968, None, 8_392_704),
    ("lstm", True, 2048, 33_562_624, 33_570_816, 12_589_056),
    ("bilstm", True, 2048, 25_174_016, 25_182_208, 12_589_056),
    ("rnn", True, 1024, 6_293_504, 6_295_552, 2_099_200),
    ("gru", True, 1024, 18_886_656, 18_886_656, 6_299_648),
    ("gru", False, 1024, 18_880_512, None, 4_198_400),
    ("lstm", True, 1024, 25_174_016, 25_182_208, 6_297_600),
    ("bilstm", True, 1024, 16_785_408, 16_793_600, 6_297_600),
]


@pytest.mark.parametrize(
    ("kind", "reset_after", "features", "keras", "torch_count", "live"), COUNTS
)
def test_parameter_counts(
    kind: str, reset_after: bool, features: int, keras: int, torch_count: int | None, live: int
) -> None:
    assert full_parameters(kind, features, 2048, reset_after=reset_after) == keras
    with torch.device("meta"):
        head = build_head(HeadSpec(kind=kind, units=2048, reset_after=reset_after), features, 10)
        assert count(head.recurrent) == live
        if torch_count is None:
            with pytest.raises(RecipeError, match="torch has no GRU"):
                full_parameters(kind, features, 2048, reset_after=reset_after, keras=False)
        else:
            assert full_parameters(kind, features, 2048, keras=False) == torch_count
            units = 1024 if kind == "bilstm" else 2048
            assert count(torch_layer(kind, features, units)) == torch_count
