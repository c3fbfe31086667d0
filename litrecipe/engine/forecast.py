"""What a dry run says of the ranks of a run: how they stand, what they exchange, and how long a step would take.

Nothing here needs the devices that are planned for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from litrecipe.config.groups import Fabric as FabricConfig
from litrecipe.config.groups import Quantize, TrainingRecipe
from litrecipe.engine.cost import (
    Collective,
    Layout,
    Member,
    Piece,
    Widths,
    added_up,
    cut_dimension,
    exchanged,
    largest_share,
)
from litrecipe.engine.fabric import devices_of, devices_there
from litrecipe.engine.grid import groups_of
from litrecipe.engine.hardware import KNOWN, Hardware, seconds
from litrecipe.engine.launch import processors
from litrecipe.engine.memory import LAYERS, NF4_BLOCK, can_be_quantised, part_model
from litrecipe.engine.peak import measured_flops
from litrecipe.model.architecture import Architecture
from litrecipe.model.decoder import Decoder, Trunk
from litrecipe.model.flops import Forward, row_flops
from litrecipe.model.hydra import Hydra, of_best
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import Row
from litrecipe.model.tensor_plan import held_of

OF_A_NODE = 8
"""Devices of a node of known hardware, where nobody says how many."""
ADAM_BYTES = 28
"""Read and written by the optimizer for each trained number: weight, gradient and two moments, all but the gradient
back again."""


def device_of(config: FabricConfig) -> str:
    """`cpu`, `cuda` or `mps`: what a recipe plans for, whether it is there or not."""
    if config.hardware != "here":
        return "cuda"
    if config.accelerator != "auto":
        return config.accelerator
    return "cuda" if torch.cuda.is_available() else "cpu"


def layout_of(config: FabricConfig) -> Layout:
    """How the ranks of a recipe stand, whether they are there or not."""
    kind = device_of(config)
    if config.devices != "auto":
        devices = config.devices
    elif config.hardware != "here":
        devices = OF_A_NODE
    else:
        devices = devices_of(config) if kind == "cpu" else max(1, devices_there(kind))
    groups = groups_of(config, devices * config.num_nodes)
    return Layout(
        devices=devices,
        nodes=config.num_nodes,
        tensor=config.tensor_parallel,
        sharded=config.strategy == "fsdp" or (config.tensor_parallel > 1 and groups > 1),
        reshard=config.reshard_after_forward,
    )


def hardware_of(config: FabricConfig) -> Hardware | None:
    """What a recipe plans for; None for a GPU of which nothing is known here."""
    kind = device_of(config)
    if config.hardware != "here":
        return KNOWN[config.hardware]
    if kind == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower()
        return next((one for key, one in KNOWN.items() if key.partition("-")[0] in name), None)
    return this_cpu(layout_of(config).devices) if kind == "cpu" else None


def this_cpu(ranks: int = 1) -> Hardware:
    """What one of so many ranks has of this machine's processor, whose products are timed now. What ranks exchange over
    gloo is taken to be as fast as between two on two cores (`benchmarks/results/scaling.json`): 16.8 MB sent in 35 ms,
    1 KB in 0.36 ms."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    share = min(1.0, processors() / (ranks * torch.get_num_threads()))
    half, full = (share * measured_flops(dtype) for dtype in (torch.bfloat16, torch.float32))
    return Hardware(
        "here",
        half,
        full,
        float(memory),
        bandwidth=10e9,
        link=0.48e9,
        network=0.48e9,
        host=10e9,
        attained=0.63,
        carried=1.0,
        link_hop=3.6e-4,
        network_hop=3.6e-4,
        base=1e-4,
        alone=True,
    )


def members_of(module: nn.Module, recipe: TrainingRecipe, ranks: int, *, asked: int = 0) -> list[Member]:
    """The models of a module on the meta device that learn, see `engine.memory.meta_model`, and how often each is
    `asked` about a row besides."""
    models = [part for part in module.modules() if isinstance(part, Trunk)]
    return [member_of(model, recipe.fabric, recipe.quantize, ranks, asked=asked) for model in models]


