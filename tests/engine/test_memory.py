"""The memory table: what each choice of a recipe adds to it or takes away."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from litrecipe.config import schema
from litrecipe.config.groups import FinetuneRecipe, Reward, RewardRecipe
from litrecipe.config.online import Ppo, PpoRecipe
from litrecipe.engine.memory import NF4_BYTES, estimate, kept_bytes, meta_model, saved_bytes, teacher_bytes
from litrecipe.model.architecture import count_parameters
from litrecipe.model.families import read_architecture
from litrecipe.model.row import Sample, Segment, make_row


def sample(tokens: int) -> Sample:
    weights = np.ones(tokens, dtype=np.float32)
    weights[0] = 0
    return Sample("x", (Segment(np.arange(tokens) % 300, weights),))


@pytest.fixture
def table(tiny_model: Path):
    architecture = read_architecture(json.loads((tiny_model / "config.json").read_text()))
    architecture = replace(architecture, num_layers=4)

    def make(
        tokens: int = 100,
        rows: int = 1,
        world_size: int = 1,
        vocabulary: int = 320,
        device: str = "cpu",
        frozen_copy: bool = False,
        **flags: Any,
    ):
        given = {"model.source": "m", "data.train": "d"} | {key.replace("__", "."): v for key, v in flags.items()}
        recipe = schema.load(FinetuneRecipe, [], [(key, str(value)) for key, value in given.items()])
        row = make_row([sample(tokens)])
        shrunken = replace(architecture, vocab_size=vocabulary)
        ranks = {"rows": rows, "world_size": world_size, "device": device}
        return estimate(recipe, shrunken, row, **ranks, frozen_copy=frozen_copy)

    return make


def test_full_fine_tuning_takes_16_bytes_a_weight_and_its_activations(table) -> None:
    full = table()
    assert full.trained == full.parameters
    assert full.weights == full.gradients == 4 * full.parameters
    assert full.optimizer == 8 * full.parameters
    assert full.exchange == 0
    assert table(tokens=200).activations == pytest.approx(2 * full.activations, rel=0.1)


def test_saving_in_the_background_takes_a_copy_of_what_is_saved(table) -> None:
    """On a GPU that lies in the host's memory; sharded each rank copies its share."""
    plain, beside = table(), table(checkpoint__asynchronous=True)
    assert beside.saving == 12 * plain.parameters
    assert beside.peak == plain.peak + beside.saving
    assert table(checkpoint__asynchronous=True, device="cuda").saving == plain.saving == 0
    sharded = table(checkpoint__asynchronous=True, world_size=2, fabric__strategy="fsdp", fabric__devices=2)
    assert sharded.saving == beside.saving // 2


def test_from_the_second_row_on_gradients_lie_beside_the_activations(table) -> None:
    one, several = table(), table(rows=3)
    both = several.activations + several.gradients
    assert several.peak == several.weights + several.optimizer + several.scratch + several.holes + both
    assert one.peak == several.peak - min(several.activations, several.gradients)


def test_adapters_and_quantised_bases_take_less(table) -> None:
    full, lora = table(), table(adapter__method="lora")
    nf4 = table(adapter__method="lora", quantize__method="nf4")
    int8 = table(adapter__method="lora", quantize__method="int8")
    assert lora.trained < lora.parameters - full.parameters + 1
    assert lora.gradients == 4 * lora.trained
    linears = 4 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 96)
    assert lora.weights - nf4.weights == pytest.approx((4 - NF4_BYTES) * linears, abs=100)
    assert lora.weights - int8.weights == 3 * linears
    assert lora.scratch < full.scratch  # no gradient of the head
    assert table(fabric__activation_checkpointing="true").activations < full.activations / 3
    assert table(optim__name="adamw8bit").optimizer < full.optimizer / 3


def test_sharding_divides_what_is_kept_and_adds_what_is_gathered(table) -> None:
    full = table()
    sharded = table(rows=2, world_size=4, fabric__strategy="fsdp", fabric__devices=4)
    assert sharded.weights == full.weights // 4
    assert sharded.optimizer == full.optimizer // 4
    embedding, layer = 320 * 48, 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 96 + 2 * 48
    assert full.parameters == embedding + 4 * layer + 48
    root = embedding + 48
    assert sharded.exchange == 4 * (root + 2 * layer) + 4 * (root + layer)
    assert sharded.held == full.gradients // 4  # each row ends with its shard
    copied = table(world_size=4, fabric__devices=4)
    assert (copied.weights, copied.exchange) == (full.weights, full.gradients)


