"""Local weights: the forms that training programs write, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from threefold.errors import RecipeError
from threefold.models.local_weights import load_local

State = dict[str, Tensor]


def network() -> Any:
    return timm.create_model("test_resnet", num_classes=0)


@pytest.fixture(scope="module")
def state() -> State:
    """Weights of a network with a classifier, none of them by chance those of another one."""
    torch.manual_seed(5)
    return dict(timm.create_model("test_resnet", num_classes=7).state_dict())


def below(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


FORMS: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "half": lambda s: {name: tensor.half() for name, tensor in s.items()},
    "state_dict": lambda s: {"epoch": 3, "state_dict": s},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
    "module": lambda s: below("module.", s),
    "compiled": lambda s: {"model": below("module._orig_mod.", s)},
    "lightning": lambda s: {"state_dict": below("model.", s), "hparams": {"lr": 0.1}},
    "ema": lambda s: {"state_dict": other(s), "state_dict_ema": s},
    "ema table": lambda s: {"model": other(s), "ema": {"module": below("module.", s)}},
    "twice": lambda s: below("net.", s) | below("copy.", s),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_found_in_every_form(form: str, state: State, tmp_path: Path) -> None:
    torch.save(FORMS[form](state), tmp_path / "w.pth")
    backbone = network()

    load_local(backbone, tmp_path / "w.pth")

    tolerance = 1e-3 if form == "half" else 0.0
    for name, tensor in backbone.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=tolerance, atol=tolerance)


def with_nan(state: State) -> State:
    spoilt = state["conv1.0.weight"].clone()
    spoilt[0, 0, 0, 0] = torch.nan
    return state | {"conv1.0.weight": spoilt}


REFUSED: dict[str, tuple[Callable[[State], Any], str]] = {
    "list": (lambda s: list(s.values()), r"no tensors by name, but a list; fix"),
    "tensor": (lambda s: s["conv1.0.weight"], r"no tensors by name, but a Tensor"),
    "empty": (lambda s: {"epoch": 3, "args": "x"}, r"but a dict with epoch, args"),
    "foreign": (
        lambda s: {"a.b": torch.ones(2)},
        r"expected tensors conv1\.0\.weight.*tensors a\.b",
    ),
    "one short": (
        lambda s: below("m.", {n: t for n, t in s.items() if n != "conv1.0.weight"}),
        r"expected conv1\.0\.weight of shape \(.*it is missing; 1 of .* in the file's m\.\*",
    ),
    "other shape": (
        lambda s: s | {"conv1.0.weight": torch.ones(2, 2)},
        r"expected conv1\.0\.weight of shape .*got shape \(2, 2\)",
    ),
    "two networks": (
        lambda s: below("student.", s) | below("teacher.", other(s)),
        r"several networks.*student\.\*, teacher\.\*",
    ),
    "nan": (with_nan, r"not finite.*NaN or infinity in conv1\.0\.weight"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_files_are_one_clear_line(what: str, state: State, tmp_path: Path) -> None:
    make, message = REFUSED[what]
    torch.save(make(state), tmp_path / "w.pth")
    backbone = network()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}

    with pytest.raises(RecipeError, match=message) as error:
        load_local(backbone, tmp_path / "w.pth")

    assert "\n" not in str(error.value)
    after = backbone.state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_pickle_is_not_run_and_nobody_advises_to(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"state_dict": Code()}, tmp_path / "w.pth")

    with pytest.raises(RecipeError, match=r"got something else than tensors; fix: give a state"):
        load_local(network(), tmp_path / "w.pth")

    assert not (tmp_path / "made").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pth")

    with pytest.raises(RecipeError, match="not a regular file"):
        load_local(network(), tmp_path / "w.pth")
