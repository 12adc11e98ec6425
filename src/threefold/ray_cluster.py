"""A Ray cluster: connect to it, and check that its nodes can do what is asked of them.

Everything here fails in seconds and with one line. Ray by itself tries an address that no one
listens on for minutes, and then ends the program.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from threefold.errors import RunError, ThreefoldError, shorten
from threefold.extras import require_package
from threefold.machine import package_versions

CONNECT_SECONDS: Final = 5.0
"""How long to wait for an answer from the address of a cluster."""

CHECK_SECONDS: Final = 60.0
"""How long to wait for all nodes of a cluster, each of which starts a process that imports torch;
those that are later are not waited for."""

COUNT_SECONDS: Final = 5.0
"""How often the nodes are counted, which come and go."""

FIRST_SECONDS: Final = 600.0
"""How long to wait for the first node."""

_CLIENT_SCHEME: Final = "ray://"
_CURRENT: Final = Path("/tmp/ray/ray_current_cluster")
"""Where Ray notes the address of a cluster that was started on this machine."""

_TOKEN: Final = "~/.ray/auth_token"
"""Ray makes this file with the first cluster of a machine, and later clusters ask for it."""

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""What a client of HTTP/2, and so of gRPC, sends first: the preface and an empty SETTINGS frame."""

_SETTINGS: Final = 4


def import_ray() -> Any:
    """Import Ray.

    Raises:
        MissingExtraError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # training tells no one
    return require_package("ray", "--executor ray needs", extra="ray")


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to a cluster, or start one on this machine for as long as it is needed.

    Args:
        address: HOST:PORT of the head node, from a machine of the cluster; ray://HOST:PORT from
            elsewhere; auto = the cluster that was started on this machine; empty = RAY_ADDRESS, or
            else a cluster of this machine alone.

    Yields:
        The package ray.

    Raises:
        RunError: no cluster answers there, or it has another version of Ray or Python.
    """
    wanted = address or os.environ.get("RAY_ADDRESS", "")
    if wanted.startswith(_CLIENT_SCHEME) and Path(_TOKEN).expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # or Ray's client would not send it
    ray = import_ray()
    if ray.is_initialized():  # the caller's own connection, which stays
        yield ray
        return
    check_listens(wanted)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if not wanted:
        options["include_dashboard"] = False
    try:
        ray.init(address=wanted or "local", **options)
    except (SystemExit, Exception) as error:
        ray.shutdown()
        raise _explain(wanted, error) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def check_listens(address: str) -> None:
    """Check that something that speaks gRPC listens at the address of a cluster.

    Raises:
        RunError: nothing does.
    """
    place = address
    if address == "auto" and _CURRENT.exists():
        place = _CURRENT.read_text(encoding="utf-8").strip()
    if not place or place == "auto":
        return
    host, _, port = place.removeprefix(_CLIENT_SCHEME).rpartition(":")
    if not host or not port.isdigit():
        raise RunError(
            "not the address of a Ray cluster",
            where=address,
            expected="HOST:PORT, ray://HOST:PORT or auto",
        )
    got: object
    try:
        with socket.create_connection((host, int(port)), CONNECT_SECONDS) as connection:
            connection.settimeout(CONNECT_SECONDS)
            connection.sendall(_PREFACE)
            header = connection.recv(9)
        if len(header) > 3 and header[3] == _SETTINGS:
            return
        got = "an answer that is not gRPC"
    except TimeoutError:
        got = f"no answer in {CONNECT_SECONDS:.0f} s"
    except (OSError, OverflowError) as error:
        got = error
    raise RunError(
        "no Ray cluster at this address",
        where=place,
        got=got,
        fix="start one with `ray start --head`, and give the address that it prints (port 6379), "
        "or ray://HOST:10001 from a machine that is not part of the cluster",
    )


def _explain(address: str, error: BaseException) -> ThreefoldError:
    """Say in one line why Ray could not connect."""
    text = " ".join(str(error).split())
    if "ersion" in text and "mismatch" in text.lower():
        return RunError(
            "the cluster has another version of Ray or Python",
            where=address,
            expected=f"the same as here, Python {platform.python_version()}",
            got=text[:300],
            fix="install the same versions on all machines",
        )
    return RunError(
        "cannot connect to the Ray cluster",
        where=address or "this machine",
        got=f"{type(error).__name__}: {text[:300]}",
        fix="give the address that `ray start --head` printed; `ray status` says whether it runs",
    )


@dataclass(frozen=True)
class Node:
    """A node of a cluster that is alive.

    Attributes:
        id: Ray's name of it.
        address: of the machine.
        resources: what it has in all, by Ray's names (CPU, GPU, memory in bytes).
    """

    id: str
    address: str
    resources: Mapping[str, float]

    def fits(self, needed: Mapping[str, float]) -> int:
        """How many jobs the whole node could do at the same time."""
        parts = [
            self.resources.get(name, 0.0) / amount for name, amount in needed.items() if amount
        ]
        return int(min(parts)) if parts else 0


