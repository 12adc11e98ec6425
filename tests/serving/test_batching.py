"""Requests share batches, and no image ever gets another's answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.server import picture, wait_until

from threefold.data.images import measure
from threefold.errors import DataError, ExportError
from threefold.runtime.model import CascadePolicy
from threefold.runtime.model_output import ModelOutput
from threefold.serving import batching
from threefold.serving.batching import Batcher

OCCUPYING_WIDTH = 100


class FakeModel:
    """A model that answers with an image's mean colour, remembers its batches, and has a gate."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.running = self.most_running = 0

    def __call__(self, images: np.ndarray, policy: CascadePolicy) -> ModelOutput:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.gate.wait(20)
        self.batches.append(images.shape)
        self.running -= 1
        means = images.mean((1, 2))
        return ModelOutput(means, np.stack([means, 2 * means], 1))

    def small_batches(self) -> list[tuple[int, ...]]:
        """Shapes of the batches that `occupy` did not send, sorted."""
        return sorted(shape for shape in self.batches if shape[2] < OCCUPYING_WIDTH)


class FragileModel(FakeModel):
    """A model that fails on batches of several images, and on the red value 13."""

    def __call__(self, images: np.ndarray, policy: CascadePolicy) -> ModelOutput:
        output = super().__call__(images, policy)
        if len(images) > 1 or images[0, 0, 0, 0] == 13:
            raise ExportError("too much memory")
        return output


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def batcher(model: FakeModel) -> Iterator[Batcher]:
    batcher = Batcher(model, batch=4)
    yield batcher
    model.gate.set()
    batcher.close()


def submit(batcher: Batcher, content: bytes) -> Future[ModelOutput]:
    return batcher.submit([(content, measure(content))])[0]


def submit_reds(batcher: Batcher, *reds: int) -> list[Future[ModelOutput]]:
    """Submit images of one size that differ in their red value."""
    return [submit(batcher, picture((red, 0, 0))) for red in reds]


def red_of(future: Future[ModelOutput]) -> int:
    return int(future.result(20).probs[0, 0])


def occupy(batcher: Batcher, model: FakeModel) -> list[Future[ModelOutput]]:
    """Close the gate and keep every worker busy, so that later images wait."""
    model.gate.clear()
    size = (OCCUPYING_WIDTH, 1)
    policies = [CascadePolicy("full", stages) for stages in range(1, batching.WORKERS + 1)]
    # Images of different policies share no batch.
    image = (picture((1, 1, 1), size), size)
    busy = [batcher.submit([image], policy)[0] for policy in policies]
    wait_until(lambda: model.running == batching.WORKERS, 20)
    return busy


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 255), st.integers(0, 255), st.sampled_from([(3, 2), (2, 3), (5, 5)])
        ),
        max_size=40,
    )
)
def test_every_image_gets_its_own_answer(images: list[tuple[int, int, tuple[int, int]]]) -> None:
    model = FakeModel()
    batcher = Batcher(model, batch=4)

    futures = [submit(batcher, picture((r, g, 7), size)) for r, g, size in images]

    for future, (r, g, _) in zip(futures, images, strict=True):
        output = future.result(20)
        assert output.probs[0].tolist() == [r, g, 7]
        assert output.member_probs[0, 1].tolist() == [2 * r, 2 * g, 14]
    batcher.close()
    assert sum(shape[0] for shape in model.batches) == len(images)


def test_waiting_images_are_batched_by_size(batcher: Batcher, model: FakeModel) -> None:
    busy = occupy(batcher, model)
    sizes = [(8, 4), (6, 6), (8, 4), (8, 4), (6, 6), (8, 4), (8, 4)]

    waiting = [submit(batcher, picture((i, 0, 0), size)) for i, size in enumerate(sizes)]

    assert batcher.count_waiting() == 7
    model.gate.set()
    assert [red_of(future) for future in waiting] == list(range(7))
    wait(busy)
    assert model.small_batches() == [(1, 4, 8, 3), (2, 6, 6, 3), (4, 4, 8, 3)]


