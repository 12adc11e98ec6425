"""Heads: one-step layers equal torch's and Keras' layers, and heads follow the recipe."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.paths import GOLDEN
from torch import nn

from threefold.errors import RecipeError
from threefold.models.heads import GaussianNoise, Head, build_head, describe
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
from threefold.recipe_schema import HeadSpec

GOLDEN = np.load(GOLDEN / "keras_heads.npz", allow_pickle=False)
TORCH_LAYERS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
RECURRENT_KINDS = ["rnn", "gru", "lstm", "birnn", "bigru", "bilstm"]
LIVE_ROWS = {"rnn": [0], "gru": [0, 1, 2], "lstm": [0, 2, 3]}
KERAS_TO_TORCH = {
    "rnn": [0],
    "gru": [1, 0, 2],
    "lstm": [0, 1, 2, 3],
}  # Keras: GRU z r h, LSTM i f c o


def torch_layer(
    kind: str, features: int = 5, units: int = 3, **options: object
) -> nn.RNN | nn.GRU | nn.LSTM:
    torch.manual_seed(3)
    return TORCH_LAYERS[kind.removeprefix("bi")](
        features, units, batch_first=True, bidirectional=kind.startswith("bi"), **options
    )


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def from_keras(key: str, directions: int = 1) -> nn.RNN | nn.GRU | nn.LSTM | OneStepGRU:
    """Build torch's layer, or the live part of the GRU that torch lacks, from golden weights."""
    cell = key.split("/")[1].split("_")[0].removeprefix("bi")
    weights = [torch.from_numpy(GOLDEN[f"{key}/weight{i}"]) for i in range(3 * directions)]
    features, units = weights[0].shape[0], weights[1].shape[0]
    if key.endswith("gru_before"):
        step = OneStepGRU(features, units, reset_after=False).double()
        rows = torch.cat([torch.arange(units), torch.arange(2 * units, 3 * units)])
        step.load_state_dict({"input.weight": weights[0].T[rows], "input.bias": weights[2][rows]})
        return step
    module = TORCH_LAYERS[cell](
        features, units, batch_first=True, bidirectional=directions == 2
    ).double()
    state = {}
    for suffix, (kernel, recurrent, bias) in zip(
        ("_l0", "_l0_reverse"), zip(*[iter(weights)] * 3, strict=True), strict=False
    ):
        biases = bias if bias.ndim == 2 else torch.stack([bias, torch.zeros_like(bias)])

        def reorder(array: torch.Tensor) -> torch.Tensor:
            return torch.cat([array.split(units)[gate] for gate in KERAS_TO_TORCH[cell]])

        state |= {
            f"weight_ih{suffix}": reorder(kernel.T),
            f"weight_hh{suffix}": reorder(recurrent.T),
        }
        state |= {f"bias_ih{suffix}": reorder(biases[0]), f"bias_hh{suffix}": reorder(biases[1])}
    module.load_state_dict(state)
    return module


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
    torch.testing.assert_close(output, expected, rtol=0, atol=tolerance)
    slope = torch.randn_like(output)
    (output * slope).sum().backward()
    (expected * slope).sum().backward()

    close = {"rtol": 0.0, "atol": 10 * tolerance}
    torch.testing.assert_close(x.grad, x_full.grad, **close)
    cell, directions = kind.removeprefix("bi"), 2 if kind.startswith("bi") else 1
    live, stored = LIVE_ROWS[cell], STORED_GATES[cell]
    for direction, suffix in enumerate(("_l0", "_l0_reverse")[:directions]):
        weight, bias, hidden_bias, hidden = (
            full.get_parameter(name + suffix).grad
            for name in ("weight_ih", "bias_ih", "bias_hh", "weight_hh")
        )
        mine = step.input.weight.grad.view(len(live), directions, 3, 5)[:, direction]
        torch.testing.assert_close(mine, weight.view(stored, 3, 5)[live], **close)
        mine = step.input.bias.grad.view(len(live), directions, 3)[:, direction]
        torch.testing.assert_close(mine, bias.view(stored, 3)[live], **close)
        if cell == "gru":
            mine = step.hidden_bias.grad.view(directions, 3)[direction]
            torch.testing.assert_close(mine, hidden_bias.view(3, 3)[2], **close)
            assert hidden_bias.view(3, 3)[2].abs().min() > 0
        assert not hidden.any(), "recurrent weights got a gradient"
        dead = [gate for gate in range(stored) if gate not in live]
        assert not weight.view(stored, 3, 5)[dead].any()
        assert not bias.view(stored, 3)[dead].any()


