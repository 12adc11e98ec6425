"""What a run finds out about its own data: suspect labels, copies of images, file names that tell of groups.

Nothing is edited, moved or left out: suspects are listed in a CSV file and shown in the report, the rest is warned of.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from threefold.assembly import who_saw
from threefold.audit import (
    LISTED,
    Duplicate,
    Duplicates,
    Suspect,
    duplicate_warnings,
    find_duplicates,
    group_question,
    guess_pattern,
    list_suspects,
    summarize_audit,
    write_suspects,
)
from threefold.datacheck import NEAR_COPIES
from threefold.files import read_json, write_json
from threefold.pixels import Pixels
from threefold.predictions import Predictions
from threefold.predictions__results_schema import Audit, Copies, CopyPair
from threefold.run import Run

_NO_ROWS: Final = (
    "labels are audited on out-of-fold rows of the honest protocol, which this run does not have"
)


def find_copies(run: Run, pixels: Pixels) -> None:
    """Write duplicates.json: equal and near images of the run's squares, across folds and splits; once."""
    path = run.dir / "duplicates.json"
    if path.exists():
        return
    train, test = run.sources.train, run.sources.test
    count = len(train) + (len(test) if test is not None else 0)
    if count > NEAR_COPIES:
        told = f"copies are not looked for among more than {NEAR_COPIES:,} images, and there are {count:,}"
        write_json(path, {"found": 0, "pairs": [], "told": told})
        return
    spec = next(m for m in run.recipe.members if not m.joins)
    parts = [f"fold {fold}" for fold in who_saw(run)[0]] + ["test"] * (count - len(train))
    ids, labels = list(train.ids), train.labels
    squares = [pixels.rows("train", spec, np.arange(len(train)))[0]]
    if test is not None:
        ids, labels = [*ids, *test.ids], np.concatenate([labels, test.labels])
        squares.append(pixels.rows("test", spec, np.arange(len(test)))[0])
    found = find_duplicates((image for part in squares for image in part), ids, labels, parts)
    pairs = [pair._asdict() for pair in found.pairs]
    write_json(path, {"found": found.found, "pairs": pairs, "told": ""})


def audit_run(run: Run, rows: Predictions | None, probs: np.ndarray) -> tuple[Audit, list[Suspect]]:
    """The `audit` of results.json, and the suspects, the most suspect first; writes suspects.csv.

    Args:
        run: a run whose jobs are done.
        rows: its out-of-fold predictions, or None.
        probs: (n, k) the chosen ensemble's probabilities on them, cross-fitted.
    """
    honest = rows is not None and rows.kind == "oof" and rows.protocol == "honest"
    suspects, missing = (
        list_suspects(rows, probs) if rows is not None and honest else ([], _NO_ROWS)
    )
    if not missing:
        write_suspects(run.dir / "suspects.csv", suspects)
    path = run.dir / "duplicates.json"
    copies = read_json(path) if path.exists() else None
    warnings = _group_warnings(run)
    if copies:
        pairs = [Duplicate(**pair) for pair in copies["pairs"]]
        warnings += duplicate_warnings(Duplicates(pairs, copies["found"])) + (
            [copies["told"]] if copies["told"] else []
        )
    listed = None
    if copies:
        first = copies["pairs"][:LISTED]
        listed = Copies(found=copies["found"], pairs=tuple(CopyPair(**pair) for pair in first))
    audit = summarize_audit(suspects, missing).replace(
        file="" if missing else "suspects.csv", warnings=tuple(warnings), duplicates=listed
    )
    return audit, suspects


def _group_warnings(run: Run) -> list[str]:
    """A question to the owner of the data where file names look like groups that the folds do not keep together."""
    if run.sources.train.groups is not None:
        return []
    ids = run.sources.train.ids
    pattern = guess_pattern(ids)
    return [group_question(ids, pattern)[0]] if pattern else []
