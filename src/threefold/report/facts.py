"""What identifies a run on its page."""

from __future__ import annotations

from threefold.predictions.run_folder import RunFolder
from threefold.report.render import duration, number


def run_facts(folder: RunFolder) -> list[tuple[str, str]]:
    """Return what identifies a run, as names and values: when, where, with what, how long."""
    info, results = folder.info, folder.any_results
    steps = (f"{step} {duration(seconds)}" for step, seconds in results.seconds.items())
    versions = (f"{package} {version}" for package, version in info.versions.items())
    facts = {
        "created": results.created,
        "time": ", ".join(steps),
        "hardware": f"{results.hardware}, {results.threads} threads",
        "images": f"{number(info.n_train)} to train, {number(info.n_test)} to test",
        "versions": ", ".join(versions),
        "commit": results.commit,
        "recipe digest": info.digest,
    }
    return [(name, value) for name, value in facts.items() if value]
