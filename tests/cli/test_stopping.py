"""A training that is stopped: a word, the command that goes on, and the usual exit code."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.tiny_runs import tiny_tree
from typer.testing import CliRunner

from threefold import api
from threefold.arguments import split_names
from threefold.cli import main as entry
from threefold.cli.app import app
from threefold.cli.output import resume_command, watch_training
from threefold.recipe import Recipe

WAIT = """
import signal, time
# As in a terminal; a child of nohup, or of a job in the background, is born deaf.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from threefold.cli.output import watch_training
with watch_training(False, "threefold train x --out y"):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_signals_end_with_a_word(name: str, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(getattr(signal, name))
        _, said = process.communicate(timeout=60)

    assert process.returncode == code
    expected = "stopped; finished work is kept. Resume with: threefold train x --out y\n"
    assert said == expected


TRAIN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from threefold.cli import output
output.GRACE_SECONDS = float(sys.argv[1])
with output.watch_training(False, "threefold train x --out y") as watcher:
    with watcher.deferring_stop():
        print("ready", flush=True)
        time.sleep(60) if sys.argv[1] == "0.1" else None
        while watcher.stop is None:
            time.sleep(0.01)
        print("saved", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("seconds", ["60", "0.1"])
def test_signals_wait_for_a_step_but_not_for_ever(name: str, code: int, seconds: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TRAIN, seconds],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(getattr(signal, name))
        output, errors = process.communicate(timeout=60)

    assert output == ("saved\n" if seconds == "60" else "")
    assert process.returncode == code
    assert errors.startswith("stopped; finished work is kept")


def test_handlers_are_as_before_and_other_threads_have_none() -> None:
    before = signal.getsignal(signal.SIGTERM)
    failures = []

    def work() -> None:
        try:
            with watch_training(False, "x"):
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    work()

    assert not failures
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "my photos", "--out", "o", "--quality", "best", "--members", "a,b"],
        ["train", "r.toml", "--out", "a run"],
        ["distill", "r", "--student", "s", "--out", "o"],
    ],
)
def test_the_command_to_go_on_is_the_whole_command(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text(Recipe.parse(tiny_tree(tmp_path)).dump())
    for verb in ("fit", "train", "distill"):
        monkeypatch.setattr(api, verb, stop)
    sets = ["--set", "seed=3", "--set", 'name="x-1"']

    result = CliRunner().invoke(app, [*words, *sets])

    assert result.exit_code == 130
    command = result.stderr.partition("Resume with: ")[2].strip()
    assert shlex.split(command) == ["threefold", *words, *sets]


def test_words_are_quoted_for_the_shell() -> None:
    assert resume_command("train", "a b", sets=["x='1'"]) == (
        "threefold train 'a b' --set 'x='\"'\"'1'\"'\"''"
    )


def run_failing(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(entry, "app", fail)
    entry.main()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_exhausted_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_failing(error, monkeypatch)

    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error not enough memory: threefold")
    assert said.count("\n") == 1


def test_other_faults_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="a fault"):
        run_failing(RuntimeError("a fault"), monkeypatch)


def test_spaces_around_names_do_not_count() -> None:
    assert split_names(["a, b", " c ,", ","]) == ("a", "b", "c")
