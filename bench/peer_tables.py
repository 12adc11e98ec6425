"""Tables and the plot of peers.py: results as lines of JSON, paired tests, ratios of errors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from development_sets import SETS
from hits import unpack_hits

from threefold.errors import DataError
from threefold.stats.paired_tests import McNemar, mcnemar_exact

OURS = "threefold"
TITLES = {
    "threefold": "threefold",
    "fastai": "fastai fine_tune",
    "probe": "frozen features + logistic regression",
    "timm": "timm loop",
}
HIGHEST_OF_OURS = 2.0
"""The plot ends at so many times threefold's highest error of a set."""
COLOURS = {"threefold": "#c2410c", "fastai": "#2563eb", "probe": "#15803d", "timm": "#6b7280"}
MARKERS = {"threefold": "o", "fastai": "s", "probe": "^", "timm": "D"}
LATE = 1.05
"""A result that took longer than this multiple of its budget is marked."""


class Promise(NamedTuple):
    """The accuracy to expect, as threefold states it from out-of-fold rows."""

    accuracy: float
    low: float
    high: float
    n: int


class Result(NamedTuple):
    """One system on one set within one budget.

    Attributes:
        minutes: the budget.
        seconds: wall-clock time from the start of the process to the finished model.
        peak_gb: peak memory of the largest process, GiB.
        status: ok, did not finish, or failed.
        complete: more time would not change the model.
        accuracy, log_loss: on the test images.
        low, high: 95 % interval of the accuracy.
        hits: which test images it answers correctly, see hits.py.
        names: digest of the names of the test images, in the order of the hits.
        details: epochs or networks of a peer.
    """

    set: str
    system: str
    minutes: float
    seconds: float
    peak_gb: float
    status: str
    hardware: str
    threads: int
    date: str
    commit: str
    versions: dict[str, str]
    complete: bool = False
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    log_loss: float | None = None
    images: int = 0
    hits: str = ""
    names: str = ""
    promise: Promise | None = None
    details: dict[str, Any] | None = None

    @property
    def error(self) -> float:
        """Share of wrong answers; NaN without answers."""
        return float("nan") if self.accuracy is None else 1 - self.accuracy

    @property
    def promise_holds(self) -> bool | None:
        """Whether the promise's interval contains the test accuracy; None without one."""
        if self.promise is None or self.accuracy is None:
            return None
        return self.promise.low <= self.accuracy <= self.promise.high

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        tree = self._asdict()
        tree["promise"] = self.promise._asdict() if self.promise else None
        return tree

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Result:
        """Read what `to_json` has written."""
        promise = tree.pop("promise")
        return cls(**tree, promise=Promise(**promise) if promise else None)

    def line(self) -> str:
        """Describe the result in one line."""
        text = f"{self.set}, {self.system}, {self.minutes:g} min: "
        if self.accuracy is None:
            return f"{text}{self.status} ({self.seconds:.0f} s)"
        return f"{text}accuracy {self.accuracy:.4f}, {self.seconds:.0f} s, {self.peak_gb:.1f} GiB"


def read_results(path: Path) -> list[Result]:
    """Read results, one JSON object a line; none if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Result.from_json(json.loads(line)) for line in lines if line]


def find(results: Iterable[Result], name: str, system: str, minutes: float) -> Result | None:
    """Return the result of a system on a set within a budget, or None."""
    for result in results:
        if (result.set, result.system, result.minutes) == (name, system, minutes):
            return result
    return None


def digest_names(names: Sequence[str]) -> str:
    """Return a short text that differs for other names, or another order of them."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def compare(ours: Result, peer: Result, groups: Sequence[str] | None = None) -> McNemar:
    """Exact McNemar test of two systems on the same images.

    Args:
        ours, peer: two results with hits.
        groups: of the images, where there are any; a group counts as one observation.

    Raises:
        DataError: the results are of different images.
    """
    if (ours.names, ours.images) != (peer.names, peer.images):
        where = f"{ours.set}, {ours.system}, {peer.system}"
        raise DataError("the answers are of different images", where=where)
    hits = [unpack_hits(result.hits, result.images) for result in (ours, peer)]
    return mcnemar_exact(*hits, groups)


