"""A training that is stopped: a word, the command that goes on, and the usual exit code."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.tiny_runs import tiny_tree
from typer.testing import CliRunner

from threefold import api
from threefold.arguments import split_names
from threefold.cli.app import app
from threefold.cli.main import run
from threefold.cli.output import resume_command, watch_training
from threefold.cli.signals import Signals, Terminated, catch_signals
from threefold.errors import RunError
from threefold.recipe.recipe import Recipe


@pytest.fixture(autouse=True)
def deaf_to_nothing() -> Iterator[None]:
    """Give SIGINT its handler, which a shell takes from what it starts in the background."""
    before, hook = signal.signal(signal.SIGINT, signal.default_int_handler), sys.unraisablehook
    yield
    signal.signal(signal.SIGINT, before)
    sys.unraisablehook = hook


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("name", "code"),
    [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130), ("SIGUSR1", 138), ("SIGUSR2", 140)],
)
def test_signals_end_with_a_word(name: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(SystemExit) as stop,
        watch_training(False, "threefold train x --out y"),
    ):
        signal.raise_signal(getattr(signal, name))

    assert stop.value.code == code
    expected = "stopped; finished work is kept. Resume with: threefold train x --out y\n"
    assert capsys.readouterr().err == expected


VERBS = {
    "an object that is half made": """
class Verb:
    def __init__(self):
        signal.raise_signal(signal.SIGTERM)
        self.file = None
    def __del__(self):
        self.file.close()
""",
    "an error that a library made of it": """
def Verb():
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        pass  # as a library in another language hides it
    raise RunError("cannot load weights")
""",
}


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("verb", VERBS)
def test_what_comes_of_a_signal_is_not_told(verb: str) -> None:
    imports = "import signal\nfrom threefold.cli import app, main\n"
    imports += "from threefold.errors import RunError\n"
    program = f"{imports}{VERBS[verb]}app.app = Verb\nmain.main()"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.returncode == 143
    assert done.stderr == "stopped; run the same command again\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_signal_that_is_swallowed_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threefold.cli.signals.GRACE_SECONDS", 0.1)

    def swallow() -> None:
        with suppress(KeyboardInterrupt):  # as a library does that hides an interrupted import
            signal.raise_signal(signal.SIGTERM)
        time.sleep(60)

    with pytest.raises(Terminated) as stop, catch_signals():
        swallow()

    assert stop.value.number == signal.SIGTERM


def test_a_signal_within_a_signal_is_the_same_one() -> None:
    def receive() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)  # a launcher passes on what it has received, too
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated), catch_signals():
        receive()


@pytest.mark.parametrize("error", [ImportError("init failed"), SystemExit(130), Terminated(15)])
def test_whatever_comes_of_a_signal_ends_with_its_code(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_failing(error, monkeypatch, signal.SIGTERM)

    assert stop.value.code == 143
    assert capsys.readouterr().err == "stopped; run the same command again\n"


def test_a_state_that_cannot_be_saved_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_failing(RunError("cannot write", got="no space"), monkeypatch, signal.SIGTERM)

    assert stop.value.code == 1
    assert capsys.readouterr().err == "error cannot write; got no space\n"


TRAIN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from threefold.cli import output, signals
signals.GRACE_SECONDS = float(sys.argv[1])
with output.watch_training(False, "threefold train x --out y") as watcher:
    with watcher.deferring_stop():
        print("ready", flush=True)
        while watcher.stop is None or sys.argv[1] != "60":
            time.sleep(0.01)
        print("saved", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("names", "seconds", "code", "output"),
    [
        (["SIGTERM"], "60", 143, "saved\n"),
        (["SIGTERM"], "0.1", 143, ""),
        (["SIGINT", "SIGINT"], "61", 130, ""),
    ],
    ids=["saves", "does not wait for ever", "a second Ctrl-C ends at once"],
)
def test_signals_wait_for_a_step(names: list[str], seconds: str, code: int, output: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TRAIN, seconds],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for name in names:
            process.send_signal(getattr(signal, name))
            time.sleep(0.4)
        printed, errors = process.communicate(timeout=60)

    assert process.returncode == code
    assert printed == output
    assert errors.startswith("stopped; finished work is kept") == (len(names) == 1)


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


def run_failing(error: BaseException, monkeypatch: pytest.MonkeyPatch, number: int = 0) -> None:
    """Run the program, with an error in place of a verb, after a signal."""
    signals = Signals()
    signals.number = number

    def fail() -> None:
        raise error

    monkeypatch.setattr("threefold.cli.app.app", fail)
    run(signals)


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
