"""What runs on the nodes of a Ray cluster: the jobs of a run.

Only plain values travel between the machines, and the list of the images where all nodes have them
under the same paths.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from threadpoolctl import threadpool_limits

from threefold.data.dataset import Sources
from threefold.errors import RunError, ThreefoldError, error_texts
from threefold.predictions.remote_run import RemoteRun
from threefold.recipe.recipe import Job
from threefold.training.executors.relay import RelayWatcher, Report
from threefold.training.executors.worker import Outcome, Worker, WorkOrder, open_worker
from threefold.training.job import RESUME_FILE

MAIL_SECONDS: Final = 2.0
"""How long the mailbox is waited for once a job has ended: to have its reports, and to hand them
over."""


@dataclass(frozen=True)
class Errand:
    """A job that a node is to do; plain values, for they travel.

    Attributes:
        order: of its run.
        job: the job.
        seconds: after which it is cut short.
        threads: of torch and of linear algebra; the bits of a result depend on their number.
        features: the jobs whose features are computed with this job's, in one pass over the images.
        takes_over: whether Ray has ended a process that had the job before.
        url: of the run on an object store; empty if `order.folder` is a path that all nodes share.
        before: the jobs whose files it reads, where they must be copied from the object store.
    """

    order: WorkOrder
    job: Job
    seconds: float
    threads: int
    features: tuple[Job, ...] = ()
    takes_over: bool = False
    url: str = ""
    before: tuple[Job, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What became of a job; plain values, for they travel.

    Attributes:
        state: done; claimed = another worker does it; stopped = its state is saved; failed.
        node: Ray's name of the node that did it.
        error: of a job that failed, as `errors.error_texts` has it; empty of the others.
    """

    state: str
    node: str
    error: tuple[str, ...] = ()


def do_job(errand: Errand, sources: Sources | None, mailbox: Any) -> Answer:
    """Do a job on this node.

    Args:
        errand: the job.
        sources: the images of the run; None = read and verify them here.
        mailbox: handle of the `Mailbox`.
    """
    import ray

    node = ray.get_runtime_context().get_node_id()
    try:
        with _threads(errand.threads), _reporting(mailbox, errand.job, node):
            do = _do_remotely if errand.url else _do
            state = do(errand, errand.order, sources)
    except ThreefoldError as error:
        return Answer("failed", node, error_texts(error))
    except _Stopped:
        return Answer("stopped", node)
    return Answer(state, node)


def _do(errand: Errand, order: WorkOrder, sources: Sources | None) -> Outcome:
    worker = _find_worker(order, sources)
    worker.prepare_features(errand.features)
    return worker.run(errand.job, errand.seconds, takes_over=errand.takes_over)


def _do_remotely(errand: Errand, order: WorkOrder, sources: Sources | None) -> Outcome:
    """Do a job in a local copy of a run on an object store, and copy its files there."""
    remote = RemoteRun(errand.url)
    jobs = (*errand.before, errand.job)
    remote.pull(jobs)
    keeper = _StateKeeper(remote, errand.job)
    _PROCESS.watcher.after_epoch = keeper.keep
    try:
        # No one else works in this copy, so a claim in it is that of a process that has died.
        own = replace(errand, takes_over=True)
        outcome = _do(own, replace(order, folder=str(remote.folder)), sources)
    finally:
        _PROCESS.watcher.after_epoch = None
        keeper.close()
    remote.push(jobs)
    return outcome


class _Stopped(KeyboardInterrupt):
    """The process that waits for the jobs has told them to stop."""


class _MailWatcher(RelayWatcher):
    """Sends what a job reports to the mailbox, without waiting for it."""

    def __init__(self) -> None:
        super().__init__(self._mail)
        self._place: tuple[Any, Job, str] | None = None
        self._answers: list[Any] = []
        self.after_epoch: Callable[[], None] | None = None

    def epoch(self, record: dict[str, Any]) -> None:
        """Send the numbers of an epoch."""
        super().epoch(record)
        if self.after_epoch is not None:
            self.after_epoch()

    def begin_job(self, mailbox: Any, job: Job, node: str) -> None:
        """Report from here on about this job, and that it has begun on this node."""
        self._place, self._answers, self.stop = (mailbox, job, node), [], None
        self._mail(("started",))

    def end_job(self) -> None:
        """Send what was not reported yet, and wait until the mailbox has all reports.

        They must be there before the answer of the job, after which no one reads them.
        """
        self.stop = None
        with suppress(_Stopped):
            self.flush()
        with suppress(_Stopped):
            self._read_answers(MAIL_SECONDS)

    def _mail(self, report: Report) -> None:
        """Send a report, and stop if the answer to an earlier one says so."""
        assert self._place is not None
        mailbox, job, node = self._place
        self._answers.append(mailbox.put.remote(job, node, report))
        self._read_answers(0.0)

    def _read_answers(self, seconds: float) -> None:
        """Read the answers of the mailbox, and stop if one says so.

        Args:
            seconds: how long to wait for them.
        """
        import ray

        if not self._answers:
            return
        ready, self._answers = ray.wait(
            self._answers, num_returns=len(self._answers), timeout=seconds, fetch_local=False
        )
        for answer in ready:
            try:
                must_stop = ray.get(answer)
            except ray.exceptions.RayError:  # the bar misses a report
                continue
            if must_stop and self.defers_stop:
                self.stop = self.stop or _Stopped()
            elif must_stop:
                raise _Stopped


class _StateKeeper:
    """Copies the saved state of a job to an object store now and then, while the job goes on."""

    def __init__(self, remote: RemoteRun, job: Job) -> None:
        self._remote, self._job = remote, job
        self._thread: threading.Thread | None = None

    def keep(self) -> None:
        """Begin to copy the state, unless that is going on."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._push, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Copy the last state, if the job is not done."""
        if self._thread is not None:
            self._thread.join()
        self._push()

    def _push(self) -> None:
        with suppress(RunError):  # without it a lost job begins anew
            self._remote.push_state(self._job, RESUME_FILE)


@dataclass
class _Process:
    """What this process of a node keeps between its jobs: they are often of one run."""

    watcher: _MailWatcher = field(default_factory=_MailWatcher)
    order: WorkOrder | None = None
    worker: Worker | None = None


_PROCESS: Final = _Process()


@contextmanager
def _reporting(mailbox: Any, job: Job, node: str) -> Iterator[None]:
    """Let the watcher of this process report about a job."""
    _PROCESS.watcher.begin_job(mailbox, job, node)
    try:
        yield
    finally:
        _PROCESS.watcher.end_job()


def _find_worker(order: WorkOrder, sources: Sources | None) -> Worker:
    """Return the worker of a run; it stays open until this process gets a job of another run."""
    if _PROCESS.order != order or _PROCESS.worker is None:
        _PROCESS.order = _PROCESS.worker = None
        _PROCESS.worker = open_worker(order, sources, _PROCESS.watcher)
        _PROCESS.order = order
    return _PROCESS.worker


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with a number of threads, in torch and in linear algebra."""
    torch.set_num_threads(count)
    with threadpool_limits(count):
        yield