def error_ratios(results: Sequence[Result], minutes: float) -> dict[str, tuple[float, int]]:
    """Mean error of threefold over the sets, divided by that of each peer.

    The entry "best" divides by the mean over sets of the lowest error that any peer has there.

    Returns:
        For each peer: the ratio, and the number of sets on which both have answers.
    """
    errors: dict[str, dict[str, float]] = {}
    for result in results:
        if result.minutes == minutes and result.accuracy is not None:
            errors.setdefault(result.system, {})[result.set] = result.error
    ours = errors.pop(OURS, {})
    if errors:
        names = {name for peer in errors.values() for name in peer}
        errors["best"] = {
            name: min(peer[name] for peer in errors.values() if name in peer) for name in names
        }
    ratios = {}
    for peer, theirs in errors.items():
        shared = ours.keys() & theirs.keys()
        total = sum(theirs[name] for name in shared)
        if total:
            ratios[peer] = (sum(ours[name] for name in shared) / total, len(shared))
    return ratios


def print_tables(
    results: Sequence[Result], groups: Mapping[str, Sequence[str] | None] | None = None
) -> None:
    """Print the scores, the ratios of errors, and the verdicts as markdown.

    Args:
        results: what was measured.
        groups: of each set that has some, the group of each test image.
    """
    groups = groups or {}
    systems = [name for name in TITLES if any(result.system == name for result in results)]
    budgets = sorted({result.minutes for result in results})
    _print_provenance(results)
    print(
        "\nAccuracy / log loss (seconds) on the test images. After a peer: images that only "
        "threefold : only the peer has right, and p of the exact McNemar test. * = took longer "
        f"than {LATE:g} x the budget.\n"
    )
    head = ["set", "minutes", *(TITLES[name] for name in systems), "promise", "covers the test"]
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    worse: list[str] = []
    better: list[str] = []
    for name in SETS:
        for minutes in budgets:
            ours = find(results, name, OURS, minutes)
            cells = [name, f"{minutes:g}"]
            for system in systems:
                result = find(results, name, system, minutes)
                cell = _score_cell(result)
                if ours and result and system != OURS and ours.hits and result.hits:
                    test = compare(ours, result, groups.get(name))
                    cell += f"; {test.only_a} : {test.only_b}, p = {test.p:.2g}"
                    if test.p <= 0.05:
                        verdicts = better if test.only_a > test.only_b else worse
                        verdicts.append(f"{name} at {minutes:g} against {system}")
                cells.append(cell)
            if any(find(results, name, system, minutes) for system in systems):
                print("| " + " | ".join([*cells, *_promise_cells(ours)]) + " |")
    _print_ratios(results, budgets, systems)
    kept = [held for held in (result.promise_holds for result in results) if held is not None]
    print(
        f"\nthreefold is better by more than noise (p <= 0.05): {', '.join(better) or 'nowhere'}."
    )
    print(f"It is worse by more than noise: {', '.join(worse) or 'nowhere'}.")
    print(f"The promise's interval covers the test accuracy in {sum(kept)} of {len(kept)} runs.")


def _print_provenance(results: Sequence[Result]) -> None:
    """Print each combination of hardware, threads and versions once."""
    lines = []
    for result in results:
        packages = ", ".join(f"{name} {version}" for name, version in result.versions.items())
        lines.append(f"{result.hardware}, {result.threads} threads; {packages}")
    for line in dict.fromkeys(lines):
        print(line)
    dates = sorted({result.date for result in results})
    commits = list(dict.fromkeys(result.commit for result in results))
    print(f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}, commit {', '.join(commits)}")


def _score_cell(result: Result | None) -> str:
    if result is None:
        return ""
    if result.accuracy is None:
        return result.status.split(",")[0]
    late = "*" if result.seconds > LATE * 60 * result.minutes else ""
    return f"{result.accuracy:.3f} / {result.log_loss:.3f} ({result.seconds:.0f}{late})"


def _promise_cells(ours: Result | None) -> list[str]:
    if ours is None or ours.promise is None:
        return ["", ""]
    promise = ours.promise
    interval = f"{promise.accuracy:.3f} [{promise.low:.3f}, {promise.high:.3f}]"
    return [interval, {True: "yes", False: "no", None: ""}[ours.promise_holds]]


def _print_ratios(
    results: Sequence[Result], budgets: Sequence[float], systems: Sequence[str]
) -> None:
    """Print mean errors by budget, and threefold's divided by each peer's."""
    print("\nMean error over the sets with answers, and threefold's divided by it (same sets).\n")
    head = ["minutes", *(TITLES[name] for name in systems), "the best peer of each set"]
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for minutes in budgets:
        ratios = error_ratios(results, minutes)
        cells = [f"{minutes:g}"]
        for system in [*systems, "best"]:
            errors = [
                result.error
                for result in results
                if (result.system, result.minutes) == (system, minutes)
                and result.accuracy is not None
            ]
            parts = [f"{np.mean(errors):.3f} ({len(errors)} sets)"] if errors else []
            if system in ratios:
                ratio, count = ratios[system]
                parts.append(f"x {ratio:.2f} on {count}")
            cells.append("; ".join(parts))
        print("| " + " | ".join(cells) + " |")


