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
from support.server import picture

from threefold.data.images import measure
from threefold.errors import DataError, ExportError
from threefold.runtime.model import CascadePolicy, ModelOutput
from threefold.serving import batching
from threefold.serving.batching import Batcher


class Fake:
    """A model that answers with an image's mean colour and remembers its batches; may be held at a gate."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.at_once = self.most_at_once = 0

    def __call__(self, images: np.ndarray, policy: CascadePolicy) -> ModelOutput:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.gate.wait(20)
        self.batches.append(images.shape)
        self.at_once -= 1
        means = images.mean((1, 2))
        return ModelOutput(means, np.stack([means, 2 * means], 1))

    def small(self) -> list[tuple[int, ...]]:
        """Batches of images that `hold` did not send."""
        return [shape for shape in self.batches if shape[2] < 100]


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def batcher(fake: Fake) -> Iterator[Batcher]:
    made = Batcher(fake, batch=4)
    yield made
    fake.gate.set()
    made.close()


def ask(batcher: Batcher, content: bytes) -> Future[ModelOutput]:
    return batcher.submit(content, measure(content))


def hold(batcher: Batcher, fake: Fake) -> list[Future[ModelOutput]]:
    """Keep every worker busy, so that what is asked next waits."""
    fake.gate.clear()
    busy = [ask(batcher, picture((1, 1, 1), (100 + i, 1))) for i in range(batching.WORKERS)]
    for _ in range(20_000):
        if fake.at_once == batching.WORKERS:
            return busy
        time.sleep(0.001)
    raise AssertionError("the workers did not come to the gate")


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 255), st.integers(0, 255), st.sampled_from([(3, 2), (2, 3), (5, 5)])
        ),
        max_size=40,
    )
)
def test_every_image_gets_its_own_answer(asked: list[tuple[int, int, tuple[int, int]]]) -> None:
    fake = Fake()
    batcher = Batcher(fake, batch=4)
    answers = [(ask(batcher, picture((r, g, 7), size)), (r, g, 7)) for r, g, size in asked]
    for answer, colour in answers:
        output = answer.result(20)
        probs, members = output.probs[0], output.member_probs[0]
        assert tuple(probs) == colour
        assert tuple(members[1]) == tuple(2 * c for c in colour)
    batcher.close()
    assert sum(shape[0] for shape in fake.batches) == len(asked)


def test_what_waits_is_batched_by_size_the_oldest_first(batcher: Batcher, fake: Fake) -> None:
    busy = hold(batcher, fake)
    sizes = [(8, 4), (6, 6), (8, 4), (8, 4), (6, 6), (8, 4), (8, 4)]
    waiting = [ask(batcher, picture((i, 0, 0), size)) for i, size in enumerate(sizes)]
    assert batcher.count_waiting() == 7
    fake.gate.set()
    assert [int(f.result(20).probs[0, 0]) for f in waiting] == list(range(7))
    wait(busy)
    assert sorted(fake.small()) == [(1, 4, 8, 3), (2, 6, 6, 3), (4, 4, 8, 3)]


def test_an_idle_batcher_does_not_wait_for_company(batcher: Batcher, fake: Fake) -> None:
    began = time.monotonic()
    ask(batcher, picture((1, 2, 3))).result(20)
    assert time.monotonic() - began < 0.5
    assert fake.batches == [(1, 8, 12, 3)]


def test_images_turned_by_exif_are_not_stacked_with_others(batcher: Batcher, fake: Fake) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    busy = hold(batcher, fake)
    plain, turned = (
        picture((10, 20, 30), (16, 8), "JPEG"),
        picture((10, 20, 30), (16, 8), "JPEG", exif=exif),
    )
    answers = [ask(batcher, content) for content in (plain, turned, plain)]
    fake.gate.set()
    wait([*busy, *answers])
    assert sorted(fake.small()) == [(1, 16, 8, 3), (2, 8, 16, 3)]


def test_large_images_go_alone(
    batcher: Batcher, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "BATCH_PIXELS", 50)
    fake.gate.clear()
    large = [ask(batcher, picture((1, 1, 1), (10, 10))) for _ in range(3)]
    time.sleep(0.2)
    assert fake.most_at_once == 1
    small = ask(batcher, picture((2, 2, 2), (5, 5)))
    while fake.at_once < 2:
        time.sleep(0.001)  # the small one is not held up by the large ones
    fake.gate.set()
    wait([*large, small])
    assert all(shape[0] == 1 for shape in fake.batches)


def test_a_bad_image_fails_alone(batcher: Batcher, fake: Fake) -> None:
    busy = hold(batcher, fake)
    good, broken = picture((9, 9, 9)), picture((9, 9, 9))[:-30]
    answers = [batcher.submit(content, (12, 8)) for content in (good, broken, good)]
    fake.gate.set()
    assert (
        tuple(answers[0].result(20).probs[0]) == tuple(answers[2].result(20).probs[0]) == (9, 9, 9)
    )
    with pytest.raises(DataError):
        answers[1].result(20)
    wait(busy)


def test_a_batch_that_fails_is_tried_one_by_one() -> None:
    class Failing(Fake):
        def __call__(self, images: np.ndarray, policy: CascadePolicy) -> ModelOutput:
            answer = super().__call__(images, policy)
            if len(images) > 1 or images[0, 0, 0, 0] == 13:
                raise ExportError("too much memory")
            return answer

    fake = Failing()
    batcher = Batcher(fake, batch=4)
    busy = hold(batcher, fake)
    answers = [ask(batcher, picture((r, 0, 0))) for r in (12, 13, 14)]
    fake.gate.set()
    assert [answers[0].result(20).probs[0, 0], answers[2].result(20).probs[0, 0]] == [12, 14]
    with pytest.raises(ExportError):
        answers[1].result(20)
    wait(busy)
    batcher.close()


def test_cancelled_images_are_not_answered(batcher: Batcher, fake: Fake) -> None:
    busy = hold(batcher, fake)
    waiting = [ask(batcher, picture((i, 0, 0))) for i in range(3)]
    assert waiting[1].cancel()
    fake.gate.set()
    wait([*busy, waiting[0], waiting[2]])
    assert fake.small() == [(2, 8, 12, 3)]


def test_closing_answers_what_waits_and_takes_no_more(fake: Fake) -> None:
    batcher = Batcher(fake, batch=2)
    busy = hold(batcher, fake)
    waiting = [ask(batcher, picture((i, 0, 0))) for i in range(5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    fake.gate.set()
    closing.join(20)
    assert not closing.is_alive()
    assert [int(f.result(0).probs[0, 0]) for f in waiting] == list(range(5))
    assert all(f.done() for f in busy)
    with pytest.raises(RuntimeError):
        ask(batcher, picture((1, 1, 1)))
