"""Which executor a run has."""

from __future__ import annotations

from threefold.errors import RecipeError
from threefold.training.distributed.ranks import current_ranks
from threefold.training.executors.base import Executor
from threefold.training.executors.devices import count_devices
from threefold.training.executors.local import LocalExecutor
from threefold.training.executors.processes import ProcessExecutor
from threefold.training.run import Run


def make_executor(run: Run) -> Executor:
    """Return the executor that a run asks for.

    Raises:
        ThreefoldError: it is not available here.
    """
    if run.execution.executor == "ray":
        from threefold.training.executors.ray_executor import RayExecutor

        return RayExecutor(run.execution.address)
    train, wanted = run.recipe.train, run.execution.devices
    count = count_devices(train.devices if wanted is None else wanted, train.device)
    if count > 1 and current_ranks().world_size > 1:
        raise RecipeError(
            "either several processes train one network, or each trains one of several",
            where="train.devices",
            got=f"{count} devices in a group of {current_ranks().world_size} processes",
            fix="leave out --devices (train.devices = 1), or --processes and torchrun",
        )
    return LocalExecutor() if count == 1 else ProcessExecutor(count, train.device)
