"""Folders on object stores: URLs, copies of what changed, and runs whose done.json comes last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from support.tiny_runs import hash_files

from threefold import api
from threefold.data.detect_source import detect_source
from threefold.data.load import load_data
from threefold.errors import MissingExtraError, RunError
from threefold.files import sha256
from threefold.json_files import write_json
from threefold.object_store import LocalCopy, ObjectFolder, url_of
from threefold.predictions.remote_run import RemoteRun, run_folder_at
from threefold.recipe.recipe import Job, Recipe

URL = "memory://bucket/run"
JOB = Job("net", 0, "one")


@pytest.fixture(autouse=True)
def empty_store() -> Iterator[None]:
    """The store of fsspec in memory, without objects."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield
    memory.store.clear()


def write_job(folder: Path, content: bytes = b"weights") -> list[str]:
    """Write the files of a finished job; returns their names, done.json last."""
    job = folder / JOB.path
    job.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text("")
    for name in ("history.json", "probs.npz", "weights.safetensors"):
        (job / name).write_bytes(content + name.encode())
    files = {path.name: sha256(path) for path in job.iterdir() if path.name != "done.json"}
    write_json(job / "done.json", {"files": files})
    return [f"{JOB.path}/{name}" for name in (*files, "done.json")]


@pytest.mark.parametrize("name", ["a/../../evil.txt", "./b.txt", "a//b.txt", "..\\b.txt"])
def test_names_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file(f"/bucket/run/{name}", b"x")
    copy = LocalCopy(ObjectFolder(URL), tmp_path / "inside")

    with pytest.raises(RunError, match="no path below a folder") as error:
        copy.pull(copy.store.list())

    assert "fix: rename or delete the object" in str(error.value)
    assert not list(tmp_path.rglob("*.txt"))


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        (Path("s3://bucket/run/"), "s3://bucket/run"),
        ("gs://bucket", "gs://bucket"),
        ("hf://user/name", ""),
        ("runs/s3", ""),
        ("C:/photos", ""),
        ("https://example.org/x.zip", ""),
    ],
)
def test_urls_of_object_stores(path: str | Path, url: str) -> None:
    assert url_of(path) == url


def test_only_what_changed_is_copied(tmp_path: Path) -> None:
    names = write_job(tmp_path)
    here = LocalCopy(ObjectFolder(URL), tmp_path)
    there = LocalCopy(ObjectFolder(URL), tmp_path / "other")

    first = here.push(names)
    (tmp_path / names[0]).write_bytes(b"changed")
    second = here.push(names)
    pulled = there.pull(there.store.list())

    assert (first, second, sorted(pulled)) == (names, names[:1], sorted(names))
    assert there.pull(there.store.list()) == []
    assert all(sha256(tmp_path / n) == sha256(tmp_path / "other" / n) for n in names)


def test_a_done_job_is_whole_wherever_copying_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_job(tmp_path)
    put = ObjectFolder.put
    for last in range(len(names) + 1):
        fsspec.filesystem("memory").store.clear()
        (tmp_path / ".objects.json").unlink(missing_ok=True)
        left = [last]

        def failing(store: ObjectFolder, name: str, folder: Path, left: list[int] = left) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise RunError("the object store does not answer")
            return put(store, name, folder)

        monkeypatch.setattr(ObjectFolder, "put", failing)
        with pytest.raises(RunError, match="does not answer"):
            RemoteRun(URL, tmp_path).push()

        there = ObjectFolder(URL).list()
        assert f"{JOB.path}/done.json" not in there or there.keys() >= set(names)


def test_files_that_do_not_belong_together_are_found(tmp_path: Path) -> None:
    write_job(tmp_path / "a")
    RemoteRun(URL, tmp_path / "a").push()
    fsspec.filesystem("memory").pipe_file(f"/bucket/run/{JOB.path}/probs.npz", b"foreign")
    other = RemoteRun(URL, tmp_path / "b")

    other.pull([JOB])
    with pytest.raises(RunError, match="do not belong together"):
        other.check(JOB)

    assert not (tmp_path / "b" / JOB.path / "done.json").exists()


def test_deleted_weights_are_deleted_there_and_in_other_copies(tmp_path: Path) -> None:
    names = write_job(tmp_path / "a")
    first, second = (RemoteRun(URL, tmp_path / name) for name in "ab")
    first.push()
    second.pull()

    (tmp_path / "a" / names[2]).unlink()
    first.push([JOB])
    second.pull([JOB])

    assert names[2] not in ObjectFolder(URL).list()
    assert not (tmp_path / "b" / names[2]).exists()
    second.check(JOB)


def test_a_stopped_run_is_copied_and_caches_are_not(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), run_folder_at(URL) as (folder, url):
        assert url == URL
        write_job(Path(str(folder)))
        (Path(str(folder)) / "cache").mkdir()
        (Path(str(folder)) / "cache/0.npy").write_bytes(b"x")
        raise KeyboardInterrupt

    names = ObjectFolder(URL).list()
    assert f"{JOB.path}/done.json" in names
    assert not [name for name in names if name.startswith((".", "cache"))]


def test_a_run_at_a_url_is_that_of_a_folder(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "memory://bucket/trained"
    alone = api.train(tiny, tmp_path / "run", progress=False)
    first = api.train(tiny, url, progress=False)
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "other machine"))
    second = api.train(tiny, url, progress=False)

    assert hash_files(alone.dir) == hash_files(first.dir) == hash_files(second.dir)
    assert second.dir != first.dir
    assert "results.json" in ObjectFolder(url).list()


def test_images_at_a_url_are_copied_once(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").put(str(images), "/bucket/photos", recursive=True)
    get, copied = ObjectFolder.get, list[str]()

    def counted(store: ObjectFolder, names: list[str], folder: Path) -> None:
        copied.extend(names)
        get(store, names, folder)

    monkeypatch.setattr(ObjectFolder, "get", counted)
    spec = detect_source("memory://bucket/photos")
    sources = load_data(spec, seed=0)

    assert (spec.source, spec.root) == ("folder", "memory://bucket/photos")
    assert (len(sources.train), len(sources.part("test"))) == (36, 12)
    assert len(copied) == len(set(copied)) == 48


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(MissingExtraError, match=r"az:// needs a package that is not installed"):
        ObjectFolder("az://bucket/run")
