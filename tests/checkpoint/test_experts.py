"""Folders and adapters of models with experts, beyond what those of every family are tested for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from litrecipe.checkpoint.hf import save_model, save_reward_model
from litrecipe.checkpoint.load import load_model, load_reward_model
from litrecipe.checkpoint.peft_adapter import save_adapter
from litrecipe.checkpoint.source import open_model
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, Quantize
from litrecipe.model.adapters import merge_adapter
from litrecipe.model.quantize import quantize_linears

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}


@pytest.mark.parametrize("parameters", [["experts.gate_up_proj", "mlp.experts.down_proj"], ["down_proj"]])
def test_an_adapter_that_peft_made(parameters: list[str], tmp_path: Path, make_llama, their_logits, our_logits) -> None:
    """With rank-stabilised scaling; and it is written as peft wrote it."""
    from peft import LoraConfig, get_peft_model

    theirs = make_llama(tmp_path / "base", family="mixtral", **EXPERTS)
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj"], target_parameters=parameters)
    adapted = get_peft_model(theirs, config).eval()
    chance = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=chance)
    adapted.base_model.model.config._name_or_path = str(tmp_path / "base")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(str(tmp_path / "peft"))
    files = open_model(str(tmp_path / "peft"))
    ours = load_model(files)
    torch.testing.assert_close(our_logits(ours), their_logits(adapted), atol=1e-4, rtol=1e-5)
    assert files.adapter is not None
    save_adapter(tmp_path / "ours", ours, files.adapter.settings, str(tmp_path / "base"), files.tokenizer_dir)
    written, right = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft"))
    assert written.keys() == right.keys()
    assert all(torch.equal(written[name], right[name]) for name in right)


def test_an_adapter_of_single_experts_is_refused(tmp_path: Path, make_llama) -> None:
    """As transformers 4 had them; peft converts these to twice the rank."""
    make_llama(tmp_path / "base", family="mixtral", **EXPERTS)
    settings = Adapter(method="lora", r=2, targets=["q_proj"])
    files = open_model(str(tmp_path / "base"))
    model = load_model(files, adapter=settings)
    save_adapter(tmp_path / "adapter", model, settings, str(tmp_path / "base"), files.tokenizer_dir)
    path = tmp_path / "adapter" / "adapter_config.json"
    (tmp_path / "adapter" / "manifest.json").unlink()
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_modules": ["w1", "w2", "w3"]}))
    with pytest.raises(InputError, match="w1: no such layer: the model has k_proj, o_proj, q_proj, v_proj, gate_up_pr"):
        load_model(open_model(str(tmp_path / "adapter")))
    path.write_text(json.dumps(config | {"target_parameters": ["mlp.gate.weight"]}))
    with pytest.raises(InputError, match=r"target_parameters: .*only mlp\.experts\.gate_up_proj and mlp"):
        open_model(str(tmp_path / "adapter"))


def test_merged_experts_in_transformers(tmp_path: Path, make_llama, their_logits, our_logits) -> None:
    """Of a quantised base too, in shards of a few tensors."""
    from transformers import AutoModelForCausalLM

    make_llama(tmp_path / "base", family="qwen3_moe", **SPARSE)
    files = open_model(str(tmp_path / "base"))
    model = load_model(files, quantize=Quantize(method="nf4"), adapter=Adapter(method="lora", r=4))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    right = our_logits(model)
    with pytest.raises(ValueError, match="merge adapters"):
        save_model(tmp_path / "merged", model, files.tokenizer_dir)
    merge_adapter(model)
    save_model(tmp_path / "merged", model, files.tokenizer_dir, max_shard_bytes=50_000)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    again = load_model(open_model(str(tmp_path / "merged")))
    torch.testing.assert_close(our_logits(again), right, atol=1e-4, rtol=1e-4)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(their_logits(theirs), right, atol=1e-4, rtol=1e-4)


def test_layers_are_quantised_as_they_come(tmp_path: Path, make_llama, our_logits) -> None:
    make_llama(tmp_path / "base", family="mixtral", **EXPERTS)
    files = open_model(str(tmp_path / "base"))
    right = load_model(files)
    quantize_linears(right, Quantize(method="nf4"))
    assert torch.equal(our_logits(load_model(files, quantize=Quantize(method="nf4"))), our_logits(right))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"3.w1.weight": None}, "block_sparse_moe.experts.3.w1.weight: missing"),
        ({"2.w2.weight": (64, 95)}, "block_sparse_moe.experts.2.w2.weight: shape [64, 95], not [64, 96] as the config"),
        ({"4.w3.weight": (96, 64)}, "block_sparse_moe.experts.4.w3.weight: unexpected"),
    ],
)
def test_a_wrong_expert_is_named(change: dict[str, Any], named: str, tmp_path: Path, make_llama) -> None:
    make_llama(tmp_path / "base", family="mixtral", **EXPERTS)
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    for name, shape in change.items():
        whole = f"model.layers.1.block_sparse_moe.experts.{name}"
        tensors.pop(whole, None)
        if shape:
            tensors[whole] = torch.zeros(shape)
    save_file(tensors, path)
    with pytest.raises(InputError) as error:
        load_model(open_model(str(tmp_path / "base")))
    assert [f"model.layers.1.{named}" in line for line in error.value.mistakes] == [True]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_reward_model_in_transformers(family: str, tmp_path: Path, make_llama, tiny_model: Path) -> None:
    """What it says at the end of a text is what transformers' classifier says there."""
    from transformers import AutoModelForSequenceClassification

    from litrecipe.model.row import Row, Sample, Segment, make_row

    make_llama(tmp_path / "base", family=family, vocab_size=320, **(EXPERTS if family == "mixtral" else SPARSE))
    ours = load_reward_model(open_model(str(tmp_path / "base")))
    save_reward_model(tmp_path / "judge", ours, tiny_model, pad_token="<|im_end|>", statistics=None)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge", dtype=torch.float32).eval()
    tokens = torch.tensor([5, 3, 90, 41, 60])
    row: Row = make_row([Sample("a", (Segment(tokens.numpy(), torch.tensor([0.0, 1, 1, 1, 1]).numpy()),))])
    with torch.no_grad():
        torch.testing.assert_close(ours(row), theirs(tokens[None]).logits[0], atol=1e-4, rtol=1e-4)
