"""What an answer of a run's members costs: parameters and multiply-adds over networks and views.

A frozen backbone that several networks share runs once for an image and is in the file once, so it
counts once (see `models.shared`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from threefold.models.flops import Cost, measure_cost, split_cost
from threefold.models.member import Member
from threefold.training.run import Run


class RunCosts:
    """The costs of a run's members.

    Args:
        run: a run whose jobs are done.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def networks(self) -> dict[str, Cost]:
        """The cost of one network of each member on one image without views."""
        return {name: _sum((shared, own)) for name, (shared, own) in self._split.items()}

    @cached_property
    def _split(self) -> dict[str, tuple[Cost, Cost]]:
        """The cost of one network of each member: the part that networks share, and its own."""
        run, costs = self.run, {}
        num_classes = len(run.folder.info.classes)
        for spec in run.recipe.members:
            network = run.build(spec, num_classes)
            if run.recipe.is_frozen(spec.name) and isinstance(network, Member):
                costs[spec.name] = split_cost(network, spec.img_size)
            else:
                costs[spec.name] = (Cost(0, 0, 0), measure_cost(network, spec.img_size))
        return costs

    def answer(self, names: Iterable[str]) -> Cost:
        """Return the cost of an answer of these members together, over all networks and views."""
        return _sum(self.each(list(names)))

    def each(self, names: Sequence[str]) -> list[Cost]:
        """Return what each member adds to the cost of those before it; see `answer`."""
        run, costs = self.run, []
        counted = set()
        for name in names:
            spec = run.recipe.member(name)
            shared, own = self._split[name]
            networks, views = run.networks(spec), max(1, run.views(spec).count)
            parts = [own.times(networks, views)]
            if self.group(name) not in counted:
                counted.add(self.group(name))
                parts.append(shared.times(1, views))
            costs.append(_sum(parts))
        return costs

    def group(self, name: str) -> object:
        """Return a value that is equal for members that share a backbone."""
        spec = self.run.recipe.member(name)
        return self.run.shared_key(spec) if self.run.recipe.is_frozen(name) else name


def _sum(costs: Iterable[Cost]) -> Cost:
    return Cost(*(sum(values) for values in zip(*costs, strict=True)))
