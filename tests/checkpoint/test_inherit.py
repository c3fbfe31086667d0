"""The first layers of a larger model as a model of its own (Inheritune)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from litrecipe.checkpoint.hf import save_model
from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter
from litrecipe.model.adapters import add_adapter
from litrecipe.model.families import read_architecture, to_hf_config


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 4},
        {"num_hidden_layers": 4, "tie_word_embeddings": True, "shard": "40KB"},
        {"family": "gemma2", "num_hidden_layers": 4, "sliding_window": 4},
        {"family": "gpt_neox", "num_hidden_layers": 4, "num_key_value_heads": 4},
    ],
    ids=["untied", "tied-sharded", "gemma2", "gpt_neox"],
)
def test_it_is_what_transformers_makes_of_the_same_layers(
    tmp_path: Path, make_llama, their_logits, our_logits, changes: dict[str, Any]
) -> None:
    theirs = make_llama(tmp_path / "large", **changes)
    files = open_model(str(tmp_path / "large"), layers=2)
    ours = load_model(files)
    base = theirs.base_model
    base.layers = base.layers[:2]
    torch.testing.assert_close(our_logits(ours), their_logits(theirs), atol=1e-4, rtol=1e-5)
    whole = load_file(tmp_path / "large" / "model.safetensors") if "shard" not in changes else {}
    for name, weight in ours.named_parameters():
        assert name not in whole or torch.equal(weight, whole[name]), name
    save_model(tmp_path / "small", ours, tmp_path / "large")
    again = open_model(str(tmp_path / "small"))
    assert again.architecture == files.architecture and again.architecture.num_layers == 2
    assert again.config["num_hidden_layers"] == 2
    assert torch.equal(our_logits(load_model(again)), our_logits(ours))


def test_the_small_one_has_a_hash_of_its_own_and_the_large_one_keeps_its(tmp_path: Path, make_llama) -> None:
    make_llama(tmp_path, num_hidden_layers=3)
    hashes = [open_model(str(tmp_path), layers=layers).weights_hash() for layers in (None, 1, 2, 3, None)]
    assert len(set(hashes)) == 3 and hashes[0] == hashes[3] == hashes[4]


def test_of_layers_with_widths_of_their_own_the_first_are_left() -> None:
    whole = read_architecture(
        {
            "model_type": "openelm",
            "model_dim": 128,
            "head_dim": 16,
            "num_transformer_layers": 4,
            "num_gqa_groups": 2,
            "ffn_multipliers": [0.5, 4.0],
            "qkv_multipliers": [0.5, 1.0],
            "vocab_size": 100,
            "max_context_length": 64,
            "ffn_dim_divisor": 16,
            "rope_freq_constant": 10000,
            "normalize_qk_projections": True,
            "share_input_output_layers": True,
            "rope_max_length": 128,
            "activation_fn_name": "swish",
            "normalization_layer_name": "rms_norm",
            "ffn_with_glu": True,
        }
    )
    smaller = whole.first_layers(2)
    assert smaller.shapes == whole.shapes[:2] and smaller.num_heads == max(one.num_heads for one in smaller.shapes)
    assert smaller.num_heads < whole.num_heads
    assert read_architecture(to_hf_config(smaller)) == smaller


def test_more_layers_than_there_are_and_adapters_are_refused(tmp_path: Path, make_llama) -> None:
    from litrecipe.checkpoint.peft_adapter import save_adapter

    make_llama(tmp_path / "large", num_hidden_layers=3)
    with pytest.raises(InputError, match=r"^model\.inherit_layers: 4: .*large has 3: give at most that$"):
        open_model(str(tmp_path / "large"), layers=4)
    model = load_model(open_model(str(tmp_path / "large")))
    settings = Adapter(method="lora", r=4)
    add_adapter(model, settings, seed=0)
    save_adapter(tmp_path / "adapter", model, settings, str(tmp_path / "large"), tmp_path / "large")
    with pytest.raises(InputError, match=r"model\.inherit_layers: 2: .*adapter is an adapter: `litrecipe model merge`"):
        open_model(str(tmp_path / "adapter"), layers=2)
