"""What several processes hold of a model, put together, is the model that one would have loaded, bit for bit.

Each rank of three is played by this process, in a process group that exchanges nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from litrecipe.checkpoint import fill
from litrecipe.checkpoint.hf import save_hydra
from litrecipe.checkpoint.load import load_hydra, load_model, load_reward_model
from litrecipe.checkpoint.peft_adapter import save_adapter
from litrecipe.checkpoint.source import ModelFiles, first_layers, open_model
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, Fabric, Quantize
from litrecipe.engine.sharding import distribute
from litrecipe.model.critic import critic_as
from litrecipe.model.decoder import Trunk
from litrecipe.model.reference import frozen_twin

WORLD = 3
LORA, DORA = Adapter(method="lora", r=4), Adapter(method="dora", r=4)
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "tied, rounded, in several files": (
        {"tie_word_embeddings": True, "shard": "40KB", "dtype": torch.float16},
        {"dtype": torch.bfloat16},
    ),
    "transposed": ({"family": "gpt2"}, {}),
    "interleaved": ({"family": "gpt_neox"}, {"adapter": DORA}),
    "experts": ({"family": "mixtral", **EXPERTS}, {}),
    "experts in nf4 under lora": (
        {"family": "mixtral", **EXPERTS},
        {"quantize": Quantize(method="nf4"), "adapter": LORA},
    ),
    "dora, rounded": ({}, {"adapter": DORA, "dtype": torch.bfloat16}),
    "dora on nf4": ({"attention_bias": True}, {"adapter": DORA, "quantize": Quantize(method="nf4")}),
    "plain scales": ({}, {"adapter": LORA, "quantize": Quantize(method="nf4", double_quant=False)}),
    "fresh": ({"family": "gpt_neox"}, {"init": "random", "seed": 3}),
    "fresh, tied, with dora": ({"tie_word_embeddings": True}, {"init": "random", "adapter": DORA}),
}


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are played cannot agree on mistakes."""
    monkeypatch.setattr(fill, "_together", lambda act: act())


@contextmanager
def rank_of(rank: int) -> Iterator[Any]:
    """The mesh of a rank of three."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _clear_sharding_prop_cache()  # it keeps meshes, and takes that of another rank for the same
    dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
    try:
        names = ("data_parallel", "tensor_parallel")
        yield dist.init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def put_together(build: Callable[[], torch.nn.Module]) -> tuple[dict[str, Tensor], list[int]]:
    """What all ranks hold, whole, and how many values each of them does."""
    whole: dict[str, Tensor] = {}
    held = []
    for rank in range(WORLD):
        with rank_of(rank) as mesh:
            module = distribute(build(), mesh, Fabric(strategy="fsdp"))
            held.append(0)
            for name, parameter in module.named_parameters():
                for piece, where in fill.pieces_of(parameter):
                    whole.setdefault(name, torch.zeros(parameter.shape, dtype=parameter.dtype))[where] = piece
                    held[rank] += piece.numel()
    return whole, held


def parameters_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Those of a model that nobody shares, with the scales of quantised ones as processes that share it have them."""
    found = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if state := getattr(module, "quant_state", None):
            found[f"{name}.scales"] = state.absmax.view(torch.uint8)
    return found


