"""How time and memory grow with images, rows, classes and members.

    uv run python bench/growth.py --out OUT [--parts cache,evaluate,ensemble,report,roles,train]
        [--grows rows,classes,members] [--most 100000] [--rows 10000] [--classes 10] [--members 3]
        [--sizes 1,4,16,64]

Each case runs in a process of its own; processor time (user and system) is that of the process, its
start included. `per unit` is the processor time beyond that of the smallest case, over what was
added: constant where growth is linear. `peak MB` is the largest memory of its own, sampled; mapped
files, which the system takes back when it needs the room, are not in it.

--rows, --classes and --members are the sizes that stay where another one grows; --sizes those that
it takes. One size of `rows` alone measures that one case.

- cache: the image cache of a run at 64 px, from n JPEG files of 160 x 120 (few files, many links).
- evaluate: `threefold evaluate` of predictions of 3 members; rows, then classes, then members grow.
- ensemble: `threefold ensemble --method auto` of the same.
- report: `threefold evaluate --html`.
- roles: five stratified folds of n labels of 100 classes, and the roles of their rows.
- train: `threefold train demo` in k folds; the features of its frozen networks are in the cache, as
  a run before the clock starts puts them there.

`bench/scan.py` measures the listing of a folder.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

LINKS = 20_000
"""Links to one file; file systems limit them."""

SIZES = {
    "images": (1_000, 10_000, 100_000, 1_000_000),
    "rows": (1_000, 10_000, 100_000, 1_000_000),
    "classes": (2, 10, 100, 1_000, 10_000),
    "members": (1, 4, 16, 64),
    "folds": (2, 5, 10, 20),
}
"""The sizes that grow."""


class Case(NamedTuple):
    """One size of one part."""

    part: str
    grows: str
    n: int


class Used(NamedTuple):
    """What a process used."""

    processor: float
    wall: float
    peak_mb: float


def cases(part: str, options: argparse.Namespace) -> list[Case]:
    """The sizes of a part, smallest first."""
    if part in ("cache", "roles"):
        return [Case(part, "images", n) for n in SIZES["images"] if n <= options.most]
    if part == "train":
        return [Case(part, "folds", n) for n in options.sizes or SIZES["folds"]]
    found = []
    for grows in options.grows.split(","):
        sizes = options.sizes or SIZES.get(grows, ())
        for n in sizes:
            values = {"rows": options.rows, "classes": options.classes} | {grows: n}
            fits = values["rows"] * values["classes"] <= 100 * options.most
            if grows != "images" and (options.sizes or (fits and values["rows"] <= options.most)):
                found.append(Case(part, grows, n))
    return found


def draw_predictions(path: Path, rows: int, classes: int, members: int) -> None:
    """Write predictions of members that err independently of one another."""
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=rows)
    probs = np.empty((members, rows, classes), np.float32)
    for member in probs:
        rng.standard_normal(dtype=np.float32, out=member)
        member[np.arange(rows), labels] += 3
        np.exp(member, out=member)
        member /= member.sum(1, keepdims=True)
    np.savez(path, probs=probs, labels=labels)


def link_images(folder: Path, count: int) -> None:
    """Fill two class folders with links to JPEG files."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number:07d}.jpg"
        if number % LINKS == 0:
            coarse = rng.integers(256, size=(12, 16, 3), dtype=np.uint8)
            source = folder / f"{number}.jpg"
            Image.fromarray(coarse).resize((160, 120)).save(source)
            os.rename(source, path)
            source = path
        else:
            os.link(source, path)


def fill_cache(folder: Path) -> None:
    """Fill the image cache of a folder, as a run does."""
    from threefold.data.load import load_data
    from threefold.models.views import Views
    from threefold.recipe.schema import DataSpec, MemberSpec, ViewSpec
    from threefold.training.pixel_cache import PixelCache

    sources = load_data(DataSpec(source="folder", root=str(folder / "images")), seed=0)
    spec = MemberSpec(name="m", backbone="test_resnet", img_size=64)
    views = Views(ViewSpec(), 64, 0)
    cache = PixelCache(sources, lambda spec: views, folder / "cache")
    rows = cache.rows("train", spec, np.arange(len(sources.train)))
    for begin in range(0, len(rows.pixels), 64):
        rows.pixels[begin : begin + 64]


