"""The executor of a Ray cluster: every job is a task, on whichever node has room for it.

A job starts when those before it are done. One whose node or process dies is done again elsewhere,
from the state that it last saved if the run folder is shared. The jobs that read features of one
frozen backbone go to the node that has computed them.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from threefold.data.dataset import ImageDataset
from threefold.data.sources.folder import EncodedImages
from threefold.errors import RunError, error_from
from threefold.object_store import url_of
from threefold.predictions.remote_run import RemoteRun
from threefold.ray_cluster import (
    Node,
    NodeWatch,
    cancel_unfinished,
    check_nodes,
    connected,
    living_nodes,
    task_error,
)
from threefold.recipe.cluster import ClusterSpec
from threefold.recipe.recipe import Job, fold_name
from threefold.training.distillation import TEACHERS_FOLDER
from threefold.training.executors.local import LocalExecutor
from threefold.training.executors.mailbox import Letter, Mailbox
from threefold.training.executors.order import Schedule, jobs_before
from threefold.training.executors.ray_tasks import MAIL_SECONDS, Answer, Errand, do_job
from threefold.training.executors.relay import tell
from threefold.training.executors.worker import CLAIMS_FOLDER, WorkOrder
from threefold.training.head_jobs import prepare_features
from threefold.training.left_out import JobMemoryError, shortage_of
from threefold.training.provenance import PACKAGES
from threefold.training.pseudo_labels import Caches
from threefold.training.run import Run

POLL_SECONDS: Final = 0.2
"""How often the reports of the jobs are collected."""

GRACE_SECONDS: Final = 5.0
"""How long a stop waits for the jobs to save their state."""

OPEN_SECONDS: Final = 60.0
"""How long the first job waits for the process that takes the reports."""

SHIPPED_BYTES: Final = 1 << 28
"""Most bytes of pixels that are sent to the nodes; larger arrays they read themselves."""


class RayExecutor:
    """Runs the jobs on a Ray cluster.

    Args:
        address: of the cluster, see `ray_cluster.connected`.
    """

    computes_features = True

    def __init__(self, address: str = "") -> None:
        self.address = address

    def run(self, run: Run, jobs: Sequence[Job], caches: Caches) -> None:
        """See `base.Executor`."""
        if all(run.folder.is_done(job) for job in jobs):
            for job in jobs:
                run.watcher.job(job, skipped=True)
            return
        if run.execution.url and run.dir.parent.name == TEACHERS_FOLDER:
            # Their images are a part of the student's, which a node could not find in its copy.
            prepare_features(run, caches.features, jobs)
            LocalExecutor().run(run, jobs, caches)
            return
        with connected(self.address) as ray:
            needs = JobNeeds.of(run.recipe.cluster, run.recipe.train.device, living_nodes(ray))
            nodes = _nodes_with_room(ray, needs, run.recipe.cluster.wait_minutes)
            mailbox = _open_mailbox(ray)  # first: its process starts while the nodes are checked
            check_nodes(ray, nodes, _shared_paths(run), PACKAGES)
            with _demand(needs, run, jobs):
                _Submission(ray, run, jobs, needs, mailbox).work()


@dataclass(frozen=True)
class JobNeeds:
    """What a job takes of its node.

    Attributes:
        cpus: processors, which is also the number of its threads.
        gpus: accelerators.
        memory: bytes that Ray keeps free for it; 0 = it does not count.
    """

    cpus: int
    gpus: float
    memory: float

    @classmethod
    def of(cls, spec: ClusterSpec, device: str, nodes: Sequence[Node]) -> JobNeeds:
        """Return what the recipe says; by default the threads that a job would have here, and a GPU
        where the cluster has some and the recipe may use them."""
        gpus = spec.gpus
        if gpus is None:
            any_gpu = any(node.resources.get("GPU") for node in nodes)
            gpus = 1.0 if any_gpu and device in ("auto", "cuda") else 0.0
        return cls(spec.cpus or torch.get_num_threads(), gpus, spec.memory_gb * 1e9)

    @property
    def resources(self) -> dict[str, float]:
        """By Ray's names."""
        return {"CPU": float(self.cpus), "GPU": self.gpus, "memory": self.memory}

    def __str__(self) -> str:
        parts = [f"{self.cpus} CPU"]
        parts += [f"{self.gpus:g} GPU"] if self.gpus else []
        parts += [f"{self.memory / 1e9:g} GB"] if self.memory else []
        return ", ".join(parts)