def test_resized_images_of_any_size_share_batches(model: FakeModel) -> None:
    batcher = Batcher(model, batch=4, resize=lambda image: image[:2, :3])
    busy = occupy(batcher, model)
    sizes = [(8, 4), (6, 6), (3, 2), (90, 40), (6, 5)]

    waiting = [submit(batcher, picture((i, 0, 0), size)) for i, size in enumerate(sizes)]

    model.gate.set()
    assert [red_of(future) for future in waiting] == list(range(5))
    wait(busy)
    batcher.close()
    shapes = sorted(shape for shape in model.batches if shape[1] > 1)
    assert shapes == [(1, 2, 3, 3), (4, 2, 3, 3)]


def test_large_images_share_no_batch_though_they_are_resized(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "BATCH_PIXELS", 150)
    batcher = Batcher(model, batch=4, resize=lambda image: image[:2, :3])
    busy = occupy(batcher, model)

    waiting = [submit(batcher, picture((1, 1, 1), size)) for size in ((50, 4), (5, 5), (50, 4))]

    model.gate.set()
    wait([*busy, *waiting])
    batcher.close()
    assert [shape[0] for shape in model.batches if shape[1] > 1] == [1, 1, 1]


def test_images_that_come_together_share_the_first_batch(
    batcher: Batcher, model: FakeModel
) -> None:
    images = [(picture((red, 0, 0)), (12, 8)) for red in range(6)]

    futures = batcher.submit(images)

    assert [red_of(future) for future in futures] == list(range(6))
    assert sorted(shape[0] for shape in model.batches) == [2, 4]


def test_the_number_of_waiting_images_is_told(model: FakeModel) -> None:
    told: list[int] = []
    batcher = Batcher(model, batch=4, observe_waiting=told.append)
    busy = occupy(batcher, model)
    del told[:]

    waiting = submit_reds(batcher, 1, 2, 3)

    assert told == [1, 2, 3]
    model.gate.set()
    wait([*busy, *waiting])
    batcher.close()
    assert told[-1] == 0


def test_an_idle_batcher_does_not_wait_for_company(batcher: Batcher, model: FakeModel) -> None:
    start = time.monotonic()

    submit(batcher, picture((1, 2, 3))).result(20)

    assert time.monotonic() - start < 0.5
    assert model.batches == [(1, 8, 12, 3)]


def test_images_turned_by_exif_are_not_stacked(batcher: Batcher, model: FakeModel) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = picture((10, 20, 30), (16, 8), "JPEG")
    turned = picture((10, 20, 30), (16, 8), "JPEG", exif=exif)
    busy = occupy(batcher, model)

    futures = [submit(batcher, content) for content in (plain, turned, plain)]

    model.gate.set()
    wait([*busy, *futures])
    assert model.small_batches() == [(1, 16, 8, 3), (2, 8, 16, 3)]


def test_large_images_go_alone(
    batcher: Batcher, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "BATCH_PIXELS", 50)
    model.gate.clear()

    large = [submit(batcher, picture((1, 1, 1), (10, 10))) for _ in range(3)]
    time.sleep(0.2)
    assert model.most_running == 1
    small = submit(batcher, picture((2, 2, 2), (5, 5)))
    wait_until(lambda: model.running == 2, 20)  # the large images do not hold up the small one

    model.gate.set()
    wait([*large, small])
    assert all(shape[0] == 1 for shape in model.batches)


def test_a_bad_image_fails_alone(batcher: Batcher, model: FakeModel) -> None:
    good, truncated = picture((9, 9, 9)), picture((9, 9, 9))[:-30]
    busy = occupy(batcher, model)

    futures = batcher.submit([(content, (12, 8)) for content in (good, truncated, good)])

    model.gate.set()
    assert futures[0].result(20).probs[0].tolist() == [9, 9, 9]
    assert futures[2].result(20).probs[0].tolist() == [9, 9, 9]
    with pytest.raises(DataError):
        futures[1].result(20)
    wait(busy)


def test_a_batch_that_fails_is_tried_one_by_one() -> None:
    model = FragileModel()
    batcher = Batcher(model, batch=4)
    busy = occupy(batcher, model)

    futures = submit_reds(batcher, 12, 13, 14)

    model.gate.set()
    assert red_of(futures[0]) == 12
    assert red_of(futures[2]) == 14
    with pytest.raises(ExportError):
        futures[1].result(20)
    wait(busy)
    batcher.close()


