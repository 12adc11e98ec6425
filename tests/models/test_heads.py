"""Heads follow the recipe: layers, sequences, starts, exports and descriptions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.recurrent import KERAS_HEADS, RECURRENT_KINDS, from_keras, torch_layer
from torch import nn

from threefold.errors import RecipeError
from threefold.models.heads import GaussianNoise, Head, build_head, describe
from threefold.models.recurrent import OneStepGRU, collapse
from threefold.recipe.schema import HeadSpec


@pytest.mark.parametrize(
    ("kind", "name"), [("rnn", "rnn"), ("gru", "gru_after"), ("lstm", "lstm"), ("bilstm", "bilstm")]
)
def test_heads_over_several_steps_are_keras(kind: str, name: str) -> None:
    layer = from_keras(f"sigmoid/{name}", directions=2 if kind.startswith("bi") else 1)
    units = layer.hidden_size * (2 if kind.startswith("bi") else 1)
    steps = torch.from_numpy(KERAS_HEADS["inputs/many"]).transpose(1, 2)  # (b, c, t)
    for sequence, feature_map in (
        ("rows", torch.stack((steps - 0.5, steps + 0.5), dim=3)),
        ("spatial", steps.unflatten(2, (2, 2))),
    ):
        head = build_head(HeadSpec(kind=kind, units=units, sequence=sequence), 6, units)
        head.double().eval()
        head.recurrent.load_state_dict(layer.state_dict())
        with torch.no_grad():
            head.classifier.weight.copy_(torch.eye(units))
            head.classifier.bias.zero_()

        output = head(feature_map).detach().numpy()

        np.testing.assert_allclose(
            output, KERAS_HEADS[f"sigmoid/{name}/output_many"], rtol=0, atol=1e-6
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

    logits = head(torch.randn(2, 5, 4, 3) if head.takes_map else torch.randn(2, 5))
    logits.sum().backward()

    assert head.takes_map == (sequence != "pooled")
    assert logits.shape == (2, 3)
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


def test_noise_acts_in_training_only() -> None:
    x = torch.zeros(20_000, 1)
    noise = GaussianNoise(0.1)

    assert abs(float(noise(x).std()) - 0.1) < 0.005
    assert noise.eval()(x) is x
    assert GaussianNoise(0.0)(x) is x


def test_noise_comes_before_the_fully_connected_layer() -> None:
    head = build_head(HeadSpec(kind="rnn", units=4, fc=2), 5, 3)
    head.noise.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))

    logits = head(torch.randn(2, 5))

    torch.testing.assert_close(logits, head.classifier(head.fc(torch.zeros(2, 4))))


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
    for (name, ours), theirs in zip(step.named_parameters(), full.parameters(), strict=True):
        gates = len(ours) // units
        rows, expected = (p.detach().view(gates, -1) for p in (ours, theirs))
        for a, b in zip(rows, expected, strict=True):
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
