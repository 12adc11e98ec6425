"""The `cluster` table of a recipe: what a job takes of a cluster (`--executor ray`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from threefold.recipe.schema import Section


class ClusterSpec(Section):
    """What a job takes of a node of a cluster, and what happens when one dies.

    No result depends on it but by the number of threads, so a run can go on with other values."""

    cpus: Annotated[int, Field(ge=0)] = 0
    """Processors and threads of a job (0 = as many threads as training has on this machine)."""
    gpus: Annotated[float, Field(ge=0)] | None = None
    """Accelerators of a job; by default 1 if the cluster has some and train.device allows it."""
    memory_gb: Annotated[float, Field(ge=0)] = 0.0
    """Memory that the cluster keeps free for a job (0 = it does not count)."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a job is done again whose process or node has died."""
    wait_minutes: Annotated[float, Field(ge=0)] = 0.0
    """How long to wait for a first node that can do a job, such as one of an autoscaler."""