def _nodes_with_room(ray: Any, needs: JobNeeds, wait_minutes: float) -> list[Node]:
    """Return the nodes that can do a job, or wait for one.

    Raises:
        RunError: no node can.
    """
    end = time.monotonic() + 60 * wait_minutes
    while True:
        nodes = living_nodes(ray)
        able = [node for node in nodes if node.fits(needs.resources)]
        if able:
            return able
        if time.monotonic() >= end:
            has = "; ".join(
                ", ".join(f"{node.resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
                for node in nodes
            )
            raise RunError(
                "no node of the cluster can do a job",
                expected=f"a node with {needs}",
                got=has or "no nodes",
                fix="set cluster.cpus, cluster.gpus or cluster.memory_gb, or add nodes "
                "(cluster.wait_minutes waits for those of an autoscaler)",
            )
        time.sleep(1.0)


@contextmanager
def _demand(needs: JobNeeds, run: Run, jobs: Sequence[Job]) -> Iterator[None]:
    """Tell the cluster's autoscaler, if it has one, how many jobs could run at the same time."""
    from ray.autoscaler.sdk import request_resources

    bundle = {name: amount for name, amount in needs.resources.items() if amount}
    width = Schedule(run, jobs).width
    with suppress(Exception):  # only a hint; a client outside the cluster cannot give it
        request_resources(bundles=[bundle] * width)
    try:
        yield
    finally:
        with suppress(Exception):
            request_resources(bundles=[])


class _Submission:
    """The jobs of a run on a connected cluster, from the first to the last."""

    def __init__(
        self, ray: Any, run: Run, jobs: Sequence[Job], needs: JobNeeds, mailbox: Any
    ) -> None:
        self.ray, self.run, self.jobs, self.needs = ray, run, jobs, needs
        self.retries = run.recipe.cluster.retries
        self.nodes = NodeWatch(ray, needs.resources)
        self.schedule = Schedule(run, jobs, max(1, self.nodes.slots))
        self.order = WorkOrder.of(run)
        # A process that has used one GPU cannot change to another: each job has a new one.
        self.task = ray.remote(max_retries=0, max_calls=1 if needs.gpus else 0)(do_job)
        self.mailbox, self.mail = mailbox, mailbox.take.remote()
        self.sources = _ship(ray, run)
        self.remote = RemoteRun(run.execution.url, run.dir) if run.execution.url else None
        self.pending: dict[Any, Job] = {}
        self.shown: set[Job] = set()
        self.places: dict[Job, str] = {}
        self.homes: dict[tuple[object, ...], str] = {}
        self.opening: dict[tuple[object, ...], Job] = {}
        self.shortage: JobMemoryError | None = None

    def work(self) -> None:
        """Do all jobs.

        Raises:
            JobMemoryError: a job does not fit into memory; all that do not need it are done.
            ThreefoldError: a job cannot be done.
            KeyboardInterrupt: the watcher or the user stops the run; the jobs have saved their
                state.
        """
        missing = set(self.schedule.waiting)
        if self.remote is not None:
            self.remote.push()
        for job in self.jobs:
            if job not in missing:
                self.run.watcher.job(job, skipped=True)
        try:
            self.ray.wait([self.mail], timeout=OPEN_SECONDS)
            with self.run.watcher.deferring_stop():
                while not self.schedule.is_over:
                    self._submit()
                    self._collect()
                    if self.run.watcher.stop is not None:
                        raise self.run.watcher.stop
                if self.shortage is not None:
                    raise self.shortage
        except BaseException:
            self._stop()
            raise
        finally:
            self.ray.kill(self.mailbox)
        shutil.rmtree(self.run.dir / CLAIMS_FOLDER, ignore_errors=True)

    def _count_nodes(self) -> None:
        """Count the nodes now and then, and let the jobs of those that are gone wait again."""
        if not self.nodes.refresh():
            return
        self.schedule.slots = max(1, self.nodes.slots)
        lost = jobs_of_lost_nodes(self.pending, self.places, self.nodes.living)
        for reference, job in lost.items():
            del self.pending[reference]
            self._lose(job, "its node is gone")

    def _submit(self) -> None:
        """Give the cluster as many jobs as it has room for."""
        self._count_nodes()
        while len(self.pending) < self.schedule.slots:
            job = self.schedule.start(self._may_start)
            if job is None:
                return
            self._send(job)

    def _may_start(self, job: Job) -> bool:
        """Whether a job need not wait for the one that computes its features."""
        return self._group(job) not in self.opening

    def _group(self, job: Job) -> tuple[object, ...]:
        """What the head jobs have in common that read the same features; empty for other jobs."""
        recipe = self.run.recipe
        if recipe.stage(job.stage).kind != "head":
            return ()
        spec = recipe.member(job.member)
        return (spec.backbone, spec.weights, spec.img_size, spec.resize, spec.head.sequence)

    def _send(self, job: Job) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        group = self._group(job)
        features: tuple[Job, ...] = ()
        strategy: Any = "DEFAULT"
        if group:
            features = tuple(other for other in self.jobs if self._group(other) == group)
            if group in self.homes:
                strategy = NodeAffinitySchedulingStrategy(self.homes[group], soft=True)
            else:
                self.opening[group] = job
        errand = Errand(
            order=self.order,
            job=job,
            seconds=self.schedule.seconds(job),
            threads=self.needs.cpus,
            features=features,
            takes_over=bool(self.schedule.losses.get(job)),
            url=self.run.execution.url,
            before=tuple(jobs_before(self.run, job)) if self.remote is not None else (),
        )
        options = {"num_cpus": self.needs.cpus, "num_gpus": self.needs.gpus}
        if self.needs.memory:
            options["memory"] = self.needs.memory
        task = self.task.options(**options, scheduling_strategy=strategy, name=job.path)
        self.pending[task.remote(errand, self.sources, self.mailbox)] = job

    def _collect(self) -> None:
        """Wait a little for jobs to end, and pass on what the others report."""
        ready, _ = self.ray.wait(list(self.pending), timeout=POLL_SECONDS)
        # A job that has ended has delivered its reports; the answer of the mailbox that is on its
        # way may be older, the one after it is not.
        for seconds in (MAIL_SECONDS, MAIL_SECONDS) if ready else (0.0,):
            self._report(self._take_mail(seconds))
        for reference in ready:
            job = self.pending.pop(reference)
            try:
                answer = self.ray.get(reference)
            except self.ray.exceptions.RayTaskError as error:
                where = f"job {_name(job)}"
                raise task_error("a job failed on a node of the cluster", where, error) from None
            except self.ray.exceptions.RayError as error:
                self._lose(job, type(error).__name__)
                continue
            self._end(job, answer)

    def _end(self, job: Job, answer: Answer) -> None:
        """Take the answer of a job."""
        self.places.pop(job, None)
        group = self._group(job)
        if group:
            self.opening.pop(group, None)
            self.homes[group] = answer.node
        if answer.error:
            error = error_from(answer.error)
            shortage = shortage_of(job, error)
            if shortage is None:
                raise error
            self.shortage = self.shortage or shortage
            self.schedule.give_up(job)
            self.run.watcher.ended(job, done=False)
            return
        if answer.state == "done" and self.remote is not None:
            self.remote.pull([*jobs_before(self.run, job), job])
            self.remote.check(job)
        if answer.state == "done" and self.run.folder.is_done(job):
            self.schedule.finish(job)
            self.run.watcher.ended(job)
        elif answer.state == "done":
            raise RunError(
                "a node has done a job that is not in the run folder here",
                where=self.run.dir / job.path,
                fix="put the run folder on a disk that all nodes share, under one path, or give "
                "--out as a URL, such as s3://BUCKET/NAME",
            )
        else:  # claimed by a process that Ray has ended, or stopped by someone else
            self.schedule.put_back(job, lost=answer.state == "claimed")

    def _lose(self, job: Job, reason: str) -> None:
        """Let a job wait again whose process or node has died.

        Raises:
            RunError: it has died too often.
        """
        group = self._group(job)
        self.places.pop(job, None)
        self.opening.pop(group, None)
        self.homes.pop(group, None)
        losses = self.schedule.put_back(job, lost=True)
        self.shown.discard(job)
        self.run.watcher.ended(job)
        if losses > self.retries:
            raise RunError(
                "the process of a job died again and again",
                where=f"job {_name(job)}",
                got=f"{losses} times, at last {reason}",
                fix="see the logs in /tmp/ray of the nodes; if memory is short, raise "
                "cluster.memory_gb or cluster.cpus, or lower train.batch_size",
            )
        self.run.watcher.note(f"{_name(job)}: its process died ({reason}); it is done again")

    def _report(self, letters: Sequence[Letter]) -> None:
        """Pass on to the watcher what the jobs report."""
        running = set(self.schedule.running)
        for job, node, report in letters:
            job = Job(*job)
            if job not in running:
                continue
            self.places[job] = node
            if job not in self.shown:
                self.shown.add(job)
                self.run.watcher.job(job, skipped=False)
            if report[0] != "started":
                tell(self.run.watcher, job, report)

    def _take_mail(self, seconds: float) -> list[Letter]:
        """Return the letters that have come, and ask for the next.

        Args:
            seconds: how long to wait for the answer of the mailbox.
        """
        if not self.ray.wait([self.mail], timeout=seconds)[0]:
            return []
        mail, self.mail = self.mail, self.mailbox.take.remote()
        with suppress(self.ray.exceptions.RayError):  # the mailbox was started again
            letters: list[Letter] = self.ray.get(mail)
            return letters
        return []

    def _stop(self) -> None:
        """Let the jobs save their state, then end those that have not."""
        with suppress(self.ray.exceptions.RayError):
            self.mailbox.stop.remote()
            cancel_unfinished(self.ray, list(self.pending), GRACE_SECONDS)


def jobs_of_lost_nodes(
    pending: Mapping[Any, Job], places: Mapping[Job, str], living: Sequence[Node]
) -> dict[Any, Job]:
    """Return the jobs that began on a node that is no longer alive.

    Args:
        pending: jobs that have no answer yet, by the reference to their answer.
        places: the node on which a job has begun, for those that have.
        living: the nodes that are alive.

    Returns:
        Those of `pending` that are lost.
    """
    alive = {node.id for node in living}
    return {
        reference: job
        for reference, job in pending.items()
        if job in places and places[job] not in alive
    }


def _open_mailbox(ray: Any) -> Any:
    """Start the mailbox on the node of this process, so that it dies with no other machine."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    mailbox = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Mailbox)
    return mailbox.remote()


def _shared_paths(run: Run) -> list[str]:
    """The local paths that a run needs on every node: its folder and its images."""
    paths = [] if run.execution.url else [run.dir.absolute()]
    root = Path(run.recipe.data.root).expanduser()
    if not _has_own_copies(run) and run.recipe.data.root and root.exists():
        paths.append(root.absolute())
    return [*map(str, paths)]


def _has_own_copies(run: Run) -> bool:
    """Whether each node has a copy of the images of its own: from a URL, or in the run's copy."""
    root = run.recipe.data.root
    if url_of(root):
        return True
    inside = Path(root).expanduser().absolute().is_relative_to(run.dir.absolute())
    return bool(run.execution.url) and bool(root) and inside


def _ship(ray: Any, run: Run) -> Any:
    """Put the list of the images where all nodes get it; None if they must read it themselves."""
    sources, root = run.all_sources, Path(run.recipe.data.root).expanduser().absolute()
    parts = [part for part in (sources.train, sources.test, sources.unlabelled) if part is not None]
    shared = str(root if root.is_dir() else root.parent) + os.sep
    if _has_own_copies(run) or not all(_is_shared(part, shared) for part in parts):
        return None
    try:
        return ray.put(sources)
    except Exception:  # such as open files
        return None


def _is_shared(images: ImageDataset, folder: str) -> bool:
    """Whether images are small arrays, or files in a folder that all nodes share.

    Those that were unpacked or downloaded are in the cache of this machine.
    """
    files = images.images
    if isinstance(files, np.ndarray):
        return files.nbytes <= SHIPPED_BYTES
    if isinstance(files, EncodedImages):
        return False
    return all(str(path).startswith(folder) for path in files)


def _name(job: Job) -> str:
    return f"{job.member}/{fold_name(job.fold)}/{job.stage}"
