"""Several processes that train one member: the same batches, losses and decisions as in one."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.stages import build_tiny, make_task

from threefold.errors import RecipeError
from threefold.models.member import build_member
from threefold.recipe.schema import AugmentSpec, DistillSpec, HeadSpec, MemberSpec, TrainSpec
from threefold.training.distributed import stage
from threefold.training.distributed.fsdp import (
    load_whole_state,
    own_share,
    part_of,
    shard,
    whole,
    whole_state,
)
from threefold.training.distributed.ranks import RankGroup, Ranks, join_ranks
from threefold.training.distributed.sharing import Share, share_batch, share_rows
from threefold.training.pixel_cache import StoredPixels, slice_rows
from threefold.training.steps.batch_augmentation import BatchAugmentation
from threefold.training.steps.losses import BatchLoss


def shares_of(images: int, world_size: int) -> list[Share]:
    return [share_batch(images, rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shares_of_a_batch_are_its_images_once(world_size: int) -> None:
    for images in range(2, 40):
        shares = shares_of(images, world_size)

        counted = [share.positions for share in shares if not share.idle]
        assert np.sort(np.concatenate(counted)).tolist() == list(range(images))
        sizes = [len(positions) for positions in counted]
        assert max(sizes) - min(sizes) <= 2
        assert all(len(share.positions) >= 2 and share.images == images for share in shares)


@pytest.mark.parametrize("images", [2, 7, 12, 33])
def test_images_that_are_mixed_are_on_one_rank(images: int) -> None:
    even = images - images % 2
    for share in shares_of(images, 3):
        paired = share.positions[share.positions < even]

        assert np.array_equal(paired, np.sort(even - 1 - paired))
        assert np.array_equal(share.positions, np.sort(share.positions))


def test_shares_of_rows_follow_each_other() -> None:
    for rows in (0, 1, 2, 7, 24):
        parts = [np.arange(rows)[share_rows(rows, rank, 3)] for rank in range(3)]

        assert np.concatenate(parts).tolist() == list(range(rows))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_slices_of_files_are_rows_in_their_order(tmp_path: Path) -> None:
    squares = np.arange(6 * 2 * 2 * 3, dtype=np.uint8).reshape(6, 2, 2, 3)
    np.save(tmp_path / "a.npy", squares[:4])
    np.save(tmp_path / "b.npy", squares[4:])
    order = np.array([3, 0, 2])
    files = StoredPixels([(tmp_path / "a.npy", order), (tmp_path / "b.npy", np.arange(2))])
    expected = squares[[3, 0, 2, 4, 5]]

    for begin in range(5):
        for end in range(begin + 1, 6):
            part = slice_rows(files, slice(begin, end))

            np.testing.assert_array_equal(part[:], expected[begin:end])
    assert slice_rows(files, slice(0, 5)) is files


def augment(spec: AugmentSpec, images: torch.Tensor, share: Share | None) -> Any:
    """Augment a batch, or a share of it, with the same generators."""
    random.seed(1)
    np.random.seed(1)
    labels = torch.arange(len(images)) % 3
    if share is not None:
        images, labels = images[share.positions], labels[share.positions]
    return BatchAugmentation(spec, 3, 5)(images.clone(), labels, None, share)[:2]


@pytest.mark.parametrize("images", [2, 7, 12])
@pytest.mark.parametrize(
    "changes",
    [
        {"rotation": 20.0, "hflip": True, "channel_shift": 30.0},
        {"policy": "randaugment", "crop": 0.5},
        {"erasing": 0.7, "mixup": 0.5},
        {"cutmix": 1.0},
    ],
)
def test_shares_are_augmented_as_the_batch_is(images: int, changes: dict[str, Any]) -> None:
    spec = AugmentSpec(**changes)
    batch = torch.randint(0, 256, (images, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    whole, classes = augment(spec, batch.float(), None)

    for share in shares_of(images, 3):
        part, own_classes = augment(spec, batch.float(), share)

        torch.testing.assert_close(part, whole[share.positions], rtol=0, atol=1e-4)
        torch.testing.assert_close(own_classes, classes[share.positions])


@pytest.mark.parametrize("world_size", [2, 5])
@pytest.mark.parametrize("kind", ["classes", "soft", "student", "multilabel"])
def test_losses_of_shares_sum_to_that_of_the_batch(kind: str, world_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, generator=generator)
    probs = torch.randn(7, 3, generator=generator).softmax(1)
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    values: dict[str, Any] = {"label_smoothing": 0.1}
    if kind == "multilabel":
        labels = np.eye(3, dtype=np.uint8)[labels]
    else:
        values["class_weights"] = "balanced"
    distill = DistillSpec(run="r", alpha=0.3) if kind == "student" else None
    loss = BatchLoss(TrainSpec(**values), labels, 3, torch.device("cpu"), distill)
    own = probs if kind == "soft" else torch.from_numpy(labels)
    soft = probs if kind == "student" else None

    parts = []
    for share in shares_of(7, world_size):
        at = torch.from_numpy(share.positions)
        whole = loss.whole(labels, own[at], share)
        parts.append(loss(logits[at], own[at], None if soft is None else soft[at], whole))

    torch.testing.assert_close(sum(parts), loss(logits, own, soft))


def test_one_process_agrees_with_itself() -> None:
    with join_ranks("auto") as ranks:
        assert type(ranks) is Ranks
        assert ranks.decide(lambda: "me") == "me"
        assert ranks.total(2.5) == 2.5
        assert ranks.share(8) is None


@pytest.mark.parametrize("device", ["cuda:1", "mps", "cuda"])
def test_processes_do_not_share_an_accelerator(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = {"RANK": "0", "LOCAL_RANK": "77", "WORLD_SIZE": "78", "MASTER_ADDR": "localhost"}
    for name, value in {**group, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(RecipeError, match="each process needs a GPU of its own"):  # noqa: SIM117
        with join_ranks(device):
            pass


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
def test_a_divided_network_is_saved_and_loaded_whole() -> None:
    member, device = build_tiny(), torch.device("cpu")
    divided = shard(copy.deepcopy(member), device, 1)
    doubled = {name: 2 * tensor for name, tensor in member.state_dict().items()}

    saved = {name: tensor.clone() for name, tensor in whole_state(divided).items()}
    load_whole_state(divided, doubled)

    parts = divided.state_dict()
    for name, tensor in member.state_dict().items():
        assert torch.equal(saved[name], tensor)
        assert torch.equal(whole(parts[name]), doubled[name])
        assert type(part_of(tensor, parts[name])) is type(parts[name])
    assert own_share(divided) == 1


@pytest.mark.usefixtures("group_of_one")
def test_blocks_of_a_network_are_gathered_one_by_one() -> None:
    from torch.distributed.fsdp import FSDPModule

    stages = [torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.Linear(9, 9)) for _ in range(2)]
    network = torch.nn.Sequential(torch.nn.Sequential(*stages), torch.nn.Linear(9, 1, bias=False))
    tiny = network[1]  # 9 of 369 weights are above one percent, 1 would not be

    shard(network, torch.device("cpu"), 1)

    units = [module for module in network.modules() if isinstance(module, FSDPModule)]
    assert len(units) == 6
    assert network in units
    assert tiny in units
    assert not any(isinstance(stage, FSDPModule) for stage in network[0])


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("family", ["resnet", "convnext", "efficientnet", "byobnet", "vit"])
def test_divided_networks_have_the_gradients_of_whole_ones(family: str) -> None:
    head = HeadSpec(kind="gru" if family == "resnet" else "linear", noise=0)
    spec = MemberSpec(name="m", backbone=f"test_{family}", weights="none", img_size=96, head=head)
    torch.manual_seed(0)
    member = build_member(spec, 3).eval()
    divided = shard(copy.deepcopy(member), torch.device("cpu"), 1)
    images = 255 * torch.rand(2, 3, 96, 96)

    for network in (member, divided):
        torch.nn.functional.cross_entropy(network(images), torch.tensor([0, 2])).backward()

    for (name, parameter), part in zip(
        member.named_parameters(), divided.parameters(), strict=True
    ):
        assert (parameter.grad is None) == (part.grad is None), name
        if parameter.grad is not None and part.grad is not None:
            torch.testing.assert_close(whole(part.grad), parameter.grad)


def test_batch_norm_is_not_synchronized_on_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    group = RankGroup.__new__(RankGroup)
    group.rank, group.world_size, group.device = 1, 2, torch.device("cpu")
    monkeypatch.setattr(stage, "current_ranks", lambda: group)
    sets = ("train.sync_batchnorm=true", "stages.one.batch_norm=fixed")

    with pytest.raises(RecipeError, match="synchronizes batch norm only between GPUs"):
        stage.share_stage(build_tiny(), make_task(sets[0]))
    task = make_task(*sets)
    assert stage.share_stage(build_tiny(), task) is task  # its statistics are fixed
