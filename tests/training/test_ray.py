"""Jobs on a Ray cluster: bad addresses, and the same bits whatever dies."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.ray_cluster import CAN_START, ray_cluster, s3_server
from support.tiny_runs import hash_files, make_folder, tiny_tree

from threefold import api
from threefold.errors import RunError
from threefold.ray_cluster import COUNT_SECONDS, Node, NodeWatch, check_listens
from threefold.recipe.cluster import ClusterSpec
from threefold.recipe.recipe import Job, Recipe
from threefold.training.execution import Execution
from threefold.training.executors.ray_executor import JobNeeds, jobs_of_lost_nodes
from threefold.training.progress.watcher import Watcher
from threefold.training.run import Run

PROBE = {"name": "probe", "backbone": "test_resnet", "weights": "none", "img_size": 32}
CPU_NODE = Node("a", "host", {"CPU": 4.0, "memory": 8e9})
GPU_NODE = Node("b", "host", {"CPU": 8.0, "GPU": 2.0, "memory": 64e9})


@pytest.fixture
def port() -> Iterator[int]:
    """The port of a server that is none of Ray's: it takes connections and says `no`."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1)
                connection.sendall(b"HTTP/1.1 400 no\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


@pytest.mark.parametrize("address", ["nonsense", "host:", ":1", "ray://host"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(RunError, match="not the address of a Ray cluster") as error:
        check_listens(address)

    assert "expected HOST:PORT" in str(error.value)


def test_an_address_where_no_cluster_is(port: int) -> None:
    with pytest.raises(RunError, match="an answer that is not gRPC"):
        check_listens(f"127.0.0.1:{port}")
    with pytest.raises(RunError, match="no Ray cluster at this address: ray://127"):
        check_listens("ray://127.0.0.1:1")


@pytest.mark.parametrize(
    ("spec", "device", "nodes", "expected"),
    [
        (ClusterSpec(), "auto", [CPU_NODE], {"CPU": float(torch.get_num_threads()), "GPU": 0.0}),
        (ClusterSpec(cpus=2), "auto", [CPU_NODE, GPU_NODE], {"CPU": 2.0, "GPU": 1.0}),
        (ClusterSpec(cpus=2), "cpu", [GPU_NODE], {"CPU": 2.0, "GPU": 0.0}),
        (ClusterSpec(cpus=2, gpus=0.5), "cuda", [GPU_NODE], {"CPU": 2.0, "GPU": 0.5}),
    ],
)
def test_what_a_job_takes_of_its_node(
    spec: ClusterSpec, device: str, nodes: list[Node], expected: dict[str, float]
) -> None:
    needs = JobNeeds.of(spec, device, nodes)

    assert needs.resources == {**expected, "memory": 0.0}


def test_how_many_jobs_a_node_has_room_for() -> None:
    assert GPU_NODE.fits({"CPU": 2.0, "GPU": 1.0, "memory": 0.0}) == 2
    assert GPU_NODE.fits({"CPU": 2.0, "GPU": 0.0, "memory": 20e9}) == 3
    assert CPU_NODE.fits({"CPU": 2.0, "GPU": 1.0}) == 0


def test_jobs_of_a_node_that_is_gone_are_lost() -> None:
    lost, kept, unsent = Job("m", 0, "one"), Job("m", 1, "one"), Job("m", 2, "one")
    pending = {"first": lost, "second": kept, "third": unsent}
    places = {lost: "node that died", kept: GPU_NODE.id}

    found = jobs_of_lost_nodes(pending, places, [CPU_NODE, GPU_NODE])

    assert found == {"first": lost}


def test_the_cluster_is_no_part_of_the_digest(tiny: Recipe) -> None:
    other = tiny.model_copy(update={"cluster": ClusterSpec(cpus=3, retries=9)})

    assert other.digest() == tiny.digest()


def test_the_nodes_are_counted_again_after_a_while() -> None:
    seconds = [0.0]
    cluster = SimpleNamespace(nodes=lambda: [ray_node("a", 2), ray_node("b", 4)])
    watch = NodeWatch(cluster, {"CPU": 2.0}, clock=lambda: seconds[0])
    before = watch.slots
    cluster.nodes = lambda: [ray_node("a", 2), ray_node("b", 4, alive=False)]

    counted_at_once = watch.refresh()
    slots_at_once = watch.slots
    seconds[0] = COUNT_SECONDS
    counted_later = watch.refresh()

    assert (before, counted_at_once, slots_at_once) == (3, False, 3)
    assert (counted_later, watch.slots) == (True, 1)
    assert [node.id for node in watch.living] == ["a"]


def ray_node(name: str, cpus: float, alive: bool = True) -> dict[str, Any]:
    """A node as Ray describes it."""
    return {
        "NodeID": name,
        "NodeManagerAddress": "127.0.0.1",
        "Alive": alive,
        "Resources": {"CPU": cpus},
    }


# With a real cluster


class Killer(Watcher):
    """Kills a node once a job has trained an epoch."""

    def __init__(self, kill: Any) -> None:
        self.kill, self.notes = kill, list[str]()

    def epoch(self, record: dict[str, Any]) -> None:
        """Kill the node, the first time."""
        if self.kill is not None:
            kill, self.kill = self.kill, None
            kill()

    def note(self, text: str) -> None:
        """Keep a note."""
        self.notes.append(text)


class Stopper(Watcher):
    """Stops the run once a job has trained an epoch, as Ctrl-C would."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Stop the run."""
        self.stop = KeyboardInterrupt()


def cluster_recipe(images: Path) -> Recipe:
    """Two tuned members and a probe on frozen features, two folds.

    A job of the first stage lasts for a second or two, so that a node can die within it.
    """
    tree = tiny_tree(images)
    tree["stages"][0]["epochs"] = 16
    tree["members"].append(PROBE)
    tuned = [{**stage, "members": ["plain", "gated"]} for stage in tree["stages"]]
    tree["stages"] = [*tuned, {"name": "head", "kind": "head", "members": ["probe"]}]
    return Recipe.parse({**tree, "features": {"engine": "torch"}, "cluster": {"cpus": 1}})


def outcome(run: Run) -> dict[str, Any]:
    """What must be equal of two runs: weights, predictions, and results less dates and seconds.

    The hash that results.json has of itself covers these.
    """
    results = json.loads((run.dir / "results.json").read_text())
    varying = ("created", "seconds", "test_opened", "sha256")
    return {
        **hash_files(run.dir),
        "results": {k: v for k, v in results.items() if k not in varying},
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes, each with a cache of its own, and a connection to them."""
    import ray

    with s3_server(), ray_cluster(tmp_path_factory.mktemp("caches")) as nodes:
        ray.init(nodes.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield nodes
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The run of one process with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    recipe = cluster_recipe(make_folder(folder / "images", test=4))
    yield api.train(recipe, folder / "run", progress=False)
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_START, reason="needs the group `cluster`, and Linux")
def test_a_run_at_a_url_has_the_same_bits(
    cluster: Any, alone: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, execution = "s3://bucket/run", Execution("ray", cluster.address)

    run = api.train(alone.recipe, url, progress=False, execution=execution)
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path))  # as on another machine
    again = api.train(alone.recipe, url, Watcher())

    assert outcome(run) == outcome(alone)
    assert outcome(again) == outcome(alone)
    assert again.dir != run.dir
    assert "done.json" not in {path.name for path in tmp_path.glob("runs/*")}


@pytest.mark.slow
@pytest.mark.skipif(not CAN_START, reason="needs the group `cluster`, and Linux")
def test_a_stopped_run_goes_on_with_the_same_bits(cluster: Any, alone: Run, tmp_path: Path) -> None:
    folder, execution = tmp_path / "run", Execution("ray", cluster.address)

    with pytest.raises(KeyboardInterrupt):
        api.train(alone.recipe, folder, Stopper(), execution=execution)
    done = len(list(folder.rglob("done.json")))
    again = api.train(alone.recipe, folder, Watcher(), execution=execution)

    assert done < len(list(folder.rglob("done.json")))
    assert outcome(again) == outcome(alone)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_START, reason="needs the group `cluster`, and Linux")
def test_a_killed_node_changes_no_bit(cluster: Any, alone: Run, tmp_path: Path) -> None:
    watcher = Killer(lambda: cluster.remove_node(cluster.added[0], allow_graceful=False))
    execution = Execution("ray", cluster.address)

    run = api.train(alone.recipe, tmp_path / "run", watcher, execution=execution)

    assert outcome(run) == outcome(alone)
    assert [note for note in watcher.notes if "its process died" in note]
    assert not list(run.dir.rglob(".resume"))
