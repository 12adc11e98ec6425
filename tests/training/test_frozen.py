"""The frozen backbones of a run: one file for all folds and members, complete without the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.frozen_runs import PROBE, frozen_run

from threefold.errors import RunError
from threefold.models import member as members
from threefold.recipe.schema import MemberSpec
from threefold.training.features.frozen import (
    frozen_backbone,
    frozen_backbone_path,
    load_frozen_backbone,
    save_frozen_backbone,
)
from threefold.training.run import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return frozen_run(tmp_path_factory.mktemp("frozen"))


def spec_of(**changes: object) -> MemberSpec:
    return MemberSpec.model_validate({**PROBE, **changes})


def test_folds_and_members_share_one_file(run: Run) -> None:
    files = sorted(path.name for path in (run.dir / "backbones").iterdir())

    path = frozen_backbone_path(run.folder, spec_of())
    assert files == [path.with_suffix(".json").name, path.name]
    for job in run.jobs:
        head = load_file(run.folder.job_folder(job) / "weights.safetensors")
        assert head
        assert all(name.startswith("head.") for name in head)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"name": "other", "head": {"kind": "mlp"}, "img_size": 64}, True),
        ({"backbone": "test_efficientnet"}, False),
        ({"weights": "x.safetensors"}, False),
    ],
)
def test_the_key_depends_on_backbone_and_weights(
    run: Run, change: dict[str, Any], same: bool
) -> None:
    path = frozen_backbone_path(run.folder, spec_of(**change))

    assert (path == frozen_backbone_path(run.folder, spec_of())) is same


def test_token_grids_of_two_sizes_are_two_backbones(run: Run) -> None:
    paths = {
        frozen_backbone_path(run.folder, spec_of(backbone="vit_tiny_patch16_224", img_size=size))
        for size in (64, 96)
    }

    assert len(paths) == 2


def test_loading_needs_neither_hub_nor_package(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # The recipe asks for pretrained weights, and there is nothing to get them from.
    spec = spec_of(name="lite", backbone="tf_efficientnet_lite0", weights="pretrained")
    saved = members.create_backbone(spec, pretrained=False)
    save_frozen_backbone(run.folder, spec, saved)
    monkeypatch.setattr(members, "load_package", None)

    loaded = load_frozen_backbone(run.folder, spec)

    expected = saved.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_member_is_the_backbone_and_the_head_of_its_fold(run: Run) -> None:
    pixels = 255 * torch.rand(2, 3, 32, 32)
    for name in ("probe", "gated"):
        spec = run.recipe.member(name)
        first, second = (run.load_member(spec, fold, 3) for fold in (0, 1))
        head = load_file(run.dir / "jobs" / name / "fold1/head/weights.safetensors")

        state = second.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in head.items())
        backbone = load_frozen_backbone(run.folder, spec).state_dict()
        assert all(torch.equal(state[f"backbone.{key}"], t) for key, t in backbone.items())
        with torch.no_grad():
            assert not torch.equal(first(pixels), second(pixels))


def test_random_weights_are_those_of_the_seed(run: Run, tmp_path: Path) -> None:
    again = frozen_run(tmp_path)
    torch.manual_seed(99)

    weights = [frozen_backbone(r.folder, spec_of()).state_dict() for r in (run, again)]

    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_damaged_backbone_is_found_and_can_be_restored(tmp_path: Path) -> None:
    run = frozen_run(tmp_path)
    spec = run.recipe.member("probe")
    path, backbone = frozen_backbone_path(run.folder, spec), load_frozen_backbone(run.folder, spec)
    content = path.read_bytes()
    for damage in (content[:-4] + b"abcd", content[:100]):
        path.write_bytes(damage)

        with pytest.raises(RunError, match="frozen backbone is missing or damaged"):
            run.load_member(spec, 0, 3)

        path.unlink()  # as the error says
        with pytest.raises(RunError, match="frozen backbone is missing or damaged"):
            load_frozen_backbone(run.folder, spec)
        assert isinstance(run.load_member(spec, 0, 3), members.Member)
        assert path.read_bytes() == content
    path.write_bytes(b"")
    save_frozen_backbone(run.folder, spec, backbone)
    assert path.read_bytes() == content


def test_other_weights_under_the_same_key_are_refused(tmp_path: Path) -> None:
    run = frozen_run(tmp_path)
    spec = run.recipe.member("probe")
    other = load_frozen_backbone(run.folder, spec)
    next(other.parameters()).data += 1

    with pytest.raises(RunError, match="have changed since the run began"):
        save_frozen_backbone(run.folder, spec, other)


def test_a_head_of_another_kind_is_refused(tmp_path: Path) -> None:
    run = frozen_run(tmp_path)
    probe, gated = (run.folder.job_folder(run.last_job(n, 0)) for n in ("probe", "gated"))
    (probe / "weights.safetensors").write_bytes((gated / "weights.safetensors").read_bytes())
    run.folder.finish_job(run.last_job("probe", 0), 0.0)

    with pytest.raises(RunError, match="cannot load weights"):
        run.load_member(run.recipe.member("probe"), 0, 3)
