"""What an answer costs: networks that share a frozen backbone count it once."""

from __future__ import annotations

import pytest
import torch
from support.frozen_runs import GATED, PROBE, frozen_run
from torch.utils.flop_counter import FlopCounterMode

from threefold.ensembles.averaging import MeanEnsemble
from threefold.ensembles.cascade import stages_by_cost
from threefold.models.pipeline import Combiner, Pipeline
from threefold.models.resize import resize_square
from threefold.training.results.costs import RunCosts
from threefold.training.run import Run

ROWS = {**GATED, "name": "rows", "head": {"kind": "gru", "units": 8, "sequence": "rows"}}
SMALL = {**PROBE, "name": "small", "img_size": 24}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three members of two folds, two of them with the same backbone and input size; two views."""
    folder = tmp_path_factory.mktemp("costs")
    return frozen_run(folder, members=[PROBE, ROWS, SMALL], views={"kind": "flip"})


def pipeline_of(run: Run, *names: str) -> Pipeline:
    return run.pipeline(Combiner(MeanEnsemble().to_module()), names)


def count_macs(pipeline: Pipeline) -> int:
    """Count the multiply-adds of the networks for one image."""
    image = torch.zeros(1, 30, 30, 3, dtype=torch.uint8)
    with torch.no_grad(), FlopCounterMode(display=False) as all_steps:
        pipeline.per_fold(image)
    with torch.no_grad(), FlopCounterMode(display=False) as resizes:
        for size in {part.canvas for part in pipeline.parts}:
            resize_square(image, size, "squash")
    return (all_steps.get_total_flops() - resizes.get_total_flops()) // 2


@pytest.mark.parametrize("names", [("probe",), ("rows",), ("probe", "rows"), ("small", "probe")])
def test_the_costs_are_those_of_the_pipeline(run: Run, names: tuple[str, ...]) -> None:
    pipeline = pipeline_of(run, *names)

    cost = RunCosts(run).answer(names)

    assert cost.parameters == sum(p.numel() for p in pipeline.parameters())
    assert cost.macs == count_macs(pipeline)


def test_what_a_second_head_adds_is_a_head(run: Run) -> None:
    costs = RunCosts(run)

    first, second, third = costs.each(["probe", "rows", "small"])

    assert second.parameters == 2 * sum(
        p.numel() for p in run.load_member(run.recipe.member("rows"), 0, 3).head.parameters()
    )
    assert second.macs < 0.2 * first.macs
    assert third.parameters == first.parameters
    assert costs.answer(["probe", "rows"]).bytes == first.bytes + second.bytes


def test_one_network_of_a_member_costs_what_it_did(run: Run) -> None:
    network = run.load_member(run.recipe.member("probe"), 0, 3)

    cost = RunCosts(run).networks["probe"]

    assert cost.parameters == sum(p.numel() for p in network.parameters())


def test_members_on_one_backbone_are_one_stage_of_a_cascade(run: Run) -> None:
    names = ["probe", "rows", "small"]
    costs = RunCosts(run)

    macs = [cost.macs for cost in costs.each(names)]
    stages = stages_by_cost(macs, None, [costs.group(name) for name in names])

    assert sorted(map(sorted, stages)) == [[0, 1], [2]]
    assert stages[0] == [2]  # the smaller images
