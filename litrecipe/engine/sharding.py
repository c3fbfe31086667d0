"""Models that several processes share: cut on the meta device, then filled, so that none ever holds a whole one.

FSDP2 (2304.11277, per-parameter sharding) cuts every weight along its first dimension, but for experts
(`cost.cut_dimension`). A block is gathered for the time that it works; what is outside of the blocks (embedding, head,
last norm) is gathered with the model it belongs to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from litrecipe.config.groups import Fabric as FabricConfig
from litrecipe.engine.cost import cut_dimension
from litrecipe.engine.grid import group_of
from litrecipe.model.decoder import Decoder, Trunk
from litrecipe.model.reward import RewardModel
from litrecipe.model.tensor_parallel import split
from litrecipe.model.tensor_plan import mark

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard


def distribute(module: nn.Module, mesh: DeviceMesh, config: FabricConfig) -> nn.Module:
    """Parallelise a module in place, then fill it: the one entrance to models that processes share.

    `mesh` has the dimensions `data_parallel` and `tensor_parallel`. Weights on the meta device get values once they
    are cut: each model says by its `fill` where they come from. Every process must call it.
    """
    models = [part for part in module.modules() if isinstance(part, Trunk)]
    heads = second_heads(models)
    if (group := group_of(mesh)) is not None:
        split(module, group)
    models = [model for model in models if model not in heads]
    works_on = _device_of(mesh)
    device = torch.device("cpu") if config.cpu_offload else works_on
    if config.strategy == "fsdp" or mesh["data_parallel"].size() > 1:
        cut(models, heads, mesh["data_parallel"], config)
        for model in models:
            if model.fill is not None:
                give_memory(model, device)
    else:
        give_common_memory(models, device)
        module.to(device)
    mark(module)
    for model in models:
        model.model.works_on = works_on
        if model.fill is not None:
            model.fill(model)
            model.fill = None
    return module


def cut(models: Sequence[Trunk], heads: Sequence[RewardModel], mesh: DeviceMesh, config: FabricConfig) -> None:
    """Cut models, and the scores of those that share theirs, along their first dimensions, each on its own."""
    from torch.distributed.fsdp import fully_shard  # there is nothing to import where it is not used

    unshare(models)
    for model in models:
        shard(model, mesh, config)
    for head in heads:
        fully_shard(head.score, mesh=mesh, **policies(config))


def shard(model: Trunk, mesh: DeviceMesh, config: FabricConfig) -> None:
    """Cut a model along its first dimensions over the processes of a mesh, each decoder block on its own.

    The model is a root, so that a policy beside its reference can be asked alone. What is outside of the blocks stays
    gathered from the forward to the backward pass, where there is one.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    options = policies(config)
    options["shard_placement_fn"] = partial(placement, ranks=mesh.size())
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=config.reshard_after_forward, **options)
    if isinstance(model, RewardModel) and model.score.weight.dtype != model.model.embed_tokens.weight.dtype:
        fully_shard(model.score, mesh=mesh, **policies(config))  # what is exchanged at once is of one dtype
    learns = any(parameter.requires_grad for parameter in model.parameters())
    fully_shard(model, mesh=mesh, reshard_after_forward=not learns, **options)
    register_fsdp_forward_method(model, "within")
    if isinstance(model, Decoder):
        register_fsdp_forward_method(model, "decode")


def placement(parameter: nn.Parameter, ranks: int) -> Shard:
    """How so many processes share out a parameter."""
    from torch.distributed.tensor import Shard

    return Shard(cut_dimension(parameter.shape, ranks))


def policies(config: FabricConfig) -> dict[str, Any]:
    """What `fully_shard` is told of precision and of where the pieces lie."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    precision = MixedPrecisionPolicy(
        param_dtype=dtypes.get(config.param_dtype),
        reduce_dtype=dtypes[config.reduce_dtype],
        cast_forward_inputs=False,  # rotary tables stay in fp32
    )
    if not config.cpu_offload:
        return {"mp_policy": precision}
    return {"mp_policy": precision, "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available())}


def second_heads(models: Sequence[Trunk]) -> list[RewardModel]:
    """Those whose transformer is that of a model before them; only their score is their own."""
    seen: set[nn.Module] = set()
    found = []
    for model in models:
        if model.model in seen:
            assert isinstance(model, RewardModel)
            found.append(model)
        seen.add(model.model)
    return found


@contextmanager
def gathered(model: Trunk, config: FabricConfig) -> Iterator[None]:
    """Inside, every process holds all of a model, and none waits for another. All must enter and leave together."""
    from torch.distributed.fsdp import FSDPModule

    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model and config.reshard_after_forward, recurse=False)
            part.reshard()


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Memory without values for all that is on the meta device; of what is cut, for the piece that is here."""
    for module in model.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=device, recurse=False)


def give_common_memory(models: Iterable[nn.Module], device: torch.device) -> None:
    """The same for several models; what they share they share afterwards."""
    given: dict[nn.Parameter, nn.Parameter] = {}
    for owner in (module for model in models for module in model.modules()):
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                if parameter not in given:
                    values = torch.empty_like(parameter, device=device)
                    given[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                setattr(owner, name, given[parameter])


def unshare(models: Iterable[nn.Module]) -> None:
    """Give each model parameters of its own, in place: FSDP2 shards none twice. Those tied within a model stay so."""
    taken: dict[int, nn.Parameter] = {}
    for model in models:
        own: dict[int, nn.Parameter] = {}
        for owner in model.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if id(parameter) in taken:
                    setattr(owner, name, copy.deepcopy(parameter, own))
        taken |= {id(parameter): parameter for parameter in model.parameters()}


def _device_of(mesh: DeviceMesh) -> torch.device:
    kind = mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.cuda.current_device())