def test_what_is_exchanged_and_gathered_in_bf16(table) -> None:
    """Gradients that come in bf16 are added up as fp32 numbers, a layer of them at a time. Under `gather_to_sample`
    the whole policy lies beside keys and values, and nothing that is exchanged in a step."""
    flags = {"world_size": 4, "fabric__strategy": "fsdp", "fabric__precision": "bf16-mixed"}
    plain, half = table(**flags), table(**flags, fabric__param_dtype="bfloat16")
    layer = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 96 + 2 * 48
    assert half.exchange == plain.exchange // 2 + 4 * layer
    alike = {"fabric__param_dtype": "bfloat16", "fabric__reduce_dtype": "bfloat16", "fabric__gather_to_sample": True}
    gathering = table(**flags, **alike)
    assert gathering.exchange == plain.exchange // 2
    assert (plain.whole, gathering.whole) == (0, 2 * plain.parameters)
    sampling = replace(gathering, cache=10**9)
    assert sampling.peak == 10**9 + gathering.weights + gathering.optimizer + gathering.whole


def test_what_lies_in_main_memory_is_not_on_the_gpu(table) -> None:
    flags = {"world_size": 4, "rows": 2, "fabric__strategy": "fsdp", "fabric__devices": 4}
    there, away = (table(**flags, device="cuda", fabric__cpu_offload=offload) for offload in ("false", "true"))
    state = there.weights + there.gradients + there.optimizer
    assert (away.host, there.host) == (state, 0)
    assert (away.weights, away.gradients, away.optimizer, away.held) == (0, 0, 0, 0)
    assert away.exchange == there.exchange > 0
    assert table(**flags, fabric__cpu_offload="true").host == 0  # on a CPU there is only one memory


