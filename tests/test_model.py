"""Members: weights land where they belong, normalisation is inside, freezing does what it says."""

from __future__ import annotations

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
from threefold.models__member import (
    PACKAGED,
    build_member,
    load_in_order,
    load_weights,
    save_weights,
)
from threefold.models__resize import resize_square
from threefold.recipe_schema import HeadSpec, MemberSpec, StageSpec
from threefold.training__optimizers import parameter_groups, set_trainable, train_mode

# What two photographs that come with libraries show, as numbers of ImageNet's 1,000 classes.
PHOTOGRAPHS = {"china.jpg": 698, "grace_hopper.jpg": 652}  # palace; military uniform
TINY = MemberSpec(name="tiny", backbone="test_efficientnet", weights="none", img_size=32)


def package_state(architecture: str) -> dict[str, torch.Tensor]:
    module = __import__(PACKAGED[architecture])
    path = next(Path(module.__path__[0]).glob("models/*.pth"))
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return state


def photograph(name: str) -> torch.Tensor:
    """uint8 (1, h, w, 3)."""
    pixels = (
        load_sample_image(name)
        if name == "china.jpg"
        else np.asarray(Image.open(str(get_sample_data(name, asfileobj=False))).convert("RGB"))
    )
    return torch.from_numpy(pixels.copy())[None]


def answers(architecture: str, state: dict[str, torch.Tensor]) -> dict[str, int]:
    """What the network sees in each photograph."""
    network = timm.create_model(architecture).eval()
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    config = timm.data.resolve_model_data_config(network)
    mean, std = (255 * torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    found = {}
    for name in PHOTOGRAPHS:
        pixels = resize_square(photograph(name), config["input_size"][1], "crop")
        with torch.inference_mode():
            found[name] = int(network((pixels - mean) / std).argmax())
    return found


@pytest.mark.parametrize("architecture", PACKAGED)
def test_packaged_weights_see_what_photographs_show(architecture: str) -> None:
    assert answers(architecture, package_state(architecture)) == PHOTOGRAPHS


@pytest.mark.parametrize("architecture", PACKAGED)
def test_two_swapped_tensors_are_noticed_by_the_photographs(architecture: str) -> None:
    state = package_state(architecture)
    a, b = "_blocks.2._expand_conv.weight", "_blocks.3._expand_conv.weight"
    state[a], state[b] = state[b], state[a]
    assert answers(architecture, state) != PHOTOGRAPHS


def test_the_member_has_the_packaged_weights() -> None:
    member = build_member(
        MemberSpec(name="m", backbone="tf_efficientnet_lite0.in1k", img_size=32), 5
    )
    source = list(package_state("tf_efficientnet_lite0").values())
    target = list(member.backbone.state_dict().values())
    assert len(target) == len(source) - 2 == 294
    assert all(torch.equal(a, b) for a, b in zip(target, source, strict=False))
    with pytest.raises(
        RecipeError, match=r"conv_stem.weight.*expected \(32, 3, 3, 3\), got \(32,\)"
    ):
        load_in_order(member.backbone, dict(enumerate([*source[1:], source[0]])))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="expected 294 tensors, got 293"):
        load_in_order(member.backbone, dict(enumerate(source[1:])))  # type: ignore[arg-type]


def test_normalisation_is_the_weights_own_and_inside() -> None:
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
    spec = MemberSpec(
        name="m",
        backbone=backbone,
        weights="none",
        img_size=64,
        head=HeadSpec(kind="bilstm", units=8, sequence=sequence),
    )  # type: ignore[arg-type]
    member = build_member(spec, 3)
    logits = member(torch.rand(2, 3, 64, 64) * 255)
    logits.sum().backward()
    assert logits.shape == (2, 3)
    assert all(p.grad is not None for p in member.head.parameters())


def test_an_unknown_backbone_names_near_ones() -> None:
    with pytest.raises(
        RecipeError, match=r"unknown backbone: member m.*efficientnet_b9.*list backbones"
    ):
        build_member(MemberSpec(name="m", backbone="efficientnet_b9"), 2)


def test_without_a_hub_the_error_names_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
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
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    member = build_member(TINY.model_copy(update={"weights": str(path)}), 3)
    assert torch.equal(member.backbone.state_dict()["conv_stem.weight"], state["conv_stem.weight"])


def test_local_weights_that_cannot_be_used(tmp_path: Path) -> None:
    def build(path: Path) -> None:
        build_member(TINY.model_copy(update={"weights": str(path)}), 3)

    with pytest.raises(RecipeError, match="cannot read the weights file"):
        build(tmp_path / "none.pth")
    torch.save({"hook": np.array([print], dtype=object)}, tmp_path / "evil.pth")
    with pytest.raises(RecipeError, match="cannot read the weights file"):
        build(tmp_path / "evil.pth")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(RecipeError, match=r"do not fit the backbone.*missing"):
        build(tmp_path / "other.safetensors")


def test_freezing_by_regex_and_frozen_norms_stay_still() -> None:
    member = build_member(TINY, 3)
    names = set_trainable(member, StageSpec(name="s", epochs=1, lr=1, frozen="backbone"))
    assert names
    assert all(name.startswith("head.") for name in names)
    before = {name: value.clone() for name, value in member.backbone.state_dict().items()}
    train_mode(member)
    member(torch.rand(4, 3, 32, 32) * 255)
    assert all(
        torch.equal(before[name], value) for name, value in member.backbone.state_dict().items()
    )
    with pytest.raises(RecipeError, match="nothing to train"):
        set_trainable(member, StageSpec(name="s", epochs=1, lr=1, trainable="nowhere"))


def test_layer_decay_lowers_the_rate_towards_the_input() -> None:
    member = build_member(TINY, 3)
    groups = list(parameter_groups(member, 1.0, 0.5))
    scales = [group["scale"] for group in groups]
    assert scales == sorted(scales)
    assert scales[-1] == 1.0
    assert sum(len(group["params"]) for group in groups) == len(list(member.parameters()))
    assert any(p is member.head.classifier.weight for p in groups[-1]["params"])


def test_weights_round_trip_and_damage_is_named(tmp_path: Path) -> None:
    member, other = build_member(TINY, 3), build_member(TINY, 3)
    save_weights(member.state_dict(), tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert all(
        torch.equal(a, b)
        for a, b in zip(member.state_dict().values(), other.state_dict().values(), strict=True)
    )
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(RunError, match="cannot load weights"):
        load_weights(other, tmp_path / "w.safetensors")
