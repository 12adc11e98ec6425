"""The costs of large data: complete recipes, arithmetic that adds up, the page's own tables."""

from __future__ import annotations

import pytest
import scale_costs
from scale_costs import WORKLOADS, Machines, cost, passes, tables
from support.paths import ROOT

from threefold.recipe.recipe import Recipe


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.recipe)
def test_more_gpus_take_less_time_and_more_gpu_hours(workload: scale_costs.Workload) -> None:
    one, eight, many = (cost(workload, gpus, Machines()) for gpus in (1, 8, 64))

    assert one.training > eight.training > many.training
    assert one.hours < 8 * eight.hours < 64 * many.hours
    assert 1 >= one.busy >= eight.busy >= many.busy > 0


def test_passes_count_folds_epochs_and_rows() -> None:
    stages = [{"name": "s", "epochs": 3, "lr": 1e-3}]
    members = [{"name": "m", "backbone": "resnet50"}]
    tree = {"name": "r", "data": {"root": "x"}, "stages": stages, "members": members}
    folds = {"k": 4, "select": 0.2}
    workload = scale_costs.Workload("w", "", images=1000, test=100, jpeg_bytes=1, megapixels=0.2)

    trained, answered = passes(Recipe.parse({**tree, "folds": folds}), workload)

    assert trained == pytest.approx(4 * 600 * 3)  # 750 rows of four folds, less a fifth
    assert answered == pytest.approx(4 * (150 * 4 + 250 + 100))


def test_a_slow_disk_is_what_training_waits_for() -> None:
    slow = cost(WORKLOADS[1], 8, Machines(disk=1e8))

    assert slow.limit == "disk of the cache"
    assert slow.training > cost(WORKLOADS[1], 8, Machines()).training


def test_the_page_has_the_tables_that_the_command_prints() -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")

    for table in tables([1, 8, 64], Machines()).split("\n\n"):
        assert table in page
