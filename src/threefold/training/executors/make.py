"""Which executor a run has."""

from __future__ import annotations

from threefold.training.executors.base import Executor
from threefold.training.executors.local import LocalExecutor
from threefold.training.run import Run


def make_executor(run: Run) -> Executor:
    """Return the executor that a run asks for.

    Raises:
        ThreefoldError: it is not available here.
    """
    if run.execution.executor == "ray":
        from threefold.training.executors.ray_executor import RayExecutor

        return RayExecutor(run.execution.address)
    return LocalExecutor()
