"""Commands of `kill.py` and `signals.py` in forked processes, which say what they are doing.

The parent imports everything once, and forks: so a command takes as long as its work. A child is
killed or sent a signal at any moment, or leaves a copy of its folder before each call that changes
a file, which is what a kill at that moment would leave.
"""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple

PHASES: Final = (
    ("training/pixel_cache", "image cache"),
    ("training/features", "features"),
    ("training/stages/start", "member"),
    ("training/stages", "steps"),
    ("training/steps", "steps"),
    ("training/planning", "plan"),
    ("training/results/out_of_fold", "assembly"),
    ("training/results", "results"),
    ("evaluation", "results"),
    ("ensembles", "results"),
    ("exporting", "export"),
    ("report", "report"),
    ("runtime", "answers"),
    ("data", "images"),
    ("models", "networks"),
    ("training", "jobs"),
)
"""Modules below the package, and the phase that they stand for; the innermost call counts."""
WIDTH: Final = 32
SAMPLE_SECONDS: Final = 0.02
CHANGES: Final = ("fsync", "replace", "unlink", "rmdir", "mkdir", "truncate")
"""Functions of `os` that change files, or make changes last."""


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        code: its exit code, or minus the number of the signal that ended it.
        phase: what it did last.
        errors: its standard error.
        seconds: from the fork, or from the last signal sent to it.
    """

    code: int
    phase: str
    errors: str
    seconds: float


def warm_up() -> None:
    """Import what the commands need, so that a fork has it; no operator runs before that."""
    import onnx
    import onnxruntime
    import timm
    import torch

    import threefold.cli.app
    import threefold.exporting.export
    import threefold.search
    import threefold.training.jobs

    assert all((onnx, onnxruntime, timm, torch, threefold))  # they are imported to be loaded


class Child:
    """A command in a process of its own.

    Args:
        words: after `threefold`.
        log: where its output goes.
        prepare: called in the child before the command.
    """

    def __init__(
        self, words: Sequence[object], log: Path, prepare: Callable[[], object] = lambda: None
    ) -> None:
        self.log = log
        self._phase = mmap.mmap(-1, WIDTH)
        self._began = time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            _run(words, log, self._phase, prepare)

    @property
    def phase(self) -> str:
        """What the command does now."""
        return self._phase[:].rstrip(b"\0 ").decode() or "start"

    def send(self, number: int) -> None:
        """Send a signal."""
        self._began = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> Ended | None:
        """Wait for its end; None if it still runs after some seconds."""
        until = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > until:
                return None
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(status)
        errors = self.log.read_text(errors="replace")
        return Ended(code, self.phase, errors, time.monotonic() - self._began)


def _run(
    words: Sequence[object], log: Path, phase: mmap.mmap, prepare: Callable[[], object]
) -> None:
    """Be the child: never returns."""
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(descriptor, 2)
        sys.argv = ["threefold", *map(str, words)]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, lambda _, frame: _tell_phase(phase, frame))
        signal.setitimer(signal.ITIMER_REAL, SAMPLE_SECONDS, SAMPLE_SECONDS)
        prepare()
        from threefold.cli.main import main

        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _tell_phase(phase: mmap.mmap, frame: FrameType | None) -> None:
    """Write what is interrupted into shared memory."""
    name = phase_of(frame)
    if name:
        phase[:] = name.encode()[:WIDTH].ljust(WIDTH)


def phase_of(frame: FrameType | None) -> str:
    """Name the phase of a stack: the innermost module that has one, and whether it saves."""
    is_saving = False
    while frame is not None:
        path = frame.f_code.co_filename
        _, inside, module = path.rpartition("/threefold/")
        if inside:
            is_saving = is_saving or frame.f_code.co_name in ("write_bytes", "place_file")
            for start, phase in PHASES:
                if module.startswith(start):
                    return f"{phase}, saving" if is_saving else phase
        frame = frame.f_back
    return ""


def save_each_epoch() -> None:
    """Let stages save their state after every epoch, and not at most once a minute."""
    from threefold.training.stages.task import StageTask

    create = StageTask.__init__

    def create_saving(self: StageTask, *args: Any, **values: Any) -> None:
        create(self, *args, **{"save_interval": 0.0, **values})

    StageTask.__init__ = create_saving  # type: ignore[method-assign]


class Recorder:
    """Copies a folder before each call that changes a file, as a kill there would leave it.

    Args:
        folder: what is copied.
        copies: where the copies go, with numbers as names.
    """

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.copies = folder, copies
        self._is_copying = False
        self._number = 0
        self._last: dict[str, tuple[int, ...]] = {}

    def install(self) -> None:
        """Watch the functions of `os`, in this process only."""
        for name in CHANGES:
            setattr(os, name, self.watched(name, getattr(os, name)))

    def watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that copies the folder, and then does what another does."""

        def watched(*args: Any, **values: Any) -> Any:
            if not self._is_copying and threading.current_thread() is threading.main_thread():
                self._is_copying = True
                try:
                    self._copy(name, args)
                finally:
                    self._is_copying = False
            return call(*args, **values)

        return watched

    def _copy(self, name: str, args: tuple[Any, ...]) -> None:
        """Copy the folder if it has changed; before a flush also with half of the file."""
        state = {
            str(path): (path.lstat().st_size, path.lstat().st_mtime_ns, path.lstat().st_ino)
            for path in self.folder.rglob("*")
        }
        if state == self._last:
            return
        self._last = state
        target = self._copy_to(name)
        if name != "fsync" or not isinstance(args[0], int):
            return
        file = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
        if file.is_file() and file.is_relative_to(self.folder):
            half = self._copy_to("half")
            torn = half / file.relative_to(self.folder)
            os.truncate(torn, torn.stat().st_size // 2)
        assert target.exists()

    def _copy_to(self, name: str) -> Path:
        target = self.copies / f"{self._number:04d}-{name}"
        self._number += 1
        shutil.copytree(self.folder, target, symlinks=True)
        return target
