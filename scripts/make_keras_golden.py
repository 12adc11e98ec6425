"""Write tests/golden/keras_heads.npz: Keras's outputs of small recurrent layers and of Adam.

The tests need only the file. To write it again, in an environment with Keras 3:

    KERAS_BACKEND=torch python scripts/make_keras_golden.py
"""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import numpy as np

TARGET = Path(__file__).parents[1] / "tests" / "golden" / "keras_heads.npz"
BATCH, STEPS, FEATURES, UNITS = 5, 4, 6, 4
ADAM = {"lr": 0.05, "epochs": 3, "steps": 20}


@keras.saving.register_keras_serializable("threefold")
def keras_2_hard_sigmoid(x):
    """Compute clip(0.2 x + 0.5, 0, 1), the hard sigmoid of Keras 2.

    Under the name hard_sigmoid, Bidirectional would copy the layer with Keras 3's x / 6 + 0.5.
    """
    return keras.ops.clip(0.2 * x + 0.5, 0.0, 1.0)


def layers(gate: str | Callable) -> dict[str, keras.layers.Layer]:
    """Make one of each recurrent layer, with `gate` as the activation of its gates."""
    return {
        "rnn": keras.layers.SimpleRNN(UNITS),
        "gru_after": keras.layers.GRU(UNITS, recurrent_activation=gate, reset_after=True),
        "gru_before": keras.layers.GRU(UNITS, recurrent_activation=gate, reset_after=False),
        "lstm": keras.layers.LSTM(UNITS, recurrent_activation=gate),
        "bilstm": keras.layers.Bidirectional(keras.layers.LSTM(UNITS, recurrent_activation=gate)),
    }


def run_layers(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Compute last outputs for one and several time steps (hard sigmoid: one step only).

    Accurate to about 1e-7: on torch, Keras multiplies matrices in float32 whatever the floatx.

    Returns:
        Inputs, weights and outputs.
    """
    inputs = {
        "one": rng.normal(size=(BATCH, 1, FEATURES)),
        "many": rng.normal(size=(BATCH, STEPS, FEATURES)),
    }
    arrays = {f"inputs/{name}": values for name, values in inputs.items()}
    for gate_name, gate in (("sigmoid", "sigmoid"), ("hard", keras_2_hard_sigmoid)):
        for name, layer in layers(gate).items():
            layer.build((None, None, FEATURES))
            # Wide enough for some gates to leave the linear part of the hard sigmoid.
            layer.set_weights(
                [rng.normal(scale=1.5, size=weight.shape) for weight in layer.weights]
            )
            key = f"{gate_name}/{name}"
            arrays |= {f"{key}/weight{i}": weight for i, weight in enumerate(layer.get_weights())}
            for length in ("one", "many") if gate_name == "sigmoid" else ("one",):
                arrays[f"{key}/output_{length}"] = keras.ops.convert_to_numpy(layer(inputs[length]))
    return arrays


def run_adam(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Run Adam with the learning rate lr / (1 + lr / epochs * step).

    Returns:
        The start, the gradients, and the parameters after each step.
    """
    # Gradients from 1e-8 to 1, so that the place of epsilon in the formula matters.
    gradients = rng.normal(size=(ADAM["steps"], 3, 4)) * 10.0 ** rng.uniform(-8, 0, size=(3, 4))
    start = rng.normal(size=(3, 4))
    rate = keras.optimizers.schedules.InverseTimeDecay(
        ADAM["lr"], decay_steps=1, decay_rate=ADAM["lr"] / ADAM["epochs"]
    )
    optimizer = keras.optimizers.Adam(learning_rate=rate, epsilon=1e-7)
    variable = keras.Variable(start, dtype="float64")
    optimizer.build([variable])
    after = []
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient, dtype="float64")])
        after.append(keras.ops.convert_to_numpy(variable).copy())
    return {"adam/start": start, "adam/gradients": gradients, "adam/after": np.stack(after)} | {
        f"adam/{name}": np.array(value) for name, value in ADAM.items()
    }


def main() -> None:
    """Compute all arrays and write the file."""
    keras.config.set_floatx("float64")
    rng = np.random.default_rng(7)
    arrays = run_layers(rng) | run_adam(rng) | {"keras_version": np.array(keras.__version__)}
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(TARGET, **arrays)
    size = TARGET.stat().st_size
    print(f"{TARGET.name}: {len(arrays)} arrays, {size} bytes, Keras {keras.__version__}")


if __name__ == "__main__":
    main()