@pytest.mark.parametrize("kind", RECURRENT_KINDS)
def test_collapse_undoes_expand_whatever_the_dead_weights(kind: str) -> None:
    step = collapse(torch_layer(kind))
    zeros, noise = expand(step), expand(step, dead_init=nn.init.normal_)
    assert not zeros.weight_hh_l0.any()
    assert noise.weight_hh_l0.abs().min() > 0
    x = torch.randn(4, 5)
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
    output = step(torch.from_numpy(GOLDEN["inputs/one"][:, 0]))
    np.testing.assert_allclose(
        output.detach().numpy(), GOLDEN[f"{gate}/{name}/output_one"], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("kind", "name"), [("rnn", "rnn"), ("gru", "gru_after"), ("lstm", "lstm"), ("bilstm", "bilstm")]
)
def test_heads_over_several_steps_are_keras(kind: str, name: str) -> None:
    layer = from_keras(f"sigmoid/{name}", directions=2 if kind.startswith("bi") else 1)
    units = layer.hidden_size * (2 if kind.startswith("bi") else 1)
    steps = torch.from_numpy(GOLDEN["inputs/many"]).transpose(1, 2)  # (b, c, t)
    for sequence, feature_map in (
        ("rows", torch.stack((steps - 0.5, steps + 0.5), dim=3)),
        ("spatial", steps.unflatten(2, (2, 2))),
    ):
        head = (
            build_head(HeadSpec(kind=kind, units=units, sequence=sequence), 6, units)
            .double()
            .eval()
        )
        head.recurrent.load_state_dict(layer.state_dict())
        with torch.no_grad():
            head.classifier.weight.copy_(torch.eye(units))
            head.classifier.bias.zero_()
        output = head(feature_map).detach().numpy()
        np.testing.assert_allclose(output, GOLDEN[f"sigmoid/{name}/output_many"], rtol=0, atol=1e-6)


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
            assert (
                count(torch_layer(kind, features, 1024 if kind == "bilstm" else 2048))
                == torch_count
            )


@pytest.mark.parametrize("kind", [*RECURRENT_KINDS, "linear", "mlp"])
def test_exported_heads_hold_no_recurrent_operator(kind: str) -> None:
    activation = "keras" if kind.startswith("bi") else "torch"
    head = build_head(HeadSpec(kind=kind, units=8, fc=6, activation=activation), 5, 3).eval()
    x = torch.randn(4, 5)
    program = torch.export.export(head, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert operators
    assert not [name for name in operators if any(word in name for word in ("rnn", "gru", "lstm"))]
    torch.testing.assert_close(program.module()(x[:2]), head(x[:2]))


@pytest.mark.parametrize("sequence", ["pooled", "rows", "spatial"])
@pytest.mark.parametrize("kind", RECURRENT_KINDS)
def test_heads_map_features_to_logits(kind: str, sequence: str) -> None:
    head = build_head(HeadSpec(kind=kind, units=8, sequence=sequence), 5, 3)
    assert head.takes_map == (sequence != "pooled")
    logits = head(torch.randn(2, 5, 4, 3) if head.takes_map else torch.randn(2, 5))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_sequences_read_the_map_from_the_top_in_raster_order() -> None:
    for sequence, order in (("rows", lambda m: m.mean(3)), ("spatial", lambda m: m.flatten(2))):
        head = build_head(HeadSpec(kind="rnn", units=4, sequence=sequence), 5, 4).eval()
        feature_map = torch.randn(2, 5, 3, 2)
        expected = head.classifier(head.recurrent(order(feature_map).transpose(1, 2))[0][:, -1])
        torch.testing.assert_close(head(feature_map), expected)


def layer_widths(head: Head) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in head.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"kind": "linear"}, [(5, 3)]),
        ({"kind": "linear", "fc": 7}, [(5, 7), (7, 3)]),
        ({"kind": "mlp"}, [(5, 1024), (1024, 3)]),
        ({"kind": "mlp", "fc": 7}, [(5, 7), (7, 3)]),
        ({"kind": "lstm", "units": 4, "fc": 7}, [(5, 12), (4, 7), (7, 3)]),
        ({"kind": "bigru", "units": 4}, [(5, 12), (4, 3)]),
    ],
)
def test_layers_of_a_head(options: dict[str, object], widths: list[tuple[int, int]]) -> None:
    assert layer_widths(build_head(HeadSpec(**options), 5, 3)) == widths


