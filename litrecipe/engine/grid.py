"""How the ranks of a run stand: those of a row compute one copy of a model together (tensor parallelism) and see the
same data; the rows share the data (data parallelism).

Rank r stands in row r // t at place r % t, with t = `fabric.tensor_parallel`: a row's ranks are neighbours, so that
those that talk most are on one node.
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

    rank: int
    """Number of its row: which share of the data it sees."""
    rows: int
    tensor: Group | None = None
    """Its row, where that has several ranks."""
    across: dist.ProcessGroup | None = None
    """The ranks of its place in all rows; None: all ranks."""

    @property
    def in_row(self) -> int:
        """Ranks of a row."""
        return 1 if self.tensor is None else self.tensor.size


def grid_of(fabric: Fabric) -> Grid:
    """That of a run."""
    mesh: DeviceMesh | None = getattr(fabric.strategy, "device_mesh", None)
    if mesh is None or mesh["tensor_parallel"].size() == 1:
        return Grid(fabric.global_rank, fabric.world_size)
    data = mesh["data_parallel"]
    return Grid(data.get_local_rank(), data.size(), row_of(mesh), data.get_group())


def row_of(mesh: DeviceMesh) -> Group | None:
    """The ranks that share a copy of a model; None where each has its own."""
    row = mesh["tensor_parallel"]
    return None if row.size() == 1 else Group(row.get_local_rank(), row.size(), row.get_group())


def rows_of(config: FabricConfig, world: int) -> int:
    """How many rows so many ranks stand in. Raises InputError where they do not come out even."""
    size = config.tensor_parallel
    if world % size:
        cure = "give a divisor of it, or other fabric.devices or fabric.num_nodes"
        raise InputError(f"fabric.tensor_parallel: {size}: the run has {world} processes: {cure}")
    return world // size
