"""Devices: the recipe's `fabric` group turned into a Lightning Fabric, and what ranks need from one another."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property, partial
from threading import Timer
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from litrecipe.checkpoint.state import Writer
from litrecipe.config import stop
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Fabric as FabricConfig
from litrecipe.config.progress import say, tell_past_buffers
from litrecipe.engine.allocation import join, meeting_place, refuse_plain_start, tasks_per_node
from litrecipe.engine.grid import Grid, grid_of, groups_of
from litrecipe.engine.sharding import distribute
from litrecipe.model.decoder import Trunk
from litrecipe.model.tensor_plan import check_divides

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")


M = TypeVar("M", bound=Trunk)

MEETS = 20.0
"""Seconds in which ranks meet where nothing is amiss."""
SLOWEST = timedelta(hours=2)
"""How long ranks wait for one of them, which may read a large checkpoint alone; of one that died they are told."""


def make_fabric(config: FabricConfig, loggers: list[Any] | None = None) -> Fabric:
    """Build Fabric, and let this rank meet the others, which `engine.launch` or another launcher started."""
    with _without_torchmetrics():
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import ModelParallelStrategy

        from litrecipe.engine.copies import Copies
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # its own six lines about that ranks have met

    refuse_plain_start()
    join(devices_of(config), config.num_nodes)
    _refuse_lonely_node(config)
    world, accelerator = world_size(config), accelerator_of(config)
    strategy: Any = "auto"
    size = data_size(config)
    if config.is_sharded:
        strategy = ModelParallelStrategy(
            parallelize_fn=partial(distribute, config=config),
            data_parallel_size=size,
            tensor_parallel_size=config.tensor_parallel,
            save_distributed_checkpoint=False,
            timeout=SLOWEST,
            # What lies in main memory is added up there.
            process_group_backend="cpu:gloo,cuda:nccl" if config.cpu_offload and accelerator == "cuda" else None,
        )
    elif config.strategy == "ddp" or world > 1:
        strategy = Copies(timeout=SLOWEST)
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices_of(config),
        num_nodes=config.num_nodes,
        strategy=strategy,
        # Under bf16-true the model comes in bf16; Fabric's own plugin would take the fp32 adapters along.
        precision="bf16-mixed" if config.precision == "bf16-mixed" else "32-true",
        loggers=loggers or [],
    )
    if world == 1:
        fabric.launch()
        return fabric
    with _told_if_slow(f"waiting for the other ranks at {meeting_place()}"):
        fabric.launch()
    say(f"{world} processes work together ({torch.distributed.get_backend()})")
    return fabric


@contextmanager
def _told_if_slow(waiting: str) -> Iterator[None]:
    """What the first rank of each machine says where that takes long: all of them may wait for another."""
    timer = Timer(MEETS, tell_past_buffers, [f"litrecipe: {waiting}\n"])
    timer.daemon = True
    if int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _without_torchmetrics() -> Iterator[None]:
    """Inside, torchmetrics cannot be imported. Where it is installed Fabric imports it for its version, which only its
    detection of spikes asks for, and with it SciPy and parts of transformers: two thirds of the time that it takes."""
    name = "torchmetrics"
    is_hidden = name not in sys.modules
    if is_hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if is_hidden:
            del sys.modules[name]


def accelerator_of(config: FabricConfig) -> str:
    """`cpu`, `cuda` or `mps`: what `fabric.accelerator` means here. Raises InputError when it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if config.accelerator == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if not there[config.accelerator]:
        raise InputError(f"fabric.accelerator: {config.accelerator}: torch finds none on this machine: use cpu or auto")
    return config.accelerator


def devices_of(config: FabricConfig) -> int:
    """Processes of one node. Raises InputError when there are fewer GPUs than that."""
    accelerator = accelerator_of(config)
    if accelerator == "cpu":
        started = int(os.environ.get("LOCAL_WORLD_SIZE") or tasks_per_node() or 1)
        return started if config.devices == "auto" else config.devices
    there = devices_there(accelerator)
    if config.devices == "auto":
        return there
    if config.devices > there:
        raise InputError(f"fabric.devices: {config.devices}: torch finds {there} on this machine: give at most that")
    return config.devices


def devices_there(accelerator: str) -> int:
    """Devices of a kind that this machine has."""
    return torch.cuda.device_count() if accelerator == "cuda" else 1


def world_size(config: FabricConfig) -> int:
    """Processes of the whole run."""
    return devices_of(config) * config.num_nodes


def data_size(config: FabricConfig) -> int:
    """How many processes, or groups that share a copy of a model, see data of their own."""
    return groups_of(config, world_size(config))


def _refuse_lonely_node(config: FabricConfig) -> None:
    """A node that nobody told where the others are would wait for them for ever."""
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    told = SLURMEnvironment.detect() or TorchElasticEnvironment.detect() or "MASTER_ADDR" in os.environ
    if config.num_nodes > 1 and not told:
        raise InputError(
            f"fabric.num_nodes: {config.num_nodes}: nothing says where the other nodes are: start with srun or "
            "torchrun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK on each"
        )


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "connection was")
"""What gloo, NCCL and the store that ranks meet at say of one that is gone."""


def is_left_alone(error: RuntimeError) -> bool:
    """Whether an error says no more than that another rank is gone."""
    meets = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (meets or isinstance(error, torch.distributed.DistNetworkError)) and any(one in str(error) for one in LOST)


