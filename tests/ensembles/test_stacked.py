"""The paper's trained combiner, and the same shrunk toward the mean."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from support.pools import draw_pool, scored

from threefold.ensembles import stacked
from threefold.ensembles.averaging import MeanEnsemble
from threefold.ensembles.stacked import SHARES, ShrunkStackedEnsemble, StackedEnsemble
from threefold.errors import DataError


def small(seed: int = 0) -> StackedEnsemble:
    return StackedEnsemble(64, epochs=30, lr=1e-2, seed=seed)


def test_other_classes_with_the_same_product_are_refused() -> None:
    ensemble = small().fit(*scored(m=3, k=4))

    with pytest.raises(DataError, match="fitted on other classes; expected 4, got 3"):
        ensemble.predict_proba(scored(m=4, k=3)[0])


def test_the_stacked_network_is_the_papers() -> None:
    probs, labels = scored(n=20, k=10)

    module = StackedEnsemble(epochs=1).fit(probs, labels).to_module()

    assert sum(p.numel() for p in module.parameters()) == 167_946
    assert [type(layer).__name__ for layer in module] == [
        "Flatten",
        "Linear",
        "LeakyReLU",
        "Dropout",
        "Linear",
        "Softmax",
    ]
    assert (module[2].negative_slope, module[3].p, module.training) == (0.2, 0.5, False)


def test_dropout_is_one_half(monkeypatch: pytest.MonkeyPatch) -> None:
    flips = stacked.dropout_mask(np.random.default_rng(0), (333, 301))

    assert flips.shape == (333, 301)
    assert set(np.unique(flips)) == {0, 1}
    assert flips.mean() == pytest.approx(0.5, abs=0.01)

    # With everything dropped no gradient passes the hidden layer; with nothing dropped it does.
    probs, labels = scored()
    fits = []
    for mask in (np.zeros, np.ones):
        monkeypatch.setattr(
            stacked, "dropout_mask", lambda _, shape, mask=mask: mask(shape, np.uint8)
        )
        fits += [
            StackedEnsemble(16, epochs=epochs, lr=0.1).fit(probs, labels).state()
            for epochs in (0, 2)
        ]
    untouched = {name: (fits[0][name] == fits[1][name]).all() for name in fits[0]}
    assert untouched == {
        "hidden_weight_": True,
        "hidden_bias_": True,
        "output_weight_": True,
        "output_bias_": False,
    }
    assert not any((fits[2][name] == fits[3][name]).all() for name in fits[2])


def test_stacking_learns_what_no_average_can() -> None:
    """One member has two classes swapped: right for the stacker, poison for the mean."""
    probs, labels = scored(m=2, n=600, seed=1)
    probs[1] = probs[1][:, [1, 0, 3, 2]]
    fit, new = slice(0, 400), slice(400, 600)

    ensemble = StackedEnsemble(256, epochs=60, lr=1e-3).fit(probs[:, fit], labels[fit])

    learned = (ensemble.predict(probs[:, new]) == labels[new]).mean()
    assert learned > (MeanEnsemble().predict(probs[:, new]) == labels[new]).mean() + 0.1
    assert learned >= (probs[:, new].argmax(-1) == labels[new]).mean(1).max()


def test_shuffled_labels_leave_it_at_chance() -> None:
    probs, labels = scored(n=300)
    shuffled = np.random.default_rng(0).permutation(labels)

    ensemble = StackedEnsemble(64, epochs=3).fit(probs[:, :200], shuffled[:200])
    answers = ensemble.predict(probs[:, 200:])

    assert abs((answers == shuffled[200:]).mean() - 0.25) < 0.15


def test_a_long_input_is_answered_in_blocks() -> None:
    probs, labels = scored(n=50)
    ensemble = small().fit(probs, labels)

    answers = ensemble.predict_proba(np.tile(probs, (1, 170, 1)))

    assert answers[8150:8200] == pytest.approx(ensemble.predict_proba(probs), abs=1e-6)


def test_the_share_is_large_where_the_mean_is_poison() -> None:
    probs, labels = scored(m=2, n=600, seed=1)
    probs[1] = probs[1][:, [1, 0, 3, 2]]

    ensemble = ShrunkStackedEnsemble(128, epochs=60, lr=1e-3).fit(probs, labels)

    assert ensemble.share_ >= 0.8


def test_members_that_know_nothing_leave_the_mean() -> None:
    probs, labels = np.full((2, 150, 4), 0.25), np.random.default_rng(0).integers(0, 4, 150)

    ensemble = ShrunkStackedEnsemble(16, epochs=2).fit(probs, labels)

    assert ensemble.share_ == 0
    assert (ensemble.predict_proba(probs) == 0.25).all()


def test_a_share_mixes_the_papers_network_with_the_mean() -> None:
    probs, labels = scored()

    ensemble = ShrunkStackedEnsemble(64, epochs=30, lr=1e-2).fit(probs, labels)

    assert float(ensemble.share_) in SHARES

    network = small().fit(probs, labels).predict_proba(probs)
    mean = MeanEnsemble().predict_proba(probs)
    assert ensemble.predict_proba(probs) == pytest.approx(
        ensemble.share_ * network + (1 - ensemble.share_) * mean
    )


def test_an_overfitted_network_is_shrunk() -> None:
    """After many steps on a hundred rows the network is overconfident and worse than the mean."""
    probs, labels, new, truth = draw_pool("equal", 0, n=100, test=1000)
    kinds = [kind(64, epochs=100, lr=1e-2) for kind in (ShrunkStackedEnsemble, StackedEnsemble)]
    shrunk, full, mean = (e.fit(probs, labels) for e in (*kinds, MeanEnsemble()))

    loss = [
        -np.log(e.predict_proba(new)[np.arange(1000), truth] + 1e-7).mean()
        for e in (shrunk, full, mean)
    ]

    assert shrunk.share_ < 0.5
    assert loss[0] < loss[2] < loss[1]

    same, labels, _, _ = draw_pool("null", 0, n=100, test=1)
    assert ShrunkStackedEnsemble(64, epochs=100, lr=1e-2).fit(same, labels).share_ == 0


def test_the_short_fit_gives_the_same_form(monkeypatch: pytest.MonkeyPatch) -> None:
    probs, labels, new, truth = draw_pool("varied", 0, n=2000, test=1000, m=20)
    monkeypatch.setattr(stacked, "ROWS", 2000)
    monkeypatch.setattr(stacked, "STEPS", 30)
    ensemble = StackedEnsemble(512)

    steps = list(ensemble.batches(np.random.default_rng(0), 2000, short=True))

    assert len(steps) == 30
    assert sorted(np.concatenate(steps[:10])) == list(range(2000))

    ensemble.fit(probs, labels)

    assert ensemble.hidden_weight_.shape == (512, 200)
    assert np.linalg.matrix_rank(ensemble.hidden_weight_) == stacked.RANK
    accuracy = (ensemble.predict(new) == truth).mean()
    assert accuracy > (MeanEnsemble().predict(new) == truth).mean() + 0.05

    full = StackedEnsemble(512, epochs=1).fit(probs, labels)  # explicit epochs: no short fit

    assert np.linalg.matrix_rank(full.hidden_weight_) > stacked.RANK

    with torch.inference_mode():
        answers = ensemble.to_module()(torch.tensor(new.swapaxes(0, 1))).numpy()

    assert answers == pytest.approx(ensemble.predict_proba(new), abs=1e-5)


def test_few_members_or_rows_get_the_full_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    short_fits = []
    monkeypatch.setattr(
        StackedEnsemble, "batches", lambda self, rng, n, short: short_fits.append(short) or iter(())
    )

    for m, n in ((3, stacked.ROWS), (17, stacked.ROWS - 1), (17, stacked.ROWS)):
        probs = np.full((m, n, 10), 0.1, np.float32)
        StackedEnsemble(8).fit(probs, np.arange(n) % 10)

    assert short_fits == [False, False, True]


def test_a_fit_takes_the_steps_that_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights, rows and dropout through autograd and torch.optim.Adam."""
    probs, labels = scored(n=90)
    start = StackedEnsemble(16, epochs=0).fit(probs, labels).to_module()
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    plain_gradients = stacked.gradients

    def record(
        network: list[np.ndarray], inputs: np.ndarray, truth: np.ndarray, mask: np.ndarray
    ) -> list[np.ndarray]:
        steps.append((inputs, mask))
        return plain_gradients(network, inputs, truth, mask)

    monkeypatch.setattr(stacked, "gradients", record)

    state = StackedEnsemble(16, epochs=4, lr=1e-2, batch_size=30).fit(probs, labels).state()

    assert len(steps) == 12
    table = probs.swapaxes(0, 1).reshape(90, -1)
    optimizer = torch.optim.Adam(start.parameters(), lr=1e-2, eps=1e-7)
    for inputs, mask in steps:
        truth = labels[[int((table == row).all(1).argmax()) for row in inputs]]
        logits = start[4](start[2](start[1](torch.tensor(inputs))) * 2 * torch.tensor(mask))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, torch.tensor(truth)).backward()
        optimizer.step()
    for ours, theirs in zip(state.values(), start.parameters(), strict=True):
        assert ours == pytest.approx(theirs.detach().numpy(), abs=1e-5)


def test_first_weights_are_keras() -> None:
    bound = (6 / 400) ** 0.5

    kernel = stacked.glorot_uniform(np.random.default_rng(0), 300, 100)

    assert kernel.dtype == np.float32
    assert abs(kernel).max() == pytest.approx(bound, rel=1e-3)
    assert kernel.std() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert kernel.mean() == pytest.approx(0, abs=1e-3)


@pytest.mark.slow
def test_a_fit_and_its_answers_need_no_torch() -> None:
    code = """if True:
        import sys
        import numpy as np
        from threefold.ensembles.registry import make_ensemble
        probs = np.full((2, 6, 3), 1 / 3)
        for name in ("stacked", "stacked-shrunk"):
            make_ensemble(name).fit(probs, [0, 1, 2, 0, 1, 2]).predict_proba(probs)
        assert "torch" not in sys.modules
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
