"""Start the processes that train together on this machine: torchrun's launcher, as a function."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from threefold.errors import RunError
from threefold.machine import usable_cores


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `threefold` with these arguments in several processes, and wait for them.

    Args:
        processes: their number.
        arguments: of the command line.

    Returns:
        The exit code: 0, or that of the first process that failed, which has said why.

    Raises:
        RunError: the process that writes was killed.
    """
    # What ends a process is said below, or by rank 0.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "threefold", *arguments)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return int(failure.exitcode)
        if rank:  # rank 0 has noticed
            return 1
        raise RunError(
            "the process that writes was killed",
            where=f"rank 0 of {processes}, process {failure.pid}",
            got=signal.Signals(-failure.exitcode).name,
            fix="run the same command again: it goes on from the state that was saved last",
        ) from None
    return 0