def member_of(model: Trunk, config: FabricConfig, quantised: Quantize, ranks: int, *, asked: int = 0) -> Member:
    """One transformer, cut as `engine.sharding.shard` does."""
    layers: dict[str, list[Piece]] = {}
    rest: list[Piece] = []
    for name, parameter in model.named_parameters():
        _, is_layer, inside = name.partition(LAYERS)
        unit = layers.setdefault(inside.partition(".")[0], []) if is_layer else rest
        unit += pieces_of(name, parameter, config, quantised, ranks)
    learns = any(parameter.requires_grad for parameter in model.parameters())
    units = tuple(map(tuple, layers.values()))
    return Member(units, tuple(rest), learns, asked, isinstance(model, Decoder), frozen_reads(model))


def frozen_reads(model: Trunk) -> int:
    """How many of the first that attention and MLPs read need no gradient: below them neither embedding nor adapters
    learn."""
    if model.model.embed_tokens.weight.requires_grad:
        return 0
    own = model.model.named_parameters()
    attends = any(parameter.requires_grad for name, parameter in own if name.startswith("layers.0.self_attn."))
    return 1 if attends and not model.architecture.parallel else 2


def pieces_of(name: str, parameter: nn.Parameter, config: FabricConfig, quantised: Quantize, ranks: int) -> list[Piece]:
    """A parameter as it is gathered and reduced. In NF4 two numbers lie in a byte, each block has a scale, and each
    expert is a parameter of its own."""
    weight = gradient = parameter.element_size()
    if config.is_sharded:
        weight = 2 if config.param_dtype == "bfloat16" else weight
        gradient = 2 if config.reduce_dtype == "bfloat16" else 4
    if quantised.method == "nf4" and can_be_quantised(name, parameter) and not parameter.requires_grad:
        matrices = parameter.shape[0] if parameter.ndim == 3 else 1
        count, scale = parameter.numel() // matrices, 1 if quantised.double_quant else 4
        return [Piece(-(-count // 2), 1, 1, 0), Piece(-(-count // NF4_BLOCK) * scale, 1, 1, 0)] * matrices
    rows = parameter.shape[cut_dimension(parameter.shape, ranks)]
    return [Piece(rows, parameter.numel() // rows, weight, gradient if parameter.requires_grad else 0)]


@dataclass(frozen=True)
class Work:
    """Operations of a row on one rank."""

    forward: Forward
    """Of the model that learns."""
    asked: float = 0.0
    """Of all passes without gradient."""
    frozen: bool = False
    """Whether the weights do not learn, but an adapter: the way back then costs one product of each, not two."""
    again: float = 0.0
    """Share of the layers' operations that is done once more on the way back (activation checkpointing: all)."""
    trained: int = 0
    """Numbers that the optimizer of this rank moves."""

    @property
    def back(self) -> float:
        """Of the backward pass. The head of a model that is trained computes its logits again; a frozen one has its
        gradient from the forward pass."""
        layers = (1 if self.frozen else 2) + self.again
        return layers * self.forward.layers + (0 if self.frozen else 3) * self.forward.head

    @property
    def ahead(self) -> float:
        """Of the forward pass; a frozen head computes its gradient there."""
        return self.forward.layers + (2 if self.frozen else 1) * self.forward.head + self.asked


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    arithmetic: float
    waiting: float
    """For what is exchanged, while nothing is computed."""
    optimizer: float

    @property
    def total(self) -> float:
        """All together."""
        return self.arithmetic + self.waiting + self.optimizer


def step_time(work: Work, collectives: Sequence[Collective], hardware: Hardware, *, rows: int, half: bool) -> StepTime:
    """Of a step of so many rows a rank, for each of which it does `work`.

    A layer's weights travel while the one before it is computed, and its gradients while the next one is: of a pass
    there is waiting for the first of these, or as long as exchanging takes longer than computing.
    """
    rate = hardware.peak(half=half) * hardware.attained
    waiting = 0.0
    for phase, operations in (("forward", work.ahead), ("backward", work.back), ("step", 0.0)):
        of_phase = [one for one in collectives if one.phase == phase]
        computing = operations / rate
        open_ = sum(one.times * seconds(one, hardware) for one in of_phase if not one.hidden or hardware.alone)
        hidden = [one for one in of_phase if one.hidden and not hardware.alone]
        meanwhile = sum(one.times * seconds(one, hardware) for one in hidden)
        edge = rows * sum(seconds(one, hardware) for one in {one.kind: one for one in hidden}.values())
        waiting += open_ + min(meanwhile, edge) + max(0.0, meanwhile - edge - rows * computing)
    return StepTime(rows * (work.ahead + work.back) / rate, waiting, ADAM_BYTES * work.trained / hardware.bandwidth)


class Beside(NamedTuple):
    """A model that is asked beside what learns, and learns nothing."""

    model: Trunk
    """On the meta device."""
    asked: int
    """How often about each row."""
    quantised: Quantize


@dataclass(frozen=True)
class Forecast:
    """What is to be expected of a step."""

    layout: Layout
    collectives: list[Collective]
    time: StepTime | None
    """None where nothing is known of the hardware."""
    tokens: float
    """Of a step, over all ranks."""
    mfu: float | None
    """Share of the devices' peak that goes into what is asked of the model; None where an adapter learns."""


def forecast(
    recipe: TrainingRecipe,
    architecture: Architecture,
    row: Row,
    *,
    rows: int,
    tokens: float,
    hardware: Hardware | None,
    asked: int = 0,
    beside: Sequence[Beside] = (),
    again: float | None = None,
) -> Forecast:
    """Of a recipe whose ranks take `rows` rows like `row` in a step of so many `tokens` over all of them.

    `asked`: how often what learns is asked about each row besides, without gradient. `again`: what share of the layers
    is computed again on the way back, if that is not as the recipe says.
    """
    config, layout = recipe.fabric, layout_of(recipe.fabric)
    module = part_model(recipe, architecture)
    learning = members_of(module, recipe, layout.data, asked=asked)
    standing = [member_of(one.model, config, one.quantised, layout.data, asked=one.asked) for one in beside]
    again = float(config.activation_checkpointing) if again is None else again
    collectives = exchanged([*learning, *standing], layout, rows)
    places, said = read_of(module, row)
    widths = widths_of(config, architecture, row, places, said)
    collectives += added_up([*learning, *standing], layout, widths, rows, again=again > 0)
    collectives += shares_of(module, layout)
    if hardware is None:
        return Forecast(layout, collectives, None, tokens, None)
    own = row_flops(architecture, row)
    own = own._replace(head=own.head * said / max(1, len(row.target)))
    of_others = sum(one.asked * sum(row_flops(one.model.architecture, row)) for one in beside)
    share = tokens / (layout.data * rows * len(row.tokens)) / layout.tensor
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    work = Work(
        Forward(own.layers * share * len(learning), own.head * share),
        asked=(asked * sum(own) + of_others) * share,
        frozen=recipe.adapter.method != "none",
        again=again,
        trained=trained // layout.shards,
    )
    half = config.precision != "32-true"
    time = step_time(work, collectives, hardware, rows=rows, half=half)
    asked_for = 3 * rows * layout.world * sum(work.forward)
    mfu = None if work.frozen else asked_for / (layout.world * hardware.peak(half=half) * time.total)
    return Forecast(layout, collectives, time, tokens, mfu)


def read_of(module: nn.Module, row: Row) -> tuple[int, int]:
    """Of how many places of a row the last layer is computed, and how many go through a language model's head."""
    model = next(part for part in module.modules() if isinstance(part, Trunk))
    if isinstance(model, Hydra):
        said = len(of_best(row).target)
        return said + len(row.answers), said
    return (len(row.answers), 0) if isinstance(model, RewardModel) else (len(row.target), len(row.target))


def widths_of(config: FabricConfig, architecture: Architecture, row: Row, places: int, said: int) -> Widths:
    """Of what ranks that share each layer add up, see `read_of`. Under autocast the residual stream is as wide as the
    weights, what products give is not."""
    stream = 2 if config.precision == "bf16-true" or config.param_dtype == "bfloat16" else 4
    written = 4 if config.precision == "32-true" else 2
    return Widths(len(row.tokens), places, said, architecture.hidden_size, stream, written)


def shares_of(module: nn.Module, layout: Layout) -> list[Collective]:
    """What `engine.gradients.add_up_shares` adds up once a step."""
    size = sum(
        round(p.numel() * largest_share(p.shape, layout.shards)) * p.element_size()
        for p in module.parameters()
        if p.requires_grad and held_of(p).is_share
    )
    inside = min(layout.tensor, layout.devices)
    found = Collective("all-reduce", "gradients", "step", layout.tensor, inside, size, hidden=False)
    return [found] if size else []
