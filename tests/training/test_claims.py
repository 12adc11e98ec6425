"""Claims of jobs: one winner, whatever clocks say and whoever dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from threefold.recipe.recipe import Job
from threefold.training.executors import claims as claims_module
from threefold.training.executors.claims import Claim, ClaimLostError, Claims

JOB = Job("lite0", 1, "tune")

CLAIM = """
import sys
from pathlib import Path
from threefold.recipe.recipe import Job
from threefold.training.executors.claims import Claims
claim = Claims(Path(sys.argv[1])).claim(Job("lite0", 1, "tune"))
print("yes" if claim else "no", flush=True)
sys.stdin.read()
"""


def claim_elsewhere(folder: Path) -> subprocess.Popen[str]:
    """Claim the job in another process, which lives until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "yes\n"
    return process


def foreign_claim(folder: Path, number: int = 0) -> Path:
    """Write a claim of a process on another machine, whose clock is a year ahead."""
    folder.mkdir(exist_ok=True)
    path = folder / f"lite0.fold1.tune.{number}"
    path.write_text(json.dumps({"name": "x", "place": "elsewhere", "process": 1}))
    os.utime(path, (4e9, 4e9))
    return path


@pytest.mark.parametrize("has_links", [True, False])
def test_one_of_many_wins(has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    won: list[Claim] = []
    barrier = threading.Barrier(16)

    def compete() -> None:
        claims = Claims(tmp_path)
        barrier.wait()
        claim = claims.claim(JOB)
        if claim is not None:
            won.append(claim)

    threads = [threading.Thread(target=compete) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(won) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lite0.fold1.tune.0"]


def test_a_released_job_can_be_claimed_again(tmp_path: Path) -> None:
    claims = Claims(tmp_path)

    claim = claims.claim(JOB)
    assert claim is not None

    with claim:
        assert Claims(tmp_path).claim(JOB) is None

    assert Claims(tmp_path).claim(JOB) is not None
    assert claims.claim(JOB._replace(fold=0)) is not None


@pytest.mark.skipif(not claims_module.this_place(), reason="the system does not tell")
def test_a_killed_owner_is_followed_at_once(tmp_path: Path) -> None:
    owner = claim_elsewhere(tmp_path)
    others = Claims(tmp_path)
    assert others.claim(JOB) is None

    owner.kill()
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    zombie = others.claim(JOB)  # it is dead, though its parent has not asked how it ended
    owner.communicate()

    assert zombie is not None
    assert zombie.number == 1


def test_an_owner_elsewhere_has_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, now = foreign_claim(tmp_path), 1000.0
    monkeypatch.setattr(claims_module.time, "monotonic", lambda: now)
    others = Claims(tmp_path, lease=60.0)

    assert others.claim(JOB) is None  # seen for the first time
    now += 59
    assert others.claim(JOB) is None
    os.utime(path, (1.0, 1.0))  # a sign of life; that clock now runs 120 years behind
    now += 59
    assert others.claim(JOB) is None
    now += 59
    assert others.claim(JOB) is None
    now += 1
    assert others.claim(JOB) is not None


def test_one_of_many_takes_a_stale_job_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign_claim(tmp_path)
    others = [Claims(tmp_path, lease=0.0) for _ in range(8)]
    assert [claims.claim(JOB) for claims in others] == [None] * 8

    won = [claim for claim in (claims.claim(JOB) for claims in others) if claim is not None]

    assert len(won) == 1


def test_an_owner_that_comes_back_stops(tmp_path: Path) -> None:
    late = Claims(tmp_path).claim(JOB)
    assert late is not None
    late.check()
    foreign_claim(tmp_path, 1)

    with pytest.raises(ClaimLostError, match=r"taken the job over: lite0\.fold1\.tune"):
        late.check()
    late.release()

    assert not Claims(tmp_path).claim(JOB)
    assert "released" not in (tmp_path / "lite0.fold1.tune.1").read_text()


def test_owners_give_signs_of_life(tmp_path: Path) -> None:
    claim = Claims(tmp_path, beat=0.01).claim(JOB)
    assert claim is not None
    os.utime(claim.path, (1.0, 1.0))

    with claim:
        for _ in range(500):
            if claim.path.stat().st_mtime > 1.0:
                break
            threading.Event().wait(0.01)

    assert claim.path.stat().st_mtime > 1.0


def test_a_half_written_claim_counts(tmp_path: Path) -> None:
    (tmp_path / "lite0.fold1.tune.0").write_text('{"name": "x"')

    assert Claims(tmp_path).claim(JOB) is None