def test_ranks_that_share_a_model_hold_a_part_of_it_each(table) -> None:
    full = table()
    part = table(world_size=2, fabric__tensor_parallel=2, fabric__devices=2)
    norms = (2 * 4 + 1) * 48
    assert part.weights == part.gradients == part.optimizer // 2 == 4 * (norms + (full.parameters - norms) // 2)
    assert (part.parameters, part.trained, part.exchange) == (full.parameters, full.trained, 0)
    assert full.activations / 2 < part.activations < full.activations
    both = table(rows=2, world_size=4, fabric__tensor_parallel=2, fabric__devices=4)
    assert (both.weights, both.held) == (part.weights // 2, part.gradients // 2) and both.exchange > 0


def test_a_frozen_copy_shares_the_base_unless_it_is_sharded(table) -> None:
    lora = {"adapter__method": "lora", "frozen_copy": True}
    alone, sharded = table(**lora), table(**lora, fabric__strategy="fsdp", world_size=2)
    assert alone.reference == 4 * alone.trained
    assert sharded.reference == sharded.weights == 4 * alone.parameters // 2
    assert table(**lora).peak - table(adapter__method="lora").peak == alone.reference


def test_a_gpu_takes_larger_blocks_of_logits(table) -> None:
    cpu, gpu = (table(tokens=401, vocabulary=50_000, device=device) for device in ("cpu", "cuda"))
    assert gpu.scratch - cpu.scratch == 2 * 4 * 400 * (50_000 - 2**20 // 400)


def test_only_a_cpus_heap_has_holes(table) -> None:
    cpu, gpu = (table(device=device) for device in ("cpu", "cuda"))
    assert cpu.activations == gpu.activations
    assert (cpu.holes, gpu.holes) == (cpu.activations // 5, 0)


def pair(prompt: int, chosen: int, rejected: int) -> Sample:
    root, *answers = (np.arange(n) % 300 for n in (prompt, chosen, rejected))
    branches = (Segment(ids, np.ones(len(ids), dtype=np.float32), parent=0) for ids in answers)
    return Sample("x", (Segment(root, np.zeros(prompt, dtype=np.float32)), *branches))


def test_a_hydra_has_both_heads_and_logits_of_what_was_chosen(tiny_model: Path) -> None:
    """Of 40 of 70 tokens: two blocks of them, and the gradient of the head."""
    tied = read_architecture(json.loads((tiny_model / "config.json").read_text()))
    row = make_row([pair(20, 40, 30)])
    for architecture, own_head in ((tied, 0), (replace(tied, tie_embeddings=False), 320 * 48)):
        rewards, joint = (
            estimate(RewardRecipe(reward=Reward(sft_coef=coef)), architecture, row) for coef in (0.0, 0.5)
        )
        assert joint.parameters - rewards.parameters == own_head
        assert joint.scratch - rewards.scratch == 2 * 4 * 40 * 320 + 4 * 320 * 48
        assert joint.activations > rewards.activations


def test_the_layouts_of_ppo(tiny_model: Path) -> None:
    """Whole models: policy and critic, each with its gradient, and a copy of the policy alone as a reference. One base
    under two adapters counts once, unless it is sharded: then each has its own."""
    architecture = read_architecture(json.loads((tiny_model / "config.json").read_text()))
    row, tables, sharded = make_row([sample(100)]), {}, {}
    for layout in ("separate", "lora", "joined", "hydra"):
        recipe = PpoRecipe(ppo=Ppo(layout=layout))  # type: ignore[arg-type]
        recipe.adapter.method = "none" if layout == "separate" else "lora"
        tables[layout] = estimate(recipe, architecture, row, frozen_copy=layout == "separate")
        recipe.fabric.strategy = "fsdp"
        sharded[layout] = estimate(recipe, architecture, row, frozen_copy=True, world_size=2, kept=(0, 0))
    whole = tables["separate"]
    backbone = (whole.parameters - 48) // 2
    assert whole.trained == whole.parameters == 2 * backbone + 48
    assert whole.reference == 4 * backbone
    adapter = tables["joined"].trained - 48
    assert tables["joined"].parameters == backbone + adapter + 48
    for layout in ("lora", "hydra"):
        assert tables[layout].parameters == backbone + 2 * adapter + 48
        assert tables[layout].trained == 2 * adapter + 48
        assert tables[layout].reference == 0
        assert sharded[layout].weights == pytest.approx(2 * (2 * (backbone + adapter) + 48), abs=200)
        assert sharded[layout].parameters == tables[layout].parameters
    assert sharded["separate"].reference == 2 * backbone
    assert sharded["joined"].weights == pytest.approx(2 * (backbone + adapter + 48), abs=200)
    assert sharded["lora"].reference == pytest.approx(2 * (backbone + adapter), abs=200)


def test_a_teacher_is_its_weights_and_what_it_computes_with(table, tiny_model: Path) -> None:
    teacher = read_architecture(json.loads((tiny_model / "config.json").read_text()))
    row, size = make_row([sample(100)]), table().parameters  # of a model with twice the layers

    def of(dtype: torch.dtype = torch.float32, method: str = "none", **ranks: int) -> int:
        return teacher_bytes(teacher, dtype, method, row, **ranks)  # type: ignore[arg-type]

    whole = count_parameters(teacher)
    assert of() - of(torch.bfloat16) == 2 * whole
    assert of(torch.bfloat16, "nf4") < of(torch.bfloat16, "int8") < of(torch.bfloat16)
    head = teacher.vocab_size * teacher.hidden_size
    layers = whole - head - teacher.hidden_size
    # A shard, the gathered rest and two of two layers, and a copy of the head.
    assert of(sharded_over=4) - (of() - 4 * whole) == whole + 4 * (head + teacher.hidden_size + layers + head)
    alone, beside = table(), replace(table(), teacher=size)
    assert beside.peak == alone.peak + size
    assert replace(alone, asked=size).peak == max(alone.peak, alone.weights + size)


@pytest.mark.parametrize(
    ("again", "precision", "changes"),
    [(False, "bf16-mixed", {"tie_embeddings": False}), (True, "32-true", {}), (False, "32-true", {"vocab_size": 777})],
)
def test_a_few_layers_and_words_tell_what_all_keep(
    tiny_model: Path, again: bool, precision: str, changes: dict[str, Any]
) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    architecture = replace(read_architecture(config), num_layers=6, **changes)
    recipe, row = FinetuneRecipe(), make_row([sample(50), sample(30)])
    recipe.fabric.activation_checkpointing, recipe.fabric.precision = again, precision  # type: ignore[assignment]
    kept, inside = kept_bytes(recipe, architecture, row)
    assert kept == saved_bytes(meta_model(recipe, architecture), recipe, row)
    assert (inside > 0) == again


def test_experts_that_do_not_come_out_even_are_cut_by_their_rows(tiny_model: Path) -> None:
    """Four experts on 16 ranks: each has a sixteenth of every expert, not four of the ranks one each."""
    config = json.loads((tiny_model / "config.json").read_text())
    mixture = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
    recipe, row = FinetuneRecipe(), make_row([sample(50)])
    recipe.fabric.strategy = "fsdp"
    architecture = read_architecture(config | mixture)
    table = estimate(recipe, architecture, row, world_size=16, kept=(0, 0))
    experts = 2 * 4 * 3 * 48 * 96 * 4
    assert experts / 16 < table.weights < experts / 8
