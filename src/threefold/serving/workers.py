"""Several processes that answer on one port, and the process that watches over them.

One process of Python reads, parses and writes on one core; on a machine of many cores that bounds
the server before the model does.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import Final, NamedTuple

from prometheus_client.multiprocess import mark_process_dead

from threefold.errors import RunError, error_from
from threefold.machine import end_process
from threefold.runtime.model import CascadePolicy
from threefold.serving.limits import ServerLimits
from threefold.serving.listen import open_listeners, url_host
from threefold.serving.metrics import SHARED_FOLDER

LOOK: Final = 0.5
"""Seconds between looks for a signal to stop."""
MOST_FAILURES: Final = 3
"""Processes that may end one after the other before they are ready; then the server ends."""
KILL_SECONDS: Final = 10
"""Seconds after the limits on a request in which a process that is stopped must end."""


class FileVersion(NamedTuple):
    """What shows that a file has changed: the time of its last change in ns, and its size."""

    changed_ns: int
    size: int

    @classmethod
    def of(cls, path: Path) -> FileVersion:
        """Look at a file.

        Raises:
            OSError: it cannot be read.
        """
        status = path.stat()
        return cls(status.st_mtime_ns, status.st_size)


@dataclass(frozen=True)
class WorkerSettings:
    """What a process needs to answer; the fields are the arguments of `run_server`.

    Attributes:
        version: of the model's file; processes that start later must load the same.
        threads: of the model, in each process.
        hosts: the host names that are accepted.
    """

    path: Path
    version: FileVersion
    threads: int
    api_key: str
    hosts: Collection[str]
    limits: ServerLimits
    policy: CascadePolicy


class _Worker:
    """A process that answers, as its parent sees it."""

    def __init__(self, settings: WorkerSettings, folder: str, listener: socket.socket) -> None:
        self.listener = listener
        self.connection, far_end = Pipe()
        descriptors = [far_end.fileno(), listener.fileno()]
        with far_end:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "threefold.serving.worker_process", *map(str, descriptors)],
                stdin=subprocess.DEVNULL,
                pass_fds=descriptors,
                env={**os.environ, SHARED_FOLDER: folder},
            )
        with suppress(OSError):  # it has ended already, which will be seen elsewhere
            self.connection.send(settings)

    def stop(self) -> None:
        """Ask the process to answer what it has begun, and to end."""
        with suppress(OSError):
            self.process.terminate()

    def end(self, seconds: float) -> str:
        """Wait for the end of the process, or force it; returns how it ended, in words."""
        how = end_process(self.process, seconds)
        self.connection.close()
        return how


class _WorkerGroup:
    """The processes of a server; one that dies is replaced.

    Args:
        settings: what each process needs.
        folder: of the metrics that they share.
        stops: the signals to stop that have come; from the first one on no process is replaced.
    """

    def __init__(self, settings: WorkerSettings, folder: str, stops: Collection[int]) -> None:
        self._settings, self._folder, self._stops = settings, folder, stops
        self._workers: list[_Worker] = []
        self._starting: set[_Worker] = set()
        self._failures = 0

    @property
    def is_ready(self) -> bool:
        """Whether all processes answer."""
        return not self._starting

    def start(self, listener: socket.socket) -> None:
        """Start a process that answers on a socket."""
        worker = _Worker(self._settings, self._folder, listener)
        self._workers.append(worker)
        self._starting.add(worker)

    def look(self) -> None:
        """Wait a moment for what the processes say; replace those that have died.

        Raises:
            RunError: too many have ended before they were ready.
            ThreefoldError: a process cannot answer with the model.
        """
        for connection in wait([worker.connection for worker in self._workers], LOOK):
            if self._stops:
                return
            worker = next(one for one in self._workers if one.connection is connection)
            try:
                error = worker.connection.recv()
            except (EOFError, OSError):
                self._replace(worker)
                continue
            if error:
                raise error_from(error)
            self._starting.discard(worker)
            self._failures = 0

    def end(self) -> None:
        """Let the processes answer what they have begun, and end."""
        for worker in self._workers:
            worker.stop()
        limits = self._settings.limits
        deadline = time.monotonic() + limits.body_seconds + limits.answer_seconds + KILL_SECONDS
        for worker in self._workers:
            worker.end(deadline - time.monotonic())

    def _replace(self, worker: _Worker) -> None:
        self._failures = self._failures + 1 if worker in self._starting else 0
        self._workers.remove(worker)
        self._starting.discard(worker)
        how = worker.end(KILL_SECONDS)
        mark_process_dead(worker.process.pid, self._folder)  # type: ignore[no-untyped-call]
        if self._failures >= MOST_FAILURES:
            raise RunError(
                "the server's processes do not start",
                got=f"{self._failures} that ended, the last one {how}",
                fix="see what they printed; with too little memory, ask for fewer --workers",
            )
        logging.getLogger(__name__).warning("a server process %s; another one takes its place", how)
        self.start(worker.listener)


def run_workers(
    settings: WorkerSettings,
    host: str,
    port: int,
    count: int,
    ready: Callable[[str], object] = lambda _: None,
) -> None:
    """Answer in several processes until SIGINT, SIGTERM or SIGHUP; requests in flight are answered.

    A process that dies is replaced.

    Args:
        settings: what each process needs.
        host, port, ready: those of `run_server`; `ready` is called when all processes are.
        count: number of processes.

    Raises:
        RunError: the address is not available, or processes end before they are ready.
        ThreefoldError: a process cannot answer with the model.
    """
    if not hasattr(os, "fork"):
        raise RunError("several server processes need Linux or macOS", fix="leave out --workers")
    with (
        ExitStack() as stack,
        tempfile.TemporaryDirectory(prefix="threefold-metrics-") as folder,
        _stop_signals() as stops,
    ):
        listeners = [stack.enter_context(one) for one in open_listeners(host, port, count)]
        address = f"http://{url_host(host)}:{listeners[0].getsockname()[1]}"
        workers = _WorkerGroup(settings, folder, stops)
        try:
            for listener in listeners:
                workers.start(listener)
            is_announced = False
            while not stops:
                workers.look()
                if workers.is_ready and not is_announced:
                    ready(address)
                    is_announced = True
        finally:
            # No new connection may wait for processes that end.
            stack.close()
            workers.end()


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect the signals that ask for the end; SIGHUP unless it is ignored, as under nohup.

    As in a server of one process, SIGINT also counts where a shell ignores it in the background.
    """
    received: list[int] = []
    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name)
        if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