def give_roles(count: int) -> None:
    """Give each of n images its role in each fold."""
    from threefold.data.splits import assign_roles
    from threefold.recipe.schema import FoldSpec

    labels = np.arange(count) % 100
    assign_roles(labels, None, FoldSpec(), "honest", 0, tuple(map(str, range(100))), None)


def train_command(folder: Path, folds: int) -> list[str]:
    """The command that trains the demo's members in k folds."""
    run = ["train", "demo", "--out", str(folder / "run"), "--set", f"folds.k={folds}"]
    return [sys.executable, "-m", "threefold", *run]


def fill_features(folder: Path) -> None:
    """Put the features of the demo's networks into the cache, which later commands share."""
    os.environ["THREEFOLD_CACHE"] = str(folder / "features")
    subprocess.run(train_command(folder, 2), stdout=subprocess.DEVNULL, check=True)


def own_memory(process: int) -> float:
    """MB that a process has in memory without mapped files; 0 if that is not known."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def run_case(case: Case, folder: Path, options: argparse.Namespace) -> Used:
    """Prepare a case, and run it in a process of its own."""
    threefold = [sys.executable, "-m", "threefold"]
    if case.part == "cache":
        link_images(folder / "images", case.n)
        command = [sys.executable, __file__, "--fill-cache", str(folder)]
    elif case.part == "roles":
        command = [sys.executable, __file__, "--assign-roles", str(case.n)]
    elif case.part == "train":
        command = train_command(folder, case.n)
    else:
        sizes = {name: getattr(options, name) for name in ("rows", "classes", "members")}
        sizes[case.grows] = case.n
        draw = [sys.executable, __file__, "--draw", json.dumps([str(folder / "p.npz"), sizes])]
        subprocess.run(draw, check=True)
        command = [*threefold, "evaluate", str(folder / "p.npz")]
        if case.part == "ensemble":
            command = [*threefold, "ensemble", str(folder / "p.npz"), "--method", "auto"]
        if case.part == "report":
            command += ["--html", str(folder / "page.html")]
    began = time.perf_counter()
    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL), 0.0
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        peak = max(peak, own_memory(process.pid))
        time.sleep(0.02)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({process.returncode})")
    wall = time.perf_counter() - began
    return Used(usage.ru_utime + usage.ru_stime, wall, peak)


def main() -> None:
    """Run all cases, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default="cache,evaluate,ensemble,report")
    parser.add_argument("--most", type=int, default=100_000)
    parser.add_argument("--fill-cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--grows", default="images,rows,classes,members")
    for name, size in (("rows", 10_000), ("classes", 10), ("members", 3)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument(
        "--sizes", type=lambda text: [int(n) for n in text.split(",")], default=None
    )
    parser.add_argument("--assign-roles", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--draw", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fill_cache is not None:
        fill_cache(options.fill_cache)
        return
    if options.assign_roles:
        give_roles(options.assign_roles)
        return
    if options.draw is not None:
        path, sizes = json.loads(options.draw)
        draw_predictions(Path(path), **sizes)
        return
    print("| part | grows | n | processor s | per unit ms | wall s | peak MB |")
    print("|---|---|---|---|---|---|---|")
    smallest: dict[tuple[str, str], tuple[int, float]] = {}
    for part in options.parts.split(","):
        if part == "train":
            fill_features(options.out)
        for case in cases(part, options):
            with tempfile.TemporaryDirectory(dir=options.out) as folder:
                used = run_case(case, Path(folder), options)
            first, base = smallest.setdefault((part, case.grows), (case.n, used.processor))
            growth = 1000 * (used.processor - base) / (case.n - first) if case.n > first else 0.0
            unit = f"{growth:.3f}" if case.n > first else ""
            figures = (f"{used.processor:.1f}", unit, f"{used.wall:.1f}", f"{used.peak_mb:.0f}")
            row = (part, case.grows, f"{case.n:,}", *figures)
            print(f"| {' | '.join(row)} |", flush=True)
    # At the end, since it imports torch.
    from threefold.training.provenance import commit, hardware

    print(f"\n{datetime.date.today()}, {hardware()}, commit {commit()}")


if __name__ == "__main__":
    main()
