"""The processes that train one member together: what they agree on, and what they gather.

torchrun starts them. Rank 0 is the process that plans, decides and writes; the others do what it
sends them (`follow`). Everything is sent by torch.distributed within the group: gradients by NCCL
between GPUs and by gloo between processors, all else by gloo.
"""

from __future__ import annotations

import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Final, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from threefold.errors import RecipeError, RunError, ThreefoldError
from threefold.machine import is_one_of_several
from threefold.models.pipeline import pick_device
from threefold.training.distributed.sharing import Share, share_batch, share_rows
from threefold.training.provenance import stable_seed

T = TypeVar("T")

LONGEST_WAIT: Final = timedelta(days=30)
"""How long the other ranks wait while rank 0 works alone; a rank that ends is noticed at once."""

_FAILED: Final = "threefold/failed"
"""Key of the group's store: rank 0 has ended with an error of its own."""


class Stopped(KeyboardInterrupt):
    """Rank 0 was told to stop, and has saved its state."""


class Ranks:
    """A process by itself, which agrees with nobody and has a share of nothing.

    Attributes:
        rank: number of this process, 0 for the one that decides and writes.
        world_size: number of processes.
    """

    rank = 0
    world_size = 1

    def decide(self, choose: Callable[[], T]) -> T:
        """Return what `choose` returns on rank 0, the only one that calls it."""
        return choose()

    def is_true(self, condition: Callable[[], bool]) -> bool:
        """Decide about a condition; cheaper than `decide`."""
        return condition()

    def total(self, value: float) -> float:
        """Add the values of all ranks."""
        return value

    def share(self, images: int) -> Share | None:
        """Return this rank's part of a micro-batch; None = all of it."""
        return None

    def gather(self, count: int, answer: Callable[[slice], np.ndarray]) -> np.ndarray:
        """Let each rank answer its part of `count` rows; returns the answers to all, in order."""
        return answer(slice(0, count))

    def collect(self, value: T) -> list[T]:
        """Return the values of all ranks on rank 0, and none on the others."""
        return [value]

    def wrap(self, network: nn.Module) -> nn.Module:
        """Return a network whose backward pass averages the gradients of all ranks."""
        return network

    def keep_gradients(self, network: nn.Module, keep: bool) -> AbstractContextManager[None]:
        """Leave the gradients of a pass that is not a step's last one where they are."""
        return nullcontext()

    def average_statistics(self, member: nn.Module, parts: Sequence[int]) -> None:
        """Average the running statistics of norms over ranks, weighted by their images."""

    def begin_step(self, seed: int, step: int) -> None:
        """Give each rank noise and dropout of its own, which depend on nothing else."""


_current = Ranks()


def current_ranks() -> Ranks:
    """Return the group that this process has joined."""
    return _current


class RankGroup(Ranks):
    """The processes of torch.distributed.

    Args:
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # torch's stubs also have the number of a group that this process is not in.
        self._control: Any = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def decide(self, choose: Callable[[], T]) -> T:
        """Return what `choose` returns on rank 0, the only one that calls it."""
        return self.broadcast(choose() if self.rank == 0 else cast("T", None))

    def is_true(self, condition: Callable[[], bool]) -> bool:
        """Decide about a condition; cheaper than `decide`."""
        answer = torch.tensor([self.rank == 0 and condition()], dtype=torch.uint8)
        dist.broadcast(answer, src=0, group=self._control)
        return bool(answer)

    def total(self, value: float) -> float:
        """Add the values of all ranks."""
        tensor = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(tensor, group=self._control)
        return float(tensor)

    def share(self, images: int) -> Share:
        """Return this rank's part of a micro-batch."""
        return share_batch(images, self.rank, self.world_size)

    def gather(self, count: int, answer: Callable[[slice], np.ndarray]) -> np.ndarray:
        """Let each rank answer its part of `count` rows; returns the answers to all, in order."""
        # All answer as many rows: a sharded network needs all ranks in each of its batches.
        size = -(-count // self.world_size)
        shares = [share_rows(count, rank, self.world_size) for rank in range(self.world_size)]
        starts = [min(share.start, count - size) for share in shares]
        start = starts[self.rank]
        part = torch.from_numpy(answer(slice(start, start + size)))
        parts = [torch.empty_like(part) for _ in shares]
        dist.all_gather(parts, part, group=self._control)
        own = [
            answers.numpy()[share.start - start : share.stop - start]
            for answers, share, start in zip(parts, shares, starts, strict=True)
        ]
        return np.concatenate(own)

    def collect(self, value: T) -> list[T]:
        """Return the values of all ranks on rank 0, and none on the others."""
        values: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._control)
        return values or []

    def wrap(self, network: nn.Module) -> nn.Module:
        """Return a network whose backward pass averages the gradients of all ranks.

        Buffers stay as they are: `average_statistics` cares for them. Looking for unused parameters
        also keeps torch from changing the order of sums after the first step, so that a resumed
        stage has the same bits.
        """
        with warnings.catch_warnings():  # torch 2.15 renames broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                network,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
                find_unused_parameters=True,
                init_sync=False,
            )

    def keep_gradients(self, network: nn.Module, keep: bool) -> AbstractContextManager[None]:
        """Leave the gradients of a pass that is not a step's last one where they are."""
        if keep and isinstance(network, DistributedDataParallel):
            return cast("AbstractContextManager[None]", network.no_sync())
        return nullcontext()

    def average_statistics(self, member: nn.Module, parts: Sequence[int]) -> None:
        """Average the running statistics of norms over ranks, weighted by their images.

        Args:
            member: its norms in training mode have normalized by the statistics of this rank.
            parts: images of each micro-batch of the step.
        """
        shares = map(self.share, parts)
        images = sum(0 if share.idle else len(share.positions) for share in shares)
        norms: list[Any] = [
            module
            for module in member.modules()
            if module.training and getattr(module, "running_mean", None) is not None
        ]
        buffers = [part for norm in norms for part in (norm.running_mean, norm.running_var)]
        if not buffers:
            return
        flat = torch.cat([buffer.flatten() for buffer in buffers]) * images
        everything = torch.cat([flat, flat.new_tensor([images])])
        dist.all_reduce(everything)
        means = everything[:-1] / everything[-1]
        sizes = [buffer.numel() for buffer in buffers]
        for buffer, mean in zip(buffers, torch.split(means, sizes), strict=True):
            buffer.copy_(mean.view_as(buffer))

    def begin_step(self, seed: int, step: int) -> None:
        """Give each rank noise and dropout of its own, which depend on nothing else."""
        torch.manual_seed(stable_seed(seed, "step", step, "rank", self.rank))

    # What rank 0 lets the others do

    def send(self, command: str, *values: object) -> None:
        """Let the other ranks run a command, see `follow`. Only rank 0 sends."""
        self.broadcast((command, values))

    def receive(self) -> tuple[str, tuple[Any, ...]]:
        """Wait for a command of rank 0."""
        return self.broadcast(("", ()))


