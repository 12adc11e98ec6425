"""A Ray cluster of several nodes on one machine, each in a network namespace with its own address.

Linux only, as root: it makes a bridge, and one namespace per node with a pair of virtual cables.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.ray_cluster import PATIENT, START_SECONDS, STORE_BYTES

HEAD: Final = "10.77.0.1"
"""Address of the head node, on the bridge."""
PORT: Final = 6399
BRIDGE: Final = "raybridge"


def can_start() -> str:
    """Return why a cluster cannot be started here; empty if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if shutil.which("ip") is None:
        return "the program `ip` is missing (Debian package iproute2)"
    return ""


QUICK: Final = {"RAY_health_check_timeout_ms": "10000", "RAY_health_check_failure_threshold": "3"}
"""A node that is killed is given up within half a minute, as by Ray's own settings."""


class NamespaceNode:
    """A node with one processor, in a network namespace of its own.

    Args:
        number: of the node, from 1.
        cache: its cache folder, as every machine has one.
    """

    def __init__(self, number: int, cache: Path) -> None:
        self.name, self.address = f"raynode{number}", f"10.77.0.{10 + number}"
        outer, inner = f"rayout{number}", f"rayin{number}"
        self._outer, self._inner = outer, inner
        _ip("netns", "add", self.name)
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        _ip("link", "set", inner, "netns", self.name)
        _ip("link", "set", outer, "master", BRIDGE, "up")
        _ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", inner)
        _ip("-n", self.name, "link", "set", inner, "up")
        _ip("-n", self.name, "link", "set", "lo", "up")
        self.ray = _RayProcess(
            ("ip", "netns", "exec", self.name),
            ("--address", f"{HEAD}:{PORT}", "--node-ip-address", self.address, "--num-cpus", "1"),
            {"THREEFOLD_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        )

    def processes(self) -> list[int]:
        """Return the processes of this node."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False
        )
        return [int(word) for word in found.stdout.split()]

    def workers(self) -> list[int]:
        """Return the processes of this node that are doing a job; Ray gives them its name."""
        return [pid for pid in self.processes() if _command(pid).startswith("ray::jobs/")]

    def kill(self) -> None:
        """Kill all processes of the node, and unplug its cable, as a loss of power would."""
        _ip("-n", self.name, "link", "set", self._inner, "down", check=False)
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.ray.end()

    def remove(self) -> None:
        """Kill the node and take its namespace away."""
        self.kill()
        _ip("link", "del", self._outer, check=False)
        _ip("netns", "del", self.name, check=False)


@contextmanager
def namespace_cluster(nodes: int, folder: Path) -> Iterator[list[NamespaceNode]]:
    """Start a head node without processors, and nodes with one each.

    Args:
        nodes: how many nodes do jobs.
        folder: for the caches of the nodes.

    Yields:
        The nodes.
    """
    # With a token file on this machine Ray would ask for it, and `_wait_for` does not send it.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    _remove_leftovers(nodes)
    _ip("link", "add", BRIDGE, "type", "bridge")
    started: list[NamespaceNode] = []
    head = None
    try:
        _ip("addr", "add", f"{HEAD}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        options = ("--head", "--port", str(PORT), "--node-ip-address", HEAD, "--num-cpus", "0")
        head = _RayProcess((), (*options, "--include-dashboard", "false"), {})
        _wait_for([head])
        for number in range(1, nodes + 1):
            started.append(NamespaceNode(number, folder / f"cache{number}"))
        _wait_for([head, *(node.ray for node in started)])
        yield started
    finally:
        for node in started:
            node.remove()
        if head is not None:
            head.end()
        _ip("link", "del", BRIDGE, check=False)


def _remove_leftovers(nodes: int) -> None:
    """Take away what a bench that was killed has left."""
    for number in range(1, nodes + 1):
        _ip("link", "del", f"rayout{number}", check=False)
        _ip("netns", "del", f"raynode{number}", check=False)
    _ip("link", "del", BRIDGE, check=False)


class _RayProcess:
    """`ray start` of a node, which stays in the foreground of a process group of its own.

    Args:
        prefix: words of the command before `ray`.
        options: of `ray start`.
        environment: variables beside those of this process.
    """

    def __init__(
        self, prefix: tuple[str, ...], options: tuple[str, ...], environment: dict[str, str]
    ) -> None:
        ray = Path(sys.executable).with_name("ray")
        command = [*prefix, str(ray), "start", "--block", "--disable-usage-stats", *options]
        self._command = [*command, "--object-store-memory", str(STORE_BYTES)]
        self._environment = {**os.environ, **PATIENT, **QUICK, **environment}
        self._process = self._begin()

    def _begin(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def begin_again_if_ended(self) -> None:
        """Start it once more, where a busy machine has made Ray give up."""
        if self._process.poll() is not None:
            self.end()
            self._process = self._begin()

    def end(self) -> None:
        """Kill it with all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _ip(*words: str, check: bool = True) -> None:
    """Run the program `ip`."""
    subprocess.run(["ip", *words], check=check, capture_output=not check)


def _wait_for(processes: list[_RayProcess]) -> None:
    """Wait until the head node knows so many nodes.

    Raises:
        TimeoutError: they do not come.
    """
    script = (
        "import sys; from ray._raylet import GcsClient\n"
        "nodes = GcsClient(address=sys.argv[1]).get_all_node_info(timeout=5)\n"
        "print(sum(node.state == 0 for node in nodes.values()))"
    )
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        time.sleep(2.0)
        for process in processes:
            process.begin_again_if_ended()
        asked = subprocess.run(
            [sys.executable, "-c", script, f"{HEAD}:{PORT}"],
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.returncode == 0 and int(asked.stdout) >= len(processes):
            return
    raise TimeoutError(f"{len(processes)} nodes did not start in {START_SECONDS:.0f} s")


def _command(pid: int) -> str:
    """Return the command line of a process; empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return ""
