"""Where a run is to be executed, as a caller asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Execution:
    """Where the jobs of a run are to be done; no part of the recipe, and of no run's identity.

    Attributes:
        executor: local = processes of this machine, as many as `devices` says.
        devices: how many jobs run at the same time, each on a device of its own; all = as many as
            there are devices; None = what the recipe says (`train.devices`).
    """

    executor: Literal["local"] = "local"
    devices: int | Literal["all"] | None = None