def test_a_model_without_an_answer_leaves_the_workers_alive() -> None:
    def answer_red_only(images: np.ndarray, policy: CascadePolicy) -> ModelOutput:
        probs = images[images[:, 0, 0, 0] > 0].mean((1, 2))
        return ModelOutput(probs, probs[:, None])

    batcher = Batcher(answer_red_only, batch=4)
    for _ in range(2 * batching.WORKERS):
        with pytest.raises(ExportError, match="answers for 1 image, got answers for 0"):
            submit(batcher, picture((0, 0, 0), (5, 5))).result(20)

    assert red_of(submit(batcher, picture((9, 0, 0), (5, 5)))) == 9
    batcher.close()


def test_closing_interrupts_a_model_that_does_not_end(model: FakeModel) -> None:
    batcher = Batcher(model, batch=4)
    busy = occupy(batcher, model)
    waiting = submit_reds(batcher, 1, 2)

    batcher.close(0.1, interrupt=model.gate.set)

    assert all(future.cancelled() for future in waiting)
    assert all(future.done() for future in busy)


def test_cancelled_images_are_not_answered(batcher: Batcher, model: FakeModel) -> None:
    busy = occupy(batcher, model)
    waiting = submit_reds(batcher, 0, 1, 2)

    assert waiting[1].cancel()

    model.gate.set()
    wait([*busy, waiting[0], waiting[2]])
    assert model.small_batches() == [(2, 8, 12, 3)]


def test_tasks_wait_while_images_do(batcher: Batcher, model: FakeModel) -> None:
    busy = occupy(batcher, model)

    tasks = [batcher.submit_task(batcher.count_waiting) for _ in range(2)]
    images = submit_reds(batcher, *range(12))  # three batches

    assert batcher.count_waiting() == 12
    model.gate.set()
    assert [task.result(20) for task in tasks] == [0, 0]
    wait([*busy, *images])


def test_one_task_runs_at_a_time_and_leaves_a_worker(batcher: Batcher, model: FakeModel) -> None:
    gate, running = threading.Event(), []

    def work() -> bool:
        running.append(1)
        return gate.wait(20)

    tasks = [batcher.submit_task(work) for _ in range(3)]
    wait_until(lambda: running, 20)

    assert [red_of(future) for future in submit_reds(batcher, 3, 4)] == [3, 4]
    assert len(running) == 1
    gate.set()
    assert all(task.result(20) for task in tasks)
    assert len(running) == 3


def test_a_large_task_and_a_large_image_take_turns(
    batcher: Batcher, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "BATCH_PIXELS", 50)
    model.gate.clear()

    tasks = [batcher.submit_pixels(np.ones((1, 10, 10, 3), np.uint8)) for _ in range(2)]
    wait_until(lambda: model.running == 1, 20)
    large = submit(batcher, picture((1, 1, 1), (10, 10)))
    time.sleep(0.2)

    assert model.most_running == 1
    model.gate.set()
    assert wait([*tasks, large], 20).not_done == set()
    assert model.most_running == 1


def test_a_task_that_fails_leaves_the_workers_alive(batcher: Batcher, model: FakeModel) -> None:
    tasks = [batcher.submit_task(lambda: 1 // 0) for _ in range(2 * batching.WORKERS)]

    for task in tasks:
        with pytest.raises(ZeroDivisionError):
            task.result(20)
    assert red_of(submit_reds(batcher, 5)[0]) == 5
    assert batcher.submit_task(lambda: "done").result(20) == "done"


def test_closing_drops_waiting_tasks(model: FakeModel) -> None:
    batcher = Batcher(model, batch=4)
    busy = occupy(batcher, model)
    task = batcher.submit_task(lambda: "done")

    batcher.close(0.1, interrupt=model.gate.set)

    assert task.cancelled()
    assert all(future.done() for future in busy)
    with pytest.raises(RuntimeError):
        batcher.submit_task(lambda: "done")


def test_closing_answers_what_waits_and_takes_no_more(model: FakeModel) -> None:
    batcher = Batcher(model, batch=2)
    busy = occupy(batcher, model)
    waiting = submit_reds(batcher, *range(5))

    closing = threading.Thread(target=batcher.close)
    closing.start()
    model.gate.set()
    closing.join(20)

    assert not closing.is_alive()
    assert all(future.done() for future in waiting)
    assert [red_of(future) for future in waiting] == list(range(5))
    assert all(future.done() for future in busy)
    with pytest.raises(RuntimeError):
        submit(batcher, picture((1, 1, 1)))
