"""A Ray cluster of several nodes on this machine, for tests: each node has processes of its own."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STORE_BYTES = 100 << 20
CAN_START = sys.platform == "linux" and all(
    importlib.util.find_spec(name) is not None for name in ("ray", "s3fs", "moto", "flask_cors")
)
"""Whether a cluster of several nodes, and a server of S3, can be started on this machine."""
LIGHT = {
    "object_store_memory": STORE_BYTES,
    "include_dashboard": False,
    "include_log_monitor": False,
    "no_monitor": True,
}
"""Options of nodes with few processes beside the one that does jobs."""
PATIENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_gcs_rpc_server_connect_timeout_s": "60",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
}
"""Settings of Ray with which a busy machine is not taken for a dead one."""
START_SECONDS = 240.0
"""How long a node may take to start on a busy machine; Ray itself waits for 30 seconds."""


@contextmanager
def ray_cluster(caches: Path, nodes: int = 2) -> Iterator[Any]:
    """Start a head node without processors, and nodes with one each.

    Every node has a cache folder of its own, as every machine would.

    Args:
        caches: where these folders are.
        nodes: how many nodes do jobs.

    Yields:
        The cluster: its `address`, `nodes` (added nodes, in order), `remove_node`.
    """
    os.environ |= PATIENT
    from ray.cluster_utils import Cluster

    wait_longer_for_nodes()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **LIGHT})
    try:
        cluster.added = [add_node(cluster, caches / f"node{number}") for number in range(nodes)]
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster: Any, cache: Path) -> Any:
    """Add a node with one processor and a cache folder of its own."""
    support = Path(__file__).parents[1]
    variables = {
        "THREEFOLD_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{support}:{os.environ.get('PYTHONPATH', '')}",
    }
    return cluster.add_node(num_cpus=1, env_vars=variables, **LIGHT)


def wait_longer_for_nodes() -> None:
    """Let Ray wait longer for a node that starts."""
    from ray._private import services

    if hasattr(services.get_node, "__wrapped__"):
        return

    @functools.wraps(services.get_node)
    def get_node(*values: Any, **named: Any) -> Any:
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                return get_node.__wrapped__(*values, **named)
            except RuntimeError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)

    services.get_node = get_node


@contextmanager
def s3_server() -> Iterator[str]:
    """Serve S3 on this machine, with an empty bucket; yields its address.

    The environment names it, so that processes that are started from here on find it.
    """
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    before = dict(os.environ)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
    }
    try:
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield address
    finally:
        server.stop()
        os.environ.clear()
        os.environ |= before
