"""Members: weights are in their places, normalisation is inside, freezing follows the regexes."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image

from threefold.errors import RecipeError, RunError
from threefold.models.hub import PACKAGED, load_in_order
from threefold.models.member import Member, build_member, load_weights, save_weights
from threefold.models.resize import resize_square
from threefold.recipe.schema import HeadSpec, MemberSpec, StageSpec, TrainSpec
from threefold.training.steps.optimizers import create_optimizer, set_trainable, train_mode

PHOTOGRAPHS = {"china.jpg": 698, "grace_hopper.jpg": 652}  # palace; military uniform
"""Photographs that come with libraries, and their classes of ImageNet's 1,000."""
TINY = MemberSpec(name="tiny", backbone="test_efficientnet", weights="none", img_size=32)


def package_state(architecture: str) -> dict[str, torch.Tensor]:
    module = importlib.import_module(PACKAGED[architecture])
    path = next(Path(module.__path__[0]).glob("models/*.pth"))
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return state


def photograph(name: str) -> torch.Tensor:
    """uint8 (1, h, w, 3)."""
    if name == "china.jpg":
        pixels = load_sample_image(name)
    else:
        file = str(get_sample_data(name, asfileobj=False))
        pixels = np.asarray(Image.open(file).convert("RGB"))
    return torch.from_numpy(pixels.copy())[None]


def classify(architecture: str, state: dict[str, torch.Tensor]) -> dict[str, int]:
    """The network's class for each photograph."""
    network = timm.create_model(architecture).eval()
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    config = timm.data.resolve_model_data_config(network)
    mean, std = (255 * torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    classes = {}
    for name in PHOTOGRAPHS:
        pixels = resize_square(photograph(name), config["input_size"][1], "crop")
        with torch.inference_mode():
            classes[name] = int(network((pixels - mean) / std).argmax())
    return classes


def build_with_weights(path: Path) -> Member:
    return build_member(TINY.model_copy(update={"weights": str(path)}), 3)


@pytest.mark.parametrize("architecture", PACKAGED)
def test_packaged_weights_recognise_photographs(architecture: str) -> None:
    assert classify(architecture, package_state(architecture)) == PHOTOGRAPHS


@pytest.mark.parametrize("architecture", PACKAGED)
def test_photographs_reveal_two_swapped_tensors(architecture: str) -> None:
    state = package_state(architecture)
    a, b = "_blocks.2._expand_conv.weight", "_blocks.3._expand_conv.weight"
    state[a], state[b] = state[b], state[a]

    assert classify(architecture, state) != PHOTOGRAPHS


def test_a_member_has_the_packaged_weights() -> None:
    spec = MemberSpec(name="m", backbone="tf_efficientnet_lite0.in1k", img_size=32)

    member = build_member(spec, 5)

    source = list(package_state("tf_efficientnet_lite0").values())
    target = list(member.backbone.state_dict().values())
    assert len(target) == len(source) - 2 == 294
    assert all(torch.equal(a, b) for a, b in zip(target, source, strict=False))
    shape = r"conv_stem.weight.*expected \(32, 3, 3, 3\), got \(32,\)"
    with pytest.raises(RecipeError, match=shape):
        load_in_order(member.backbone, dict(enumerate([*source[1:], source[0]])))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="expected 294 tensors, got 293"):
        load_in_order(member.backbone, dict(enumerate(source[1:])))  # type: ignore[arg-type]


def test_normalisation_is_inside_the_member() -> None:
    member = build_member(TINY, 4).eval()
    config = timm.data.resolve_model_data_config(member.backbone)
    pixels = torch.rand(2, 3, 32, 32) * 255

    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    by_hand = member.head(member.backbone((pixels / 255 - mean) / std))

    torch.testing.assert_close(member(pixels), by_hand)