def left_alone(error: RuntimeError) -> int:
    """Say so in a line; the exit code of a rank that was asked to stop is that of the stop, as the others' was."""
    said = str(error).splitlines()[0]
    first = next((one for one in LOST if one in said), said)
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "?"
    print(f"litrecipe: rank {rank}: another rank is gone ({first})", file=sys.stderr, flush=True)
    number = stop.requested()
    return 1 if number is None else int(stop.Stopped(number).code or 0)


def leave() -> None:
    """End the process group of a run that is over on all ranks, or was stopped: its threads must not meet the end of
    the interpreter, which now and then aborts a rank that has done everything."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def on_first_rank(fabric: Fabric, act: Callable[[], T]) -> T:
    """What `act` returns on the first rank, told to all; the mistakes it finds are told to all too."""
    found: Any = None
    mistakes: list[str] = []
    if fabric.global_rank == 0:
        try:
            found = act()
        except InputError as error:
            mistakes = error.mistakes
    found, mistakes = fabric.broadcast((found, mistakes))
    if mistakes:
        raise InputError(*mistakes)
    return cast(T, found)


def sums(fabric: Fabric, values: dict[str, float]) -> dict[str, float]:
    """Each value summed over the ranks, those that share a copy of a model taken for one; all must bring the same
    names."""
    grid = grid_of(fabric)
    if grid.data_size == 1 or not values:
        return values
    names = sorted(values)
    total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=fabric.device)
    torch.distributed.all_reduce(total, group=grid.across)
    return dict(zip(names, total.tolist(), strict=True))


def tensor_sums(fabric: Fabric, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As `sums`, of tensors; all must bring the same names and shapes."""
    grid = grid_of(fabric)
    if grid.data_size == 1 or not values:
        return values
    flat = torch.cat([values[name].flatten().float() for name in sorted(values)])
    torch.distributed.all_reduce(flat, group=grid.across)
    parts = flat.split([values[name].numel() for name in sorted(values)])
    return {name: part.view(values[name].shape) for name, part in zip(sorted(values), parts, strict=True)}


def maxima(fabric: Fabric, values: dict[str, float]) -> dict[str, float]:
    """Each value's maximum over the ranks; some may bring fewer names than others."""
    of_ranks = gather(fabric, values)
    return {name: max(found[name] for found in of_ranks if name in found) for name in sorted(set().union(*of_ranks))}


def stop_requested(fabric: Fabric) -> int | None:
    """The signal any rank was sent, agreed on by all."""
    mine = stop.requested() or 0
    if fabric.world_size == 1:
        return mine or None
    flag = torch.tensor(mine, device=fabric.device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return int(flag) or None


def gather(fabric: Fabric, value: Any, group: Any = None) -> list[Any]:
    """What each rank brings, on all of them."""
    if fabric.world_size == 1:
        return [value]
    values: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def gather_data(fabric: Fabric, value: Any) -> list[Any]:
    """The same of those that see different data: of ranks that share a copy of a model the first speaks."""
    return gather(fabric, value)[:: grid_of(fabric).tensor_size]


def checkpoint_writer(fabric: Fabric, sharded: bool) -> Writer:
    """How the ranks of this run write a checkpoint together."""
    return Writer(rank=fabric.global_rank, sharded=sharded, gather=partial(gather, fabric))


def background_writer(fabric: Fabric, writer: Writer) -> Writer:
    """The same on a thread beside the training, over connections of its own: every rank must call this."""
    group = torch.distributed.new_group(backend="gloo") if fabric.world_size > 1 else None
    return replace(writer, gather=partial(gather, fabric, group=group))


@dataclass(frozen=True)
class Ranks:
    """Ranks that share a piece of work which takes each of them another time (sampling), and put it together."""

    fabric: Fabric

    @cached_property
    def _grid(self) -> Grid:
        return grid_of(self.fabric)

    @property
    def rank(self) -> int:
        """Whose share of the work this process does; those that share a copy of a model do the same."""
        return self._grid.data_rank

    @property
    def world(self) -> int:
        """Shares."""
        return self._grid.data_size

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.fabric.world_size == 1

    @property
    def writes(self) -> bool:
        """Whether this process writes what all know."""
        return self.fabric.global_rank == 0

    @property
    def share_models(self) -> bool:
        """Whether no rank has a whole model: then all must make each pass of one together."""
        from lightning_fabric.strategies import ModelParallelStrategy

        return not self.alone and isinstance(self.fabric.strategy, ModelParallelStrategy)

    def place(self, model: M, config: FabricConfig) -> M:
        """Cut and fill a model that is asked only. Raises InputError where it cannot be split evenly."""
        check_divides(model.architecture, config.tensor_parallel, f"a {model.architecture.family} model that is asked")
        distribute(model, cast(Any, self.fabric.strategy).device_mesh, config)
        return model

    def most(self, mine: int) -> int:
        """The largest of the numbers that ranks bring."""
        if self.alone:
            return mine
        found = torch.tensor(mine, device=self.fabric.device)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        return int(found)

    def agree(self, value: Any) -> list[Any]:
        """What comes of each share, on all ranks. Raises `Stopped` on all when one was asked to stop."""
        found = gather(self.fabric, (value, stop.requested()))
        if not self.alone and (signals := [number for _, number in found if number is not None]):
            raise stop.Stopped(max(signals))
        return [brought for brought, _ in found[:: self._grid.tensor_size]]

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, this rank does a share of its own, which a stop cuts short; the others learn of that where they agree
        next, so nothing inside may ask them. Layers that ranks share are computed together, and to the end."""
        try:
            with stop.interruptible((lambda: None) if self.share_models else stop.requested):
                yield
        except stop.Stopped:
            self.agree(None)  # raises on all of several ranks
            raise