def living_nodes(ray: Any) -> list[Node]:
    """Return the nodes of the connected cluster that are alive."""
    return [
        Node(node["NodeID"], node["NodeManagerAddress"], node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
    ]


class NodeWatch:
    """The nodes of a cluster, which come and go, counted again every `COUNT_SECONDS`.

    Ray itself waits for minutes for the answer of a machine that has lost its power or its network,
    even after it has given the machine up.

    Args:
        ray: the package, connected.
        needed: what one task takes of its node, by Ray's names.
        clock: seconds.

    Attributes:
        living: the nodes that were alive at the last count.
    """

    def __init__(
        self, ray: Any, needed: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ray, self._needed, self._clock = ray, needed, clock
        self.living: list[Node] = []
        self._count()

    @property
    def slots(self) -> int:
        """How many tasks the living nodes can do at the same time."""
        return sum(node.fits(self._needed) for node in self.living)

    def refresh(self) -> bool:
        """Count again, unless the last count is recent; return whether it did."""
        if self._clock() - self._counted < COUNT_SECONDS:
            return False
        self._count()
        return True

    def _count(self) -> None:
        self.living, self._counted = living_nodes(self._ray), self._clock()


def cancel_unfinished(ray: Any, references: Sequence[Any], wait_seconds: float = 0.0) -> None:
    """End the tasks that have no answer yet.

    Those that have one are left alone: Ray can end this whole process, with `Tried to complete task
    that was not pending`, where a task is cancelled just as its answer arrives.

    Args:
        ray: the package, connected.
        references: to the answers of the tasks.
        wait_seconds: how long to wait for answers first.
    """
    if not references:
        return
    _, unfinished = ray.wait(
        [*references], num_returns=len(references), timeout=wait_seconds, fetch_local=False
    )
    for reference in unfinished:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.cancel(reference, force=True)


def task_error(what: str, where: str, error: Any) -> RunError:
    """An error of a task that is none of ours, with the last line of what was raised on the node.

    Args:
        what: has failed.
        where: which of them.
        error: Ray's RayTaskError.
    """
    last = str(error.cause).strip().splitlines() or [""]
    return RunError(
        what,
        where=where,
        got=f"{type(error.cause).__name__}: {last[-1][:300]}",
        fix="`ray logs` shows the rest; the logs are in /tmp/ray of the nodes",
    )


@dataclass(frozen=True)
class NodeState:
    """What a node finds where work needs it; plain values, for they travel.

    Attributes:
        versions: of Python and of the packages that were asked for; empty of one that is missing.
        missing: the paths that are not there.
    """

    versions: Mapping[str, str]
    missing: tuple[str, ...]


def inspect_node(paths: Sequence[str], packages: Sequence[str]) -> NodeState:
    """Look at this node: its versions, and whether paths are there."""
    own = {"python": platform.python_version(), **package_versions(packages)}
    return NodeState(own, tuple(path for path in paths if not Path(path).exists()))


def check_nodes(
    ray: Any, nodes: Sequence[Node], paths: Sequence[str], packages: Sequence[str]
) -> None:
    """Check that nodes have the versions of this machine and reach some paths.

    Args:
        ray: the package, connected.
        nodes: to check.
        paths: that must be there.
        packages: whose versions can change a result.

    Raises:
        RunError: a node cannot do the work.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    inspect = ray.remote(num_cpus=0, max_retries=0)(inspect_node)
    pending = {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node.id, soft=False)
        reference = inspect.options(scheduling_strategy=here).remote([*paths], [*packages])
        pending[reference] = node
    ready, late = ray.wait(list(pending), num_returns=len(pending), timeout=CHECK_SECONDS)
    if not ready:
        ready, late = ray.wait(list(pending), timeout=FIRST_SECONDS)
    cancel_unfinished(ray, late)
    for reference in ready:
        node = pending[reference]
        try:
            state = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise _broken(node, str(error.cause)) from None
        except ray.exceptions.RayError:
            continue  # a node that died now gets no jobs
        _check_state(node, state, inspect_node((), packages).versions)
    if len(late) == len(pending):
        raise RunError(
            "no node of the cluster answers",
            where=shorten(node.address for node in nodes),
            got=f"nothing in {CHECK_SECONDS + FIRST_SECONDS:.0f} s",
            fix="`ray status` shows the nodes; the logs are in /tmp/ray of the head node",
        )


def _broken(node: Node, cause: str) -> RunError:
    """A node on which threefold or a package of it cannot be imported."""
    return RunError(
        "threefold does not run on a node of the cluster",
        where=node.address,
        got=cause[-200:],
        fix="install threefold there with the same extras, and in the same version, as here",
    )


def _check_state(node: Node, state: NodeState, here: Mapping[str, str]) -> None:
    for name, version in here.items():
        if state.versions.get(name) != version:
            raise RunError(
                f"a node of the cluster has another version of {name}",
                where=node.address,
                expected=f"{name} {version}, as here",
                got=f"{name} {state.versions.get(name) or 'not installed'}",
                fix="install the same versions on all machines, so that results are the same",
            )
    if state.missing:
        raise RunError(
            "a node of the cluster does not see a path that it needs",
            where=f"{state.missing[0]} on {node.address}",
            fix="put it on a disk that all nodes share, under one path; `fit` and `train` also "
            "take images and --out as URLs, such as s3://BUCKET/NAME",
        )
