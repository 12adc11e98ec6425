"""The main program of a worker process: does the jobs that its parent names, one at a time.

`python -m threefold.training.executors.worker_process DESCRIPTOR THREADS [CORE ...]`

The descriptor is that of a connection to the parent, through which both send tuples. When the
connection ends because the parent has died, the worker saves the state of its job and ends, too.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, Final

from threefold.errors import ThreefoldError, error_texts, is_out_of_memory, out_of_memory
from threefold.lazy import importing_for_good

if TYPE_CHECKING:
    from threefold.recipe.recipe import Job
    from threefold.training.executors.worker import Worker
    from threefold.training.progress.watcher import Watcher

GRACE: Final = 5.0
"""Seconds in which a job that is stopped can save its state."""


class _Stop:
    """Ends this process, from its main thread, after the state of its job has been saved."""

    def __init__(self) -> None:
        self.watcher: Watcher | None = None
        signal.signal(signal.SIGTERM, self._receive)
        for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):  # the parent receives them, too
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)

    def ask(self) -> None:
        """Ask for the end; from any thread."""
        timer = threading.Timer(GRACE, os._exit, [128 + signal.SIGTERM])
        timer.daemon = True
        timer.start()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _receive(self, *_: object) -> None:
        watcher = self.watcher
        if watcher is not None and watcher.defers_stop:
            watcher.stop = watcher.stop or KeyboardInterrupt()
        else:
            raise KeyboardInterrupt


def main() -> None:
    """Connect to the parent, open the run, and do jobs until the parent has no more."""
    descriptor, threads, *cores = map(int, sys.argv[1:])
    os.set_inheritable(descriptor, False)
    if cores:
        with suppress(OSError):  # a core that was taken away meanwhile
            os.sched_setaffinity(0, cores)
    stop = _Stop()
    with Connection(descriptor) as connection, suppress(KeyboardInterrupt, BrokenPipeError):
        _serve(connection, stop, threads)


def _serve(connection: Connection[Any, Any], stop: _Stop, threads: int) -> None:
    tasks: queue.SimpleQueue[tuple[Job, float]] = queue.SimpleQueue()
    order = connection.recv_bytes()

    def listen() -> None:
        with suppress(EOFError, OSError):
            while task := connection.recv():
                tasks.put(task)
        stop.ask()

    # Before anything slow is imported, so that a worker never outlives its parent for long.
    threading.Thread(target=listen, daemon=True).start()
    try:
        worker = _open(order, connection, stop, threads)
    except Exception as error:
        connection.send(_describe(error))
        return
    connection.send(("ready",))
    while True:
        connection.send(_do(worker, *tasks.get()))


def _open(order: bytes, connection: Connection[Any, Any], stop: _Stop, threads: int) -> Worker:
    """Open the run that the parent has ordered."""
    with importing_for_good():
        import torch

        from threefold.training.executors.relay import RelayWatcher
        from threefold.training.executors.worker import open_worker

    torch.set_num_threads(threads)
    stop.watcher = watcher = RelayWatcher(lambda report: connection.send(("report", report)))
    work_order, sources = ForkingPickler.loads(order)
    return open_worker(work_order, sources, watcher)


def _do(worker: Worker, job: Job, seconds: float) -> tuple[str, ...]:
    """Do a job; returns the message that says how it ended."""
    try:
        return "over", worker.run(job, seconds)
    except Exception as error:
        return _describe(error)


def _describe(error: Exception) -> tuple[str, ...]:
    """The message about an error: its class and its parts."""
    if not isinstance(error, ThreefoldError) and is_out_of_memory(error):
        error = out_of_memory("a worker", error)
    if isinstance(error, ThreefoldError):
        return "error", *error_texts(error)
    traceback.print_exception(error)  # in the worker's log
    got = f"{type(error).__name__}: {error}"
    return "error", "RunError", "a fault of threefold in a worker", "", "", got, ""


if __name__ == "__main__":
    main()