def plot_results(results: Sequence[Result], out: Path) -> None:
    """Draw the error against the wall-clock time: a panel per set, and the mean over the sets.

    Args:
        results: what was measured.
        out: the picture to write.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = [name for name in SETS if any(result.set == name for result in results)]
    columns = min(4, len(names) + 1)
    rows = -(-(len(names) + 1) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(2.7 * columns, 2.3 * rows), squeeze=False, layout="constrained"
    )
    panels = list(grid.flat)
    for panel, name in zip(panels, names, strict=False):
        _draw(panel, [result for result in results if result.set == name], name)
    _draw_means(panels[len(names)], results, names)
    for panel in panels[len(names) + 1 :]:
        panel.axis("off")
    figure.supxlabel("minutes from the folder to the finished model", fontsize=9)
    figure.supylabel("wrong answers on the test images, %", fontsize=9)
    lines = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    shown = [lines[title] for title in TITLES.values() if title in lines]
    figure.legend(handles=shown, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(out, dpi=160)
    pyplot.close(figure)


def _draw(panel: Any, results: Sequence[Result], title: str) -> None:
    """Draw one set: a line per system over the times that its runs took."""
    for system in TITLES:
        own = [r for r in results if r.system == system and r.accuracy is not None]
        own.sort(key=lambda result: result.minutes)
        minutes = [result.seconds / 60 for result in own]
        stays = bool(own) and own[-1].complete
        _line(panel, system, minutes, [100 * result.error for result in own], stays=stays)
    _finish_panel(panel, title, [result.minutes for result in results])


def _draw_means(panel: Any, results: Sequence[Result], names: Sequence[str]) -> None:
    """Draw the mean error of each budget that a system has on all sets."""
    for system in TITLES:
        minutes, errors = [], []
        for budget in sorted({result.minutes for result in results}):
            own = [find(results, name, system, budget) for name in names]
            done = [result for result in own if result and result.accuracy is not None]
            if len(done) == len(names):
                minutes.append(float(np.mean([result.seconds for result in done])) / 60)
                errors.append(100 * float(np.mean([result.error for result in done])))
        _line(panel, system, minutes, errors, stays=False)
    _finish_panel(panel, "mean of the sets", [result.minutes for result in results])
    panel.set_facecolor("#f5f5f4")


def _line(
    panel: Any, system: str, minutes: Sequence[float], errors: Sequence[float], *, stays: bool
) -> None:
    """Draw one system; and for one that gains nothing from more time, its last error dotted."""
    if not minutes:
        return
    if stays:
        panel.axhline(errors[-1], color=COLOURS[system], linewidth=0.8, linestyle=":")
    panel.plot(
        minutes,
        errors,
        color=COLOURS[system],
        marker=MARKERS[system],
        markersize=4,
        linewidth=2.0 if system == OURS else 1.3,
        label=TITLES[system],
    )


def _finish_panel(panel: Any, title: str, budgets: Sequence[float]) -> None:
    """Label a panel; its time axis is logarithmic with a tick at each budget."""
    ticks = sorted(set(budgets))
    panel.set_xscale("log")
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    panel.minorticks_off()
    panel.tick_params(labelsize=8)
    lines = [line for line in panel.get_lines() if line.get_label() in TITLES.values()]
    highest = max((max(line.get_ydata()) for line in lines), default=1.0)
    ours = [max(line.get_ydata()) for line in lines if line.get_label() == TITLES[OURS]]
    top = min([1.12 * highest, *(HIGHEST_OF_OURS * error for error in ours)])
    panel.set_ylim(0, top)
    _name_errors_above(panel, lines, top)
    panel.set_title(title, fontsize=9, loc="left")
    panel.grid(color="#e7e5e4", linewidth=0.6)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _name_errors_above(panel: Any, lines: Sequence[Any], top: float) -> None:
    """Write errors as numbers that are so large that the others would lie on one line."""
    for line in lines:
        style = {"color": line.get_color(), "fontsize": 7, "ha": "center", "va": "top"}
        for minute, error in zip(*line.get_data(), strict=True):
            if error > top:
                panel.text(minute, 0.98 * top, f"\N{UPWARDS ARROW}{error:.0f}", **style)