@pytest.mark.parametrize(
    "backbone", ["test_efficientnet", "test_resnet", "test_convnext", "test_vit", "test_mambaout"]
)
@pytest.mark.parametrize("sequence", ["pooled", "rows", "spatial"])
def test_every_family_takes_every_head(backbone: str, sequence: str) -> None:
    head = HeadSpec(kind="bilstm", units=8, sequence=sequence)  # type: ignore[arg-type]
    spec = MemberSpec(name="m", backbone=backbone, weights="none", img_size=64, head=head)
    member = build_member(spec, 3)

    logits = member(torch.rand(2, 3, 64, 64) * 255)
    logits.sum().backward()

    assert logits.shape == (2, 3)
    assert all(p.grad is not None for p in member.head.parameters())


def test_an_unknown_backbone_names_similar_ones() -> None:
    message = r"unknown backbone: member m.*efficientnet_b9.*list backbones.*similar: efficient"

    with pytest.raises(RecipeError, match=message):
        build_member(MemberSpec(name="m", backbone="efficientnet_b9"), 2)


def test_without_a_hub_the_error_names_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    with pytest.raises(RecipeError) as error:
        build_member(MemberSpec(name="m", backbone="resnet18.a1_in1k"), 2)

    for remedy in ("hub", "tf_efficientnet_lite0", "members.m.weights", ".safetensors", "none"):
        assert remedy in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights_load(tmp_path: Path, suffix: str) -> None:
    state = timm.create_model("test_efficientnet", num_classes=7).state_dict()
    path = tmp_path / f"mine{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state}, path)

    member = build_with_weights(path)

    assert torch.equal(member.backbone.state_dict()["conv_stem.weight"], state["conv_stem.weight"])


def test_unusable_local_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"hook": np.array([print], dtype=object)}, tmp_path / "evil.pth")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")

    with pytest.raises(RecipeError, match="cannot read the weights file"):
        build_with_weights(tmp_path / "none.pth")
    with pytest.raises(RecipeError, match="cannot read the weights file"):
        build_with_weights(tmp_path / "evil.pth")
    with pytest.raises(RecipeError, match=r"do not fit the backbone.*missing"):
        build_with_weights(tmp_path / "other.safetensors")


def test_frozen_norms_keep_their_statistics() -> None:
    member = build_member(TINY, 3)
    names = set_trainable(member, StageSpec(name="s", epochs=1, lr=1, frozen="backbone"))
    before = {name: value.clone() for name, value in member.backbone.state_dict().items()}

    train_mode(member)
    member(torch.rand(4, 3, 32, 32) * 255)

    assert names
    assert all(name.startswith("head.") for name in names)
    after = member.backbone.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_a_stage_must_train_something() -> None:
    with pytest.raises(RecipeError, match="nothing to train"):
        set_trainable(
            build_member(TINY, 3), StageSpec(name="s", epochs=1, lr=1, trainable="nowhere")
        )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adam-keras"])
def test_layer_decay_lowers_rates_towards_the_input(optimizer: str) -> None:
    member = build_member(TINY, 3)
    spec = TrainSpec(layer_decay=0.5, optimizer=optimizer)  # type: ignore[arg-type]

    groups = create_optimizer(member, spec, 1.0).param_groups

    scales = [group["lr_scale"] for group in groups]
    assert scales == sorted(scales)
    assert scales[-1] == 1.0
    assert sum(len(group["params"]) for group in groups) == len(list(member.parameters()))
    of_the_head = [
        g for g in groups if any(p is member.head.classifier.weight for p in g["params"])
    ]
    assert [group["lr_scale"] for group in of_the_head] == [1.0]


def test_weights_survive_a_round_trip(tmp_path: Path) -> None:
    member, other = build_member(TINY, 3), build_member(TINY, 3)

    save_weights(member.state_dict(), tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")

    pairs = zip(member.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    member = build_member(TINY, 3)
    save_weights(member.state_dict(), tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[: len(data) // 2])

    with pytest.raises(RunError, match="cannot load weights"):
        load_weights(member, tmp_path / "w.safetensors")
