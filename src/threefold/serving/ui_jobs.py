"""The runs of a folder, and the child processes that check their images, plan and train them.

A run `NAME` has its run folder `RUNS/NAME`, as `threefold fit` makes it, and what the page knows of
it in `RUNS/.ui/NAME`: state.json, and what the child process writes there: events.jsonl, check.json
and plan.json. The child holds a lock there, so a server that is started again finds it at work.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

from filelock import FileLock, Timeout

from threefold.errors import DamagedFileError, RunError, ThreefoldError
from threefold.json_files import read_json, write_json
from threefold.serving.limits import Refusal

STATE_FOLDER: Final = ".ui"
EVENTS: Final = "events.jsonl"
LOG: Final = "log.txt"
"""What the child process prints."""
LOCK: Final = ".lock"
PROCESS: Final = "process"
"""Number of the child process."""
UNWRITTEN: Final = 74
"""Exit code of a child process that could not write how its task ended."""
_UNFLUSHED: Final = 120
"""That of Python where it could not write to standard error, which is a file there."""
BLOCK: Final = 1 << 20
"""Most bytes of events in an answer."""
STOP_SECONDS: Final = 15.0
"""How long the end of the server waits for children to save their state."""

Task = Literal["check", "plan", "fit"]


class Workbench:
    """Lists runs, and starts and stops the work on them.

    Args:
        runs: the folder of run folders; need not exist.
        command: starts a child process; the task, the state folder and the run folder follow.
        resolve: returns the data that a person names, in full; a ThreefoldError if there is none.
        describe: returns what the page shows of a run folder with a recipe, as plain values.
    """

    def __init__(
        self,
        runs: Path,
        command: Sequence[str],
        resolve: Callable[[str], str],
        describe: Callable[[Path], dict[str, Any]],
    ) -> None:
        self.runs, self.command = runs.absolute(), list(command)
        self._resolve, self._describe = resolve, describe
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._unwritten: set[str] = set()
        self._lock = threading.RLock()

    # What there is

    def list_runs(self) -> list[dict[str, Any]]:
        """Return every run, the latest first."""
        return sorted(map(self.look_up, self._names()), key=lambda run: -run["created"])

    def look_up(self, name: str) -> dict[str, Any]:
        """Return what is known of a run.

        Raises:
            Refusal: there is no such run.
        """
        state_folder, folder = self._folders(name)
        state = _read(state_folder / "state.json")
        has_recipe = (folder / "recipe.toml").is_file()
        place = folder / "recipe.toml" if has_recipe else state_folder / "state.json"
        running = state.get("task", "") if self.is_running(name) else ""
        last = {"event": running} if running else _last_event(state_folder / EVENTS)
        if name in self._unwritten and not running:
            message = f"cannot write in {state_folder}: free disk space, then go on"
            last = {"event": "failed", "message": message}
        described: dict[str, Any] = {}
        if has_recipe and (folder / "run.json").exists():
            try:
                described = self._describe(folder)
            except ThreefoldError as error:
                described = {"problem": str(error)}
        if state.get("task") == "fit" and last.get("event") != "done":
            described["finished"] = False  # it was stopped while it wrote file and report
        return {
            "name": name,
            "folder": str(folder),
            "own": bool(state),
            "data": state.get("data", ""),
            "created": state.get("created", _changed(place)),
            "settings": state.get("settings", {}),
            "task": state.get("task", ""),
            "running": running,
            "since": state.get("since", 0.0),
            "outcome": last.get("event", ""),
            "message": last.get("message", ""),
            "planned": has_recipe and (state_folder / "plan.json").exists(),
            "begun": (folder / "run.json").exists(),
            "files": [n for n in ("report.html", "model.onnx") if (folder / n).is_file()],
            **described,
        }

    def details(self, name: str) -> dict[str, Any]:
        """Return what `look_up` does, with the check of the images and the plan."""
        state_folder, _ = self._folders(name)
        parts = {part: _read(state_folder / f"{part}.json") for part in ("check", "plan")}
        return {**self.look_up(name), **parts}

    def events(self, name: str, after: int) -> tuple[list[dict[str, Any]], int]:
        """Return the events from a position on, and the position where the next ones begin."""
        state_folder, _ = self._folders(name)
        try:
            with open(state_folder / EVENTS, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(after if after <= size else 0)
                start, block = file.tell(), file.read(BLOCK)
        except FileNotFoundError:
            return [], 0
        whole = block[: block.rfind(b"\n") + 1]
        return list(parse_events(whole)), start + len(whole)

    def file(self, name: str, file: str) -> Path:
        """Return the path of a file of a run.

        Raises:
            Refusal: there is none.
        """
        path = self._folders(name)[1] / file
        if not path.is_file():
            raise Refusal(404, "no_file", f"{name} has no {file} yet")
        return path

    def is_running(self, name: str) -> bool:
        """Whether a child process is at work, of this server or of one before."""
        with self._lock:
            child = self._children.get(name)
            if child is not None:
                if child.poll() is None:
                    return True
                if child.returncode in (UNWRITTEN, _UNFLUSHED):
                    self._unwritten.add(name)
                del self._children[name]
        return _is_locked(self.runs / STATE_FOLDER / name / LOCK)

    # What is to be done

    def create(self, data: str) -> str:
        """Start a run on images that a person names, with their check; returns its name.

        Raises:
            ThreefoldError: there are no such images, or the folder cannot be written.
        """
        data = self._resolve(data)
        with self._lock:
            name = self._new_name(data)
            state_folder = self.runs / STATE_FOLDER / name
            write_json(state_folder / "state.json", {"data": data, "created": time.time()})
        self.start(name, "check", {})
        return name

    def start(self, name: str, task: Task, settings: dict[str, Any]) -> None:
        """Start a child process.

        Args:
            name: of the run.
            task: check = look at the images; plan = write the recipe; fit = train and export.
            settings: for the task, which stay for those to come.

        Raises:
            Refusal: the run is not of this page, something is at work already, or a step is
                missing.
            RunError: the process cannot be started.
        """
        state_folder, folder = self._folders(name)
        with self._lock:
            self._check_start(name, task)
            state = read_json(state_folder / "state.json")
            state["settings"] = {**state.get("settings", {}), **settings}
            state |= {"task": task, "since": time.time()}
            write_json(state_folder / "state.json", state)
            self._unwritten.discard(name)
            words = [*self.command, task, str(state_folder), str(folder)]
            try:
                with open(state_folder / LOG, "ab") as log:
                    self._children[name] = subprocess.Popen(
                        words,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        # Ctrl-C is for the server, which then stops its children.
                        process_group=0 if os.name == "posix" else None,
                    )
            except OSError as error:
                where = error.filename or self.command[0]
                raise RunError("cannot start a process", where=where, got=error) from None

    def _check_start(self, name: str, task: Task) -> None:
        run = self.look_up(name)
        if not run["own"]:
            message = "this run was started elsewhere; resume it where you started it"
            raise Refusal(409, "foreign", message)
        if run["running"]:
            raise Refusal(409, "busy", f"{name} is at work already")
        others = [n for n in self._names() if n != name and self.is_running(n)]
        others = [n for n in others if self.look_up(n)["running"] != "check"]
        if others and task != "check":
            message = f"{others[0]} is at work; stop it or wait, since two would share the machine"
            raise Refusal(409, "busy", message)
        if task == "fit" and not (run["planned"] or run["begun"]):
            raise Refusal(409, "no_plan", "make a plan first")
        if task == "plan" and run["begun"]:
            raise Refusal(409, "begun", "training has begun with its plan; start another run")

    def stop(self, name: str) -> None:
        """Tell the child process to save its state and end.

        Raises:
            Refusal: there is no such run, or nothing is at work.
        """
        state_folder, _ = self._folders(name)
        with self._lock:
            if not self.is_running(name):
                raise Refusal(409, "idle", f"{name} is not at work")
            child = self._children.get(name)
            if child is not None:
                child.terminate()
                return
        # The child of a server before; while it holds the lock, the number is its own.
        with suppress(OSError, ValueError):
            os.kill(int((state_folder / PROCESS).read_text()), signal.SIGTERM)

    def discard(self, name: str) -> str:
        """Take a run off the list whose training has not begun; returns the data that it was on.

        Raises:
            Refusal: there is no such run, it is at work, or training has begun.
        """
        state_folder, folder = self._folders(name)
        with self._lock:
            run = self.look_up(name)
            if run["running"]:
                raise Refusal(409, "busy", f"{name} is at work; stop it first")
            if run["begun"] or not run["own"]:
                message = f"{name} has been trained; delete {folder} if you need it no more"
                raise Refusal(409, "begun", message)
            if run["planned"]:  # by this page
                with suppress(OSError):
                    (folder / "recipe.toml").unlink()
                    folder.rmdir()
            shutil.rmtree(state_folder, ignore_errors=True)
        return str(run["data"])

    def close(self) -> list[str]:
        """Stop every child process of this server; returns the names of those that trained."""
        with self._lock:
            alive = {n: child for n, child in self._children.items() if child.poll() is None}
            for child in alive.values():
                child.terminate()
            deadline = time.monotonic() + STOP_SECONDS
            for child in alive.values():
                try:
                    child.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
        return sorted(alive)

    # Names and folders

    def _names(self) -> list[str]:
        """Names of all runs: those with a recipe, and those that the page has started."""
        return sorted({*_folders_with(self.runs, "recipe.toml")} | self._own_names())

    def _own_names(self) -> set[str]:
        return {*_folders_with(self.runs / STATE_FOLDER, "state.json")}

    def _folders(self, name: str) -> tuple[Path, Path]:
        """Return the state folder and the run folder of a run; only names on the list have any."""
        if name not in self._names():
            raise Refusal(404, "no_run", "no such run")
        return self.runs / STATE_FOLDER / name, self.runs / name

    def _new_name(self, data: str) -> str:
        """Name a run after its data; a number makes the name new."""
        stem = re.sub(r"(\.tar)?\.[A-Za-z0-9]{1,8}$", "", re.split(r"[/\\]", data)[-1])
        stem = re.sub(r"[^\w-]+", "-", stem, flags=re.ASCII).strip("-_")[:60] or "images"
        taken, number, name = {*self._names()}, 1, stem
        while name in taken or (self.runs / name).exists():
            number += 1
            name = f"{stem}-{number}"
        return name


def _folders_with(folder: Path, file: str) -> Iterator[str]:
    """Names of the folders in a folder that have a file."""
    with suppress(OSError):
        for entry in folder.iterdir():
            if not entry.name.startswith(".") and (entry / file).is_file():
                yield entry.name


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where there is none, or it is damaged."""
    try:
        tree = read_json(path)
    except (DamagedFileError, RunError):
        return {}
    return tree if isinstance(tree, dict) else {}


def parse_events(block: bytes) -> Iterator[dict[str, Any]]:
    """Read lines of JSON; a line that a killed process has cut short is left out."""
    for line in block.splitlines():
        with suppress(ValueError):
            tree = json.loads(line)
            if isinstance(tree, dict):
                yield tree


def _last_event(path: Path) -> dict[str, Any]:
    """Return how the last task ended: done, failed or stopped; or `interrupted`."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 16)))
            events = list(parse_events(file.read()))
    except OSError:
        return {}
    last = events[-1] if events else {}
    is_end = last.get("event") in ("done", "failed", "stopped")
    return last if is_end else {"event": "interrupted"}


def _is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file."""
    if not path.exists():
        return False
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except (Timeout, NotImplementedError):
        return True
    except OSError:
        return False
    lock.release()
    return False


def _changed(path: Path) -> float:
    """When a file was changed, in seconds since 1970."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
