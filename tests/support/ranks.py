"""Run functions of tests in several processes that train together, as torchrun would."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT


def start_ranks(world_size: int, *command: str) -> list[subprocess.Popen[str]]:
    """Start a command once for each rank, with the variables that torchrun would set."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    group = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                **group,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": paths,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def run_on_ranks(world_size: int, function: str, folder: Path) -> None:
    """Call `function(folder)`, given as module:name, on rank 0, and let the others follow.

    Importing torch takes a busy machine minutes.
    """
    command = [sys.executable, "-W", "error", "-m", "support.ranks", function, str(folder)]
    processes = start_ranks(world_size, *command)
    outputs = [process.communicate(timeout=600) for process in processes]
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, f"{out}\n{err}"


def main() -> None:
    """What each process runs."""
    import torch

    from threefold.training.distributed.follow import follow
    from threefold.training.distributed.ranks import join_ranks

    module, _, name = sys.argv[1].partition(":")
    torch.set_num_threads(1)
    with join_ranks("cpu") as ranks:
        if ranks.rank:
            follow(ranks)
        else:
            getattr(importlib.import_module(module), name)(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
