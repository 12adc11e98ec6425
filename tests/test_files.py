"""Files on disks that are full, read-only or broken: the old content stays, one line says why."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.disk import files_up_to

from threefold.errors import RunError, ThreefoldError, is_disk_error
from threefold.files import TemporaryFolder, real_path, replace_all, write_bytes

STEPS = {
    "mkdir": ("pathlib.Path.mkdir", 1),
    "flush of the file": ("os.fsync", 1),
    "rename": ("os.replace", 1),
    "flush of the folder": ("os.fsync", 2),
}
"""What fails -> the function, and the number of the call."""


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, number: int) -> None:
    """Let a call of a function fail, and those before and after it succeed."""
    target, function = name.rsplit(".", 1)
    module: Any = Path if target == "pathlib.Path" else os
    original, calls = getattr(module, function), 0

    def replacement(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(number, os.strerror(number))
        return original(*arguments, **named)

    monkeypatch.setattr(module, function, replacement)


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "EROFS", "EACCES"])
@pytest.mark.parametrize("step", STEPS)
def test_a_write_that_fails_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, name: str
) -> None:
    path, (function, call) = tmp_path / "file", STEPS[step]
    path.write_bytes(b"old")
    number = getattr(errno, name)

    with monkeypatch.context() as patch:
        fail_at(patch, function, call, number)
        if step == "flush of the folder" and name in ("EROFS", "EACCES"):
            write_bytes(path, b"new")  # not every file system flushes folders; nothing is lost
            assert path.read_bytes() == b"new"
            return
        with pytest.raises(RunError, match=rf"cannot write: {path}; got .*; fix: \w+"):
            write_bytes(path, b"new")

    assert path.read_bytes() == (b"new" if step == "flush of the folder" else b"old")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    with (
        files_up_to(10_000),
        pytest.raises(RunError, match=r"got File too large; fix: raise the limit"),
    ):
        write_bytes(path, b"x" * 20_000)

    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6])
def test_files_are_replaced_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    trial = tmp_path / "trial"
    (trial / "spare").mkdir(parents=True)
    names = ("a.bin", "a.xml", "a.sha256")
    for name in names:
        (trial / name).write_text("new")
        if name != "a.sha256":  # the first file of the user had none
            (tmp_path / name).write_text("old")

    with monkeypatch.context() as patch:
        fail_at(patch, "os.replace", call, errno.ENOSPC)
        moves = {trial / name: tmp_path / name for name in names}
        if call <= 5:  # two away, three in place
            with pytest.raises(OSError, match="No space left"):
                replace_all(moves, trial / "spare")
        else:
            replace_all(moves, trial / "spare")

    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    old = {"a.bin": "old", "a.xml": "old"}
    assert found == (old if call <= 5 else dict.fromkeys(names, "new"))


def test_an_error_of_the_disk_says_what_helps() -> None:
    full = OSError(errno.EDQUOT, "Disk quota exceeded", "file")

    assert str(ThreefoldError("cannot write", where="x", got=full)) == (
        "cannot write: x; got Disk quota exceeded; "
        "fix: free space within your quota, then run the same command again"
    )
    assert ThreefoldError("cannot write", got=full, fix="other").fix == "other"
    assert not ThreefoldError("cannot read", got=OSError(errno.ENOENT, "No such file")).fix


def test_a_refusal_of_the_network_is_none_of_the_disk() -> None:
    assert is_disk_error(OSError(errno.ENOSPC, "No space left on device"))
    assert is_disk_error(PermissionError(errno.EACCES, "Permission denied", "/file"))
    assert not is_disk_error(PermissionError(errno.EACCES, "Permission denied"))
    assert not is_disk_error(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"))


PRINT = """
import sys
from threefold.cli import app as verbs, console, main
from threefold.errors import DataError
def app():
    if sys.argv[1] == "rich":
        console.out.print("answer " * 10_000)
    print("answer")
    if sys.argv[1] == "fails":
        raise DataError("no images")
    sys.exit(0)
verbs.app = app
main.main()
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ("well", "cannot write: standard output; got No space"),
        pytest.param("rich", "cannot write: standard output; got No space", marks=pytest.mark.slow),
        pytest.param("fails", "no images", marks=pytest.mark.slow),
    ],
)
def test_output_to_a_full_disk_is_one_line(ends: str, said: str) -> None:
    environment = {key: os.environ[key] for key in os.environ if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", PRINT, ends],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            check=False,
        )

    assert done.returncode == 1
    assert done.stderr.startswith(f"error {said}")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
@pytest.mark.parametrize(
    ("closed", "code", "output", "said"),
    [
        (">&-", 1, "", "error cannot write: standard output; got it is closed; fix: "),
        pytest.param("<&-", 0, "answer\n", "", marks=pytest.mark.slow),
        pytest.param("2>&-", 0, "answer\n", "", marks=pytest.mark.slow),
        pytest.param(">&- 2>&-", 1, "", "", marks=pytest.mark.slow),
    ],
)
def test_a_closed_stream_is_never_a_traceback(
    closed: str, code: int, output: str, said: str
) -> None:
    command = f'exec "$0" -c "$1" well {closed}'

    done = subprocess.run(
        ["sh", "-c", command, sys.executable, PRINT], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stdout) == (code, output)
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == bool(said)


VERBS = ["list backbones 'test_*'", "list recipes", "doctor --json", "--version", "fit --help"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("verb", VERBS)
def test_verbs_end_at_once_where_nothing_can_be_printed(verb: str) -> None:
    command = f"exec {sys.executable} -m threefold {verb} > /dev/full"

    done = subprocess.run(
        ["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False, timeout=120
    )

    assert done.returncode == 1
    assert done.stderr.startswith("error cannot write: standard output; got No space")
    assert done.stderr.count("\n") == 1


def test_a_temporary_folder_that_may_not_be_deleted_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch, TemporaryFolder(tmp_path / "file") as name:
        (Path(name) / "part").write_bytes(b"x")
        for function in ("unlink", "rmdir", "remove"):
            patch.setattr(os, function, refuse)

    assert Path(name).exists()


def test_a_circle_of_links_has_a_real_path(tmp_path: Path) -> None:
    circle = tmp_path / "circle"
    circle.symlink_to(circle.name)

    assert real_path(circle).name == "circle"
