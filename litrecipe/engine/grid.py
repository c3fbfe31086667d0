"""How the ranks of a run stand: t of them, `fabric.tensor_parallel`, compute one copy of a model together and see the
same data (tensor parallelism); such groups share the data (data parallelism).

Rank r has place r % t in group r // t: a group's ranks are neighbours, so that those that talk most are on one node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Fabric as FabricConfig
from litrecipe.model.group import Group

if TYPE_CHECKING:
    import torch.distributed as dist
    from lightning_fabric import Fabric
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Grid:
    """This process's place."""

    data_rank: int
    """Which share of the data it sees."""
    data_size: int
    """How many there are."""
    tensor: Group | None = None
    """The ranks that compute a copy of the model with it; None where it does so alone."""
    across: dist.ProcessGroup | None = None
    """The ranks of its place in all groups; None: all ranks."""

    @property
    def tensor_size(self) -> int:
        """Ranks of a group."""
        return 1 if self.tensor is None else self.tensor.size


def grid_of(fabric: Fabric) -> Grid:
    """That of a run."""
    mesh: DeviceMesh | None = getattr(fabric.strategy, "device_mesh", None)
    if mesh is None or mesh["tensor_parallel"].size() == 1:
        return Grid(fabric.global_rank, fabric.world_size)
    data = mesh["data_parallel"]
    return Grid(data.get_local_rank(), data.size(), group_of(mesh), data.get_group())


def group_of(mesh: DeviceMesh) -> Group | None:
    """The ranks that compute a copy of a model together; None where each has its own."""
    tensor = mesh["tensor_parallel"]
    return None if tensor.size() == 1 else Group(tensor.get_local_rank(), tensor.size(), tensor.get_group())


def groups_of(config: FabricConfig, world: int) -> int:
    """How many groups so many ranks form. Raises InputError where they do not come out even."""
    size = config.tensor_parallel
    if world % size:
        cure = "give a divisor of it, or other fabric.devices or fabric.num_nodes"
        raise InputError(f"fabric.tensor_parallel: {size}: the run has {world} processes: {cure}")
    return world // size