def assert_same(whole: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert whole.keys() == expected.keys()
    for name, values in expected.items():
        assert whole[name].dtype == values.dtype and torch.equal(whole[name], values), name


@pytest.mark.parametrize("case", CASES)
def test_the_pieces_are_the_model(case: str, tmp_path: Path, make_llama) -> None:
    changes, settings = CASES[case]
    make_llama(tmp_path, **changes)
    files = open_model(str(tmp_path))
    expected = parameters_of(load_model(files, **settings))
    whole, held = put_together(lambda: load_model(files, shared=True, **settings))
    assert_same(whole, expected)
    count = sum(values.numel() for values in expected.values())
    assert sum(held) == count and max(held) < 0.45 * count  # cut by rows, of which small tensors have few


def test_a_model_of_a_gguf_file_and_its_first_layers(real_model: Path) -> None:
    files = first_layers(open_model(str(real_model)), 1)
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = dict(files.tensors())
    for place in (slice(0, 300), slice(300, 576), slice(576, 576)):
        assert torch.equal(files.read(name, (place, slice(5, 9))), whole[name][place, 5:9])
    assert torch.equal(files.read("model.norm.weight", (slice(3, 7),)), whole["model.norm.weight"][3:7])


def reward_adapter(folder: Path, make_llama, method: Any) -> ModelFiles:
    """A trained adapter of a reward model."""
    make_llama(folder / "base")
    files, settings = open_model(str(folder / "base")), Adapter(method=method, r=3)
    (folder / "base" / "tokenizer.json").write_text('{"model": {"vocab": {"<pad>": 0}}}')
    model = load_reward_model(files, adapter=settings, seed=5)
    moved(model)
    save_adapter(folder / "adapter", model, settings, str(folder / "base"), files.tokenizer_dir, pad_token="<pad>")
    return open_model(str(folder / "adapter"))


def moved(model: torch.nn.Module) -> None:
    """Train it, in a manner of speaking."""
    chance = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.empty(parameter.shape).normal_(0, 0.1, generator=chance)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_from_files_stays_or_is_merged(method: str, tmp_path: Path, make_llama) -> None:
    files = reward_adapter(tmp_path, make_llama, method)
    whole, _ = put_together(lambda: load_reward_model(files, shared=True))
    assert_same(whole, parameters_of(load_reward_model(files)))

    def merged() -> Trunk:
        model = load_reward_model(files, shared=True)
        fill.merge_when_filled(model, files.source)
        return critic_as(model)

    whole, _ = put_together(merged)
    assert_same(whole, parameters_of(critic_as(load_reward_model(files))))


def test_a_hydra_and_the_frozen_twin_of_what_learns(tmp_path: Path, make_llama) -> None:
    make_llama(tmp_path / "base", tie_word_embeddings=True)
    files = open_model(str(tmp_path / "base"))
    (tmp_path / "base" / "tokenizer.json").write_text('{"model": {"vocab": {"<pad>": 0}}}')
    fresh = load_hydra(files, seed=2)
    save_hydra(tmp_path / "hydra", fresh, files.tokenizer_dir, pad_token="<pad>", statistics=(1.0, 2.0))
    hydra = open_model(str(tmp_path / "hydra"))
    for one in (files, hydra):
        whole, _ = put_together(lambda files=one: load_hydra(files, seed=2, adapter=DORA, shared=True))
        assert_same(whole, parameters_of(load_hydra(one, seed=2, adapter=DORA)))

    def beside(shared: bool) -> torch.nn.Module:
        policy = load_model(files, adapter=DORA, shared=shared)
        return torch.nn.ModuleList([policy, frozen_twin(policy)])

    whole, _ = put_together(lambda: beside(True))
    named = beside(False).named_parameters(remove_duplicate=False)
    assert_same(whole, {name: parameter.data for name, parameter in named if ".lm_head." not in name})


def test_a_damaged_file_is_found_though_nobody_reads_all_of_it(tmp_path: Path, make_llama) -> None:
    """Of three files each rank looks at one, where a manifest tells the digest; elsewhere at what it reads."""
    make_llama(tmp_path, shard="90KB")
    files = open_model(str(tmp_path))
    path = files.weights.paths[-1]
    content = bytearray(path.read_bytes())
    content[-1], content[-2] = 0x7F, 0xC0
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"values that are not finite"):
        put_together(lambda: load_model(files, shared=True))
    content[-1] = 0
    path.write_bytes(content)
    for file in files.weights.files:
        file.expected = "0" * 64 if file.path == path else None
    ranks = []
    for rank in range(WORLD):
        with rank_of(rank) as mesh:
            try:
                distribute(load_model(files, shared=True), mesh, Fabric(strategy="fsdp"))
            except InputError as error:
                assert f"{path}: its sha256 is not" in str(error)
                ranks.append(rank)
    assert ranks == [(len(files.weights.paths) - 1) % WORLD]