@contextmanager
def join_ranks(device_name: str) -> Iterator[Ranks]:
    """Join the group of processes that torchrun has started; without it, stay alone.

    Args:
        device_name: `train.device` of the recipe.

    Raises:
        RunError: another process of the group has ended.
        RecipeError: the processes cannot train on that device.
    """
    global _current
    if not is_one_of_several():
        yield _current
        return
    if os.environ["RANK"] != "0":
        _ignore_signals()
    device = _own_device(device_name)
    store, rank, world_size = next(rendezvous("env://"))
    try:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        _current = group = RankGroup(device)
        yield group
        if rank == 0:
            group.send("end")
        dist.destroy_process_group()
    except ThreefoldError:
        if rank == 0:
            store.set(_FAILED, "1")
        elif _has_failed(store):  # its message says what is wrong
            raise SystemExit(1) from None
        raise
    except Stopped:
        raise SystemExit(0) from None
    except (RuntimeError, dist.DistError) as error:
        if not _is_lost_peer(error):
            raise
        if rank:  # rank 0 tells what has happened
            raise SystemExit(1) from None
        raise RunError(
            "another process of the group has ended",
            where=f"one of {world_size} processes",
            got=_what_was_lost(error),
            fix="run the same command again, with any number of processes: it goes on from the "
            "state that was saved last",
        ) from None
    finally:
        _current = Ranks()


def _ignore_signals() -> None:
    """Leave the end to rank 0, which saves its state first and then says so."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _own_device(name: str) -> torch.device:
    """Return the device of this process: the GPU of its local rank, or the processor.

    Raises:
        RecipeError: all processes would share one device.
    """
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    if on_gpu and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
        return pick_device("cuda")
    if on_gpu or name not in ("auto", "cpu"):
        raise RecipeError(
            "each process needs a GPU of its own",
            where="train.device",
            expected="cuda, and no more processes than GPUs; or cpu",
            got=f"{name}, {torch.cuda.device_count()} GPUs, local rank {local_rank}",
        )
    return torch.device("cpu")


def _has_failed(store: Any) -> bool:
    """Whether rank 0 has ended with an error, too; it may take it a moment."""
    try:
        store.wait([_FAILED], timedelta(seconds=5))
    except RuntimeError:
        return False
    return True


_LOST = re.compile(r"connection \w+ by|peer|gloo|nccl|tcpstore|broken pipe", re.IGNORECASE)
"""What torch.distributed says where a process is gone."""


def _what_was_lost(error: BaseException) -> str:
    """Say what torch.distributed has noticed, without the places in its source."""
    text = " ".join(str(error).split())
    match = re.search(r"connection \w+ by (remote )?peer", text, re.IGNORECASE)
    return match[0] if match else text[:120]


def _is_lost_peer(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or bool(_LOST.search(str(error)))