def test_noise_acts_in_training_only_and_before_the_fc() -> None:
    x = torch.zeros(20_000, 1)
    noise = GaussianNoise(0.1)
    assert abs(float(noise(x).std()) - 0.1) < 0.005
    assert noise.eval()(x) is x
    assert GaussianNoise(0.0)(x) is x

    head = build_head(HeadSpec(kind="rnn", units=4, fc=2), 5, 3)
    head.noise.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    expected = head.classifier(head.fc(torch.zeros(2, 4)))
    torch.testing.assert_close(head(torch.randn(2, 5)), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bilstm", "units": 7}, "even number"),
        ({"kind": "linear", "sequence": "rows"}, "recurrent kind"),
        ({"kind": "mlp", "sequence": "spatial"}, "recurrent kind"),
        ({"kind": "lstm", "sequence": "rows", "activation": "keras"}, "one-step only"),
        ({"kind": "gru", "sequence": "rows", "reset_after": False}, "one-step only"),
    ],
)
def test_contradictions_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_head(HeadSpec(**options), 5, 3)


def test_keras_start() -> None:
    """Glorot-uniform over the fused matrix of one direction (with the dead gates), zero biases."""
    torch.manual_seed(0)
    head = build_head(HeadSpec(kind="bilstm", units=64, fc=32, activation="keras"), 50, 3)
    assert torch.equal(head.recurrent.input.bias, torch.zeros(192))
    bound = math.sqrt(6 / (50 + 4 * 32))
    assert 0.99 * bound < float(head.recurrent.input.weight.detach().abs().max()) <= bound
    bound = math.sqrt(6 / (64 + 32))
    assert 0.98 * bound < float(head.fc[0].weight.detach().abs().max()) <= bound
    assert not head.classifier.bias.any()
    assert not OneStepGRU(4, 4, activation="keras").hidden_bias.any()


@pytest.mark.parametrize("kind", RECURRENT_KINDS)
def test_torch_start_is_distributed_as_torch_starts(kind: str) -> None:
    torch.manual_seed(0)
    units = 1000
    step = build_head(HeadSpec(kind=kind, units=units), 20, 2).recurrent
    full = collapse(torch_layer(kind, 20, units // (2 if kind.startswith("bi") else 1)))
    for (name, mine), theirs in zip(step.named_parameters(), full.parameters(), strict=True):
        gates = len(mine) // units
        for a, b in zip(
            mine.detach().view(gates, -1), theirs.detach().view(gates, -1), strict=True
        ):
            assert abs(float(a.std() / b.std()) - 1) < 0.1, name
            assert abs(float(a.abs().max() / b.abs().max()) - 1) < 0.1, name


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "linear"}, "Linear classifier on the pooled features."),
        (
            {"kind": "mlp"},
            "Linear classifier on the pooled features through a hidden layer of 1024 units.",
        ),
        (
            {"kind": "gru"},
            "GRU over one time step: the recurrent weights have no effect, so this is a gated "
            "dense layer of 2048 units.",
        ),
        (
            {"kind": "birnn", "units": 8, "fc": 4},
            "Bidirectional RNN over one time step: the recurrent weights have no effect, so this "
            "is a dense tanh layer of 8 units, then a hidden layer of 4 units.",
        ),
        (
            {"kind": "lstm", "units": 8, "sequence": "rows"},
            "LSTM over the rows of the feature map, top to bottom: a recurrent layer of 8 units.",
        ),
    ],
)
def test_describe(options: dict[str, object], sentence: str) -> None:
    assert describe(HeadSpec(**options)) == sentence
