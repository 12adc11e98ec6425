"""Where a run is to be executed, as a caller asks for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Execution:
    """Where the jobs of a run are to be done; no part of the recipe, and of no run's identity.

    Attributes:
        executor: local = processes of this machine, as many as `devices` says; ray = the nodes of a
            Ray cluster.
        address: of the cluster, see `ray_cluster.connected`; empty = RAY_ADDRESS, or else
            a cluster of this machine alone.
        url: of the run, where the run folder here is a copy of one on an object store.
        devices: how many jobs run at the same time, each on a device of its own; all = as many as
            there are devices; None = what the recipe says (`train.devices`).
    """

    executor: Literal["local", "ray"] = "local"
    address: str = ""
    url: str = ""
    devices: int | Literal["all"] | None = None

    def at(self, url: str, devices: int | Literal["all"] | None = None) -> Execution:
        """Return the same for a run of which the run folder here may be a copy.

        Args:
            url: of the run, if its folder is on an object store.
            devices: how many jobs run at the same time, if a caller says so.
        """
        count = self.devices if devices is None else devices
        return replace(self, url=url or self.url, devices=count)
