"""Predict many images into a file: CSV, JSON lines or parquet, which goes on where it stopped."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from threefold.data.image_rows import ImageRow, names_images
from threefold.errors import DataError, RunError
from threefold.files import exclusive, sha256
from threefold.names import count_of
from threefold.runtime.cluster_predict import answer_on_cluster, check_policy
from threefold.runtime.describe import AnswerTable, describe_answer
from threefold.runtime.model import FULL, CascadePolicy
from threefold.runtime.predict import (
    Engine,
    answer_all,
    each_image,
    make_batch,
    open_model,
)
from threefold.runtime.result_files import ResumableResults, check_format

FLUSH_SECONDS = 1.0
"""How long answers wait before they are written."""


class FileSummary(NamedTuple):
    """What a file of answers has now."""

    images: int
    """All that the sources name."""
    resumed: int
    """Images that needed no answer any more, because of an earlier command."""
    failed: int
    """Images and sources that could not be read, now or by an earlier command."""
    seconds: float
    batch: int
    """Images at a time, at the end."""


def predict_to_file(
    target: Path,
    notify: Callable[[DataError | str], object],
    model_path: Path,
    sources: Sequence[str],
    top: int = 3,
    policy: CascadePolicy = FULL,
    engine: Engine | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
    cluster: str | None = None,
) -> FileSummary:
    """Predict images in order and write the answers as they come.

    One process at a time writes the file. The same call goes on after the last complete row.
    Images that could not be read have no row. Only the paths of the images are held in memory.

    Args:
        target: the file, whose name ends in .csv, .jsonl or .parquet.
        notify: called with errors and notes, as `predict.write_predictions`.
        model_path: the exported file.
        sources: files, folders, or - for a list on standard input.
        top: how many classes each line of .jsonl names.
        policy: how many members answer; a budget is measured once, on the first readable image.
        engine: where, and how many at a time; None = the fastest batch on the CPU.
        progress: called with the number of images that are done and of all.
        cluster: address of the Ray cluster that answers (`cluster_predict.answer_on_cluster`); None
            = this machine.

    Raises:
        DataError: the suffix is unknown, or pyarrow is missing.
        RunError: the file is not of this model and these images, cannot be written, or another
            process is writing it.
        ExportError: as `predict.write_predictions`.
    """
    check_format(target)
    lock = target.with_name(f".{target.name}.lock")
    busy = RunError(
        "another process is writing this file",
        where=target,
        fix="wait for it, or choose another --out",
    )
    with exclusive(lock, busy, "choose a writable folder"):
        engine = engine or Engine(batch=0)
        summary = _predict(
            target, notify, model_path, sources, top, policy, engine, progress, cluster
        )
        with suppress(OSError):  # as on Windows, where an open file cannot be deleted
            lock.unlink()
    return summary


def _predict(
    target: Path,
    notify: Callable[[DataError | str], object],
    model_path: Path,
    sources: Sequence[str],
    top: int,
    policy: CascadePolicy,
    engine: Engine,
    progress: Callable[[int, int], object],
    cluster: str | None,
) -> FileSummary:
    """Do what `predict_to_file` says, as the only process."""
    model = open_model(model_path, engine if cluster is None else Engine(batch=0))
    if cluster is not None:
        check_policy(model, policy)
    images: list[str | ImageRow] = []
    failed = 0
    for found in each_image(sources, notify):
        if isinstance(found, DataError):
            notify(found)
            failed += 1
        else:
            images.append(found if isinstance(found, ImageRow) else str(found))
    paths = [image.name if isinstance(image, ImageRow) else image for image in images]
    source: dict[str, Any] = {"model": sha256(model_path), **asdict(policy)}
    if target.suffix.lower() == ".jsonl":
        source["top"] = top
    table = AnswerTable(model.classes, model.task)
    results = ResumableResults(target, table, paths, source)
    if results.resolved is not None:
        policy = CascadePolicy(**results.resolved)
    done, batch = results.answered, make_batch(engine)
    failed += done - results.rows
    if done:
        notify(f"{target}: going on after {done:,} of {count_of(len(paths), 'image')}")
    begin = written = time.perf_counter()
    waiting: list[dict[str, Any]] = []
    progress(done, len(paths))
    rest = itertools.islice(images, done, None)
    if cluster is None:
        answers = answer_all(
            model, rest, policy, engine, notify, batch, lambda p: results.keep(asdict(p))
        )
    else:
        files = [s for s in sources if Path(s).exists() and not names_images(s)]
        answers = answer_on_cluster(cluster, engine, model, rest, policy, files, batch, notify)
    try:
        for path, output, error in answers:
            done += 1
            if output is not None:
                waiting.append(describe_answer(model, path, output, top))
            elif error is not None:
                failed += 1
                notify(error)
            if time.perf_counter() - written > FLUSH_SECONDS:
                rows, waiting, written = waiting, [], time.perf_counter()
                results.file.append(rows)
                progress(done, len(paths))
    finally:  # an interruption loses no answer
        try:
            results.file.append(waiting)
        finally:
            results.file.close()
    results.file.finish()
    progress(done, len(paths))
    seconds = time.perf_counter() - begin
    return FileSummary(len(paths), results.answered, failed, seconds, batch.size)
