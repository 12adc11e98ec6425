"""Recurrent layers of torch, with fresh weights or with those of Keras."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from support.paths import GOLDEN
from threefold.models.recurrent import OneStepGRU

KERAS_HEADS = np.load(GOLDEN / "keras_heads.npz", allow_pickle=False)
RECURRENT_KINDS = ("rnn", "gru", "lstm", "birnn", "bigru", "bilstm")
TORCH_LAYERS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
# Keras orders the gates of a GRU as z r h, those of an LSTM as i f c o.
KERAS_TO_TORCH = {"rnn": [0], "gru": [1, 0, 2], "lstm": [0, 1, 2, 3]}


def torch_layer(
    kind: str, features: int = 5, units: int = 3, **options: object
) -> nn.RNN | nn.GRU | nn.LSTM:
    """Build torch's recurrent layer with the same fresh weights every time."""
    torch.manual_seed(3)
    return TORCH_LAYERS[kind.removeprefix("bi")](
        features, units, batch_first=True, bidirectional=kind.startswith("bi"), **options
    )


def from_keras(key: str, directions: int = 1) -> nn.RNN | nn.GRU | nn.LSTM | OneStepGRU:
    """Build torch's layer, or the live part of the GRU that torch lacks, from golden weights."""
    cell = key.split("/")[1].split("_")[0].removeprefix("bi")
    weights = [torch.from_numpy(KERAS_HEADS[f"{key}/weight{i}"]) for i in range(3 * directions)]
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
