"""What ranks exchange, against what FSDP2 and the layers that ranks share ask torch for; and how long it takes.

Collectives are counted in one process that believes to be the first of many: torch's `fake` process group does nothing
when it is asked to exchange.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import TINY_CONFIG
from torch.testing._internal.distributed.fake_pg import FakeStore

from litrecipe.config import schema
from litrecipe.config.groups import DpoRecipe
from litrecipe.engine.cost import Collective, Layout, total_bytes
from litrecipe.engine.forecast import Beside, Forward, Work, forecast, layout_of, step_time
from litrecipe.engine.gradients import MESSAGE, add_up_copies, messages
from litrecipe.engine.hardware import KNOWN, seconds
from litrecipe.engine.memory import meta_model
from litrecipe.engine.sharding import distribute
from litrecipe.model.adapters import add_adapter
from litrecipe.model.decoder import Decoder
from litrecipe.model.families import read_architecture
from litrecipe.model.reference import PolicyAndReference, frozen_twin
from litrecipe.model.row import Row, Sample, Segment, make_row

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
MIXTURE = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
TENSOR, SHARDED = {"fabric.tensor_parallel": 2}, {"fabric.strategy": "fsdp"}
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], str]] = {
    "two ranks": (2, SHARDED, {}, ""),
    "64 ranks, most of which have padding": (64, SHARDED, {}, ""),
    "layers stay": (4, SHARDED | {"fabric.reshard_after_forward": False}, {}, ""),
    "layers are computed again": (4, SHARDED | {"fabric.activation_checkpointing": True}, {}, ""),
    "gathered and reduced in bf16": (
        4,
        SHARDED
        | {"fabric.precision": "bf16-mixed", "fabric.param_dtype": "bfloat16", "fabric.reduce_dtype": "bfloat16"},
        {},
        "",
    ),
    "an adapter": (4, SHARDED | {"adapter.method": "lora", "adapter.r": 4}, {}, ""),
    "a copy as reference": (4, SHARDED, {}, "copy"),
    "the base as reference": (4, SHARDED | {"adapter.method": "lora", "adapter.r": 4}, {}, "base"),
    "experts": (4, SHARDED, MIXTURE, ""),
    "more ranks than experts": (16, SHARDED, MIXTURE, ""),
    "shared layers": (2, TENSOR, {}, ""),
    "shared layers, computed again": (2, TENSOR | {"fabric.activation_checkpointing": True}, {}, ""),
    "shared layers in bf16": (2, TENSOR | {"fabric.precision": "bf16-mixed"}, {"tie_word_embeddings": False}, ""),
    "shared layers, shared over data": (8, TENSOR | SHARDED, {}, ""),
    "shared experts": (2, TENSOR, MIXTURE, ""),
}
"""Name → ranks, flags, changes of the model, and what stands beside it."""


@pytest.fixture(scope="module")
def ranks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ranks", BENCHMARKS / "ranks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def world() -> Iterator[Any]:
    def of(size: int) -> None:
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())

    yield of
    dist.destroy_process_group()


def row_of(tokens: int = 100) -> Row:
    weights = np.ones(tokens, dtype=np.float32)
    weights[:8] = 0
    return make_row([Sample("x", (Segment(np.arange(tokens), weights),))])


def recipe_of(ranks: int, flags: dict[str, Any]) -> DpoRecipe:
    given = {"model.source": "m", "data.train": "d", "fabric.accelerator": "cpu", "fabric.devices": ranks} | flags
    return schema.load(DpoRecipe, [], [(key, str(value)) for key, value in given.items()])


@pytest.mark.parametrize("case", CASES)
def test_what_is_reckoned_is_what_torch_is_asked_for(case: str, ranks: ModuleType, world: Any) -> None:
    count, flags, changes, beside = CASES[case]
    recipe, architecture = recipe_of(count, flags), read_architecture(TINY_CONFIG | changes)
    layout, row = layout_of(recipe.fabric), row_of()
    standing = []
    if beside == "copy":
        twin = meta_model(recipe, architecture).requires_grad_(False)
        assert isinstance(twin, Decoder)
        standing = [Beside(twin, 1, recipe.quantize)]
    expected = forecast(
        recipe, architecture, row, rows=2, tokens=200, hardware=None, asked=int(beside == "base"), beside=standing
    )

    world(count)
    mesh = dist.init_device_mesh(
        "cpu", (layout.data, layout.tensor), mesh_dim_names=("data_parallel", "tensor_parallel")
    )
    model = Decoder(architecture)
    model.init_weights(seed=0)
    if recipe.adapter.method != "none":
        add_adapter(model, recipe.adapter)
    model.activation_checkpointing = recipe.fabric.activation_checkpointing
    module = PolicyAndReference(model, frozen_twin(model) if beside == "copy" else None) if beside else model
    distribute(module, mesh, config=recipe.fabric)
    traffic = ranks.Traffic()
    half = recipe.fabric.precision == "bf16-mixed"
    with traffic, torch.autocast("cpu", torch.bfloat16, enabled=half):
        for _ in range(2):
            module(row).logps.sum().backward()
    counted = Counter({key: times for key, times in traffic.counted.items() if key[1] > ranks.SMALL})
    reckoned = Counter[tuple[str, int]]()
    for one in expected.collectives:
        reckoned[one.kind, one.bytes] += one.times
    assert counted == reckoned
    assert counted


def test_what_copies_exchange_is_what_they_ask_torch_for(ranks: ModuleType, world: Any) -> None:
    """Of a model whose embedding travels alone, and with gradients of two types."""
    architecture = read_architecture(TINY_CONFIG | {"vocab_size": MESSAGE // (4 * TINY_CONFIG["hidden_size"]) + 1})
    recipe = recipe_of(2, {"fabric.strategy": "ddp"})
    expected = forecast(recipe, architecture, row_of(), rows=2, tokens=200, hardware=None)
    world(2)
    model = Decoder(architecture)
    model.init_weights(seed=0)
    traffic = ranks.Traffic()
    with traffic:
        add_up_copies(model.parameters())
    assert traffic.counted == Counter({(one.kind, one.bytes): one.times for one in expected.collectives})
    assert len(expected.collectives) == 2
    assert all((parameter.grad == 0).all() for parameter in model.parameters() if parameter.grad is not None)


def test_messages_are_filled_and_large_tensors_travel_alone() -> None:
    sizes = [MESSAGE, 1, MESSAGE - 1, 1, 2, MESSAGE + 1, 3]
    assert list(messages(sizes)) == [range(1), range(1, 3), range(3, 5), range(5, 6), range(6, 7)]
    assert list(messages([])) == []


def all_reduce(ranks: int, neighbours: int, size: int) -> Collective:
    return Collective("all-reduce", "gradients", "backward", ranks, neighbours, size)


def test_a_ring_sends_everything_but_its_own_piece() -> None:
    gather = Collective("all-gather", "layers", "forward", 4, 4, 1000, times=3)
    assert gather.sent == 3 * 750
    assert replace(gather, kind="reduce-scatter").sent == 3 * 750
    assert replace(gather, kind="all-reduce").sent == 2 * 3 * 750
    assert total_bytes([gather, gather]) == {"all-gather": 6000}


def test_rings_of_a_node_share_its_adapters() -> None:
    """Large enough for hops not to matter: within a node the links decide, beyond it as many adapters as the ring has
    ranks in a node."""
    h100, size = KNOWN["h100"], 10**14
    for ranks, neighbours, bandwidth in ((8, 8, 450e9), (64, 8, 400e9), (64, 1, 50e9), (64, 4, 200e9)):
        moved = 2 * size * (ranks - 1) / ranks
        found = seconds(all_reduce(ranks, neighbours, size), h100)
        assert found == pytest.approx(moved / (bandwidth * h100.carried), rel=1e-3)
    assert seconds(all_reduce(1, 1, size), h100) == 0


def test_a_step_waits_for_what_arithmetic_does_not_cover() -> None:
    h100 = replace(KNOWN["h100"], base=0.0, link_hop=0.0, network_hop=0.0)
    work = Work(Forward(layers=1e15, head=0.0))
    rate = h100.half * h100.attained
    layer = Collective("all-gather", "layers", "forward", 8, 8, 10**9, times=40)
    each = seconds(layer, h100)
    alone = step_time(work, [], h100, rows=2, half=True)
    assert (alone.arithmetic, alone.waiting) == (pytest.approx(2 * 3e15 / rate), 0)
    covered = step_time(work, [layer], h100, rows=2, half=True)
    assert covered.waiting == pytest.approx(2 * each)  # for the first layer of each row
    tiny = replace(work, forward=Forward(1e12, 0.0))
    bare = step_time(tiny, [layer], h100, rows=2, half=True)
    assert bare.waiting == pytest.approx(40 * each - 2 * 1e12 / rate)
    taking_turns = step_time(work, [layer], replace(h100, alone=True), rows=2, half=True)
    assert taking_turns.waiting == pytest.approx(40 * each)


def test_devices_that_are_not_there_can_be_planned_for() -> None:
    flags = {
        "fabric.accelerator": "auto",
        "fabric.hardware": "h100",
        "fabric.num_nodes": 8,
        "fabric.tensor_parallel": 4,
    }
    recipe = recipe_of(2, flags)
    recipe.fabric.devices = "auto"
    layout = layout_of(recipe.fabric)
    assert layout == Layout(devices=8, nodes=8, tensor=4, sharded=True)
    assert (layout.data, layout.neighbours) == (16, 2)
