"""Arrays in temporary files, and work by blocks of rows: no answer changes, memory is bounded."""

from __future__ import annotations

import errno
import os
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from threefold import scratch
from threefold.ensembles.conformal import ConformalSets
from threefold.ensembles.cross_fit import cross_fit
from threefold.ensembles.diversity import diversity
from threefold.ensembles.registry import ENSEMBLES, make_ensemble
from threefold.ensembles.scaling import minimize_bounded, minimize_newton
from threefold.ensembles.stacked import ShrunkStackedEnsemble, StackedEnsemble
from threefold.errors import RunError
from threefold.evaluation.evaluate import Evaluation, evaluate
from threefold.evaluation.uncertainty import fit_uncertainty
from threefold.predictions.predictions import Predictions
from threefold.recipe.ensemble import EnsembleSpec

NETWORKS = {"stacked": StackedEnsemble, "stacked-shrunk": ShrunkStackedEnsemble}
SUMS = {"pool": 1e-5, "logistic": 1e-4, "stacked": 1e-5, "stacked-shrunk": 1e-5}
"""Methods with sums over rows, or products whose rounding depends on the number of rows."""


def work_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put every array into a file, and work on 256 rows of three members at a time."""
    monkeypatch.setattr(scratch, "SPILL_BYTES", 0)
    monkeypatch.setattr(scratch, "BLOCK_VALUES", 256 * 3 * 6)


def draw(n: int = 1200, k: int = 6, m: int = 3, seed: int = 0) -> Predictions:
    """Draw members that are mostly right."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % k)
    logits = rng.normal(size=(m, n, k)) + 2 * np.eye(k)[labels]
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return Predictions.from_arrays(probs.astype(np.float32), labels)


def test_a_large_array_is_a_file_that_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "SPILL_BYTES", 1000)

    small, large = scratch.scratch((125,)), scratch.scratch((3, 42))
    large[...] = np.arange(126).reshape(3, 42)

    assert small.base is None
    assert large.base is not None
    assert (large.ravel() == np.arange(126)).all()
    del large
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "SPILL_BYTES", 0)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)

    with pytest.raises(RunError, match="no room for a temporary file") as caught:
        scratch.scratch((1 << 20,))

    assert str(tmp_path) in str(caught.value)
    assert "TMPDIR" in str(caught.value)


@pytest.mark.parametrize(("n", "width"), [(1, 1), (1000, 7), (5, 1 << 23), (100_000, 50)])
def test_blocks_are_all_rows_once(n: int, width: int) -> None:
    blocks = list(scratch.row_blocks(n, width))

    rows = np.concatenate([np.arange(n)[block] for block in blocks])
    sizes = [block.stop - block.start for block in blocks]
    assert (rows == np.arange(n)).all()
    assert max(sizes) * width <= max(scratch.BLOCK_VALUES, width)
    assert all(size % 256 == 0 for size in sizes[:-1] if size > 256)


def test_parts_of_arrays_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "SPILL_BYTES", 0)
    monkeypatch.setattr(scratch, "BLOCK_VALUES", 100)
    array = np.random.default_rng(0).normal(size=(3, 50, 4))
    mask = np.arange(50) % 3 == 0

    assert (scratch.take_rows(array, mask) == array[:, mask]).all()
    assert (scratch.take_rows(array[0], [7, 7, 1]) == array[0, [7, 7, 1]]).all()
    assert (scratch.take_members(array, [2, 0]) == array[[2, 0]]).all()
    assert (scratch.take_columns(array, [3, 1]) == array[:, :, [3, 1]]).all()
    assert scratch.converted(array, np.float64) is array
    assert (scratch.converted(array, np.float32) == array.astype(np.float32)).all()


def test_the_top_classes_of_predictions_need_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "BLOCK_VALUES", 1 << 16)
    rows = draw(n=16_000, k=50)  # 9.6 MB, which must not be written to
    expected = rows.probs.argmax(-1)

    tracemalloc.start()
    found = scratch.top_classes(rows.probs)
    diversity(rows.probs, rows.labels)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert (found == expected).all()
    assert peak < 6 << 20


@pytest.mark.parametrize("method", ENSEMBLES)
def test_blocks_change_no_answer_of_a_method(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = draw()

    def answers() -> list[np.ndarray]:
        def make() -> object:
            if method in NETWORKS:
                return NETWORKS[method](32, epochs=3, lr=1e-2)
            return make_ensemble(method)

        fitted = make().fit(rows.probs, rows.labels)  # type: ignore[attr-defined]
        crossed = cross_fit(make, rows.probs, rows.labels)  # type: ignore[arg-type]
        return [fitted.predict_proba(rows.probs), crossed]

    whole = answers()
    work_in_blocks(monkeypatch)
    pieces = answers()

    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=SUMS.get(method, 0))


@pytest.mark.parametrize("minimize", [minimize_newton, minimize_bounded])
def test_blocks_change_no_vector_scaling(
    minimize: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = draw(m=1)
    logs = np.log(rows.probs[0].astype(np.float64))

    whole = minimize(logs, rows.labels, 10.0)
    monkeypatch.setattr(scratch, "BLOCK_VALUES", 256 * 6)
    pieces = minimize(logs, rows.labels, 10.0)

    assert whole is not None
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["lac", "aps", "raps"])
def test_blocks_change_no_prediction_set(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = draw()

    def fitted() -> tuple[np.ndarray, np.ndarray, object]:
        sets = ConformalSets(method, by_class=True)  # type: ignore[arg-type]
        sets.fit(rows.probs[0], rows.labels)
        uncertainty = fit_uncertainty(rows.probs[0], rows.labels)
        return sets.thresholds_, sets.predict_sets(rows.probs[0]), uncertainty.as_dict()

    whole = fitted()
    work_in_blocks(monkeypatch)
    pieces = fitted()

    assert (whole[0] == pieces[0]).all()
    assert (whole[1] == pieces[1]).all()
    assert whole[2] == pieces[2]


@pytest.mark.slow
def test_blocks_change_no_figure_of_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    oof, test = draw(), draw(seed=1)
    test = Predictions.from_arrays(test.probs, test.labels, ids=[f"t{i}" for i in range(len(test))])
    spec = EnsembleSpec(methods=("mean", "best", "vote", "pruned", "weighted", "greedy"))

    def evaluated() -> Evaluation:
        return evaluate(oof, test, spec)

    whole = evaluated()
    work_in_blocks(monkeypatch)
    pieces = evaluated()

    assert pieces.scores == whole.scores
    assert pieces.comparisons == whole.comparisons
    assert (pieces.chosen, pieces.reason) == (whole.chosen, whole.reason)
    assert pieces.expected == whole.expected
    assert pieces.optimism == whole.optimism
    assert (pieces.probs == whole.probs).all()


@pytest.mark.slow
def test_memory_does_not_grow_with_methods_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of a method take 6 MB here, those of all methods and members 80 MB."""
    rows = draw(n=16_000, k=50, m=3)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # each thread has a block of its own
    monkeypatch.setattr(scratch, "SPILL_BYTES", 1 << 18)
    monkeypatch.setattr(scratch, "BLOCK_VALUES", 1 << 16)
    spec = EnsembleSpec(methods=("mean", "best", "vote", "pruned", "top2"))
    evaluate(rows.rows(slice(0, 400)), None, spec)  # so that imports do not count

    tracemalloc.start()
    evaluate(rows, None, spec)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 25 << 20
