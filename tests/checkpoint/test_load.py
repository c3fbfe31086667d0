"""What transformers saves loads here with equal logits, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Quantize

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"shard": "40KB"},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16, "shard": "40KB", "tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
        {"rope_parameters": LLAMA3},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_loads_what_transformers_saves(tmp_path: Path, make_llama, their_logits, our_logits, changes) -> None:
    theirs = make_llama(tmp_path, **changes)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if "shard" in changes else True
    ours = load_model(open_model(str(tmp_path)))
    torch.testing.assert_close(our_logits(ours), their_logits(theirs), atol=1e-4, rtol=1e-5)


def test_dtype_and_ties(tmp_path: Path, make_llama) -> None:
    make_llama(tmp_path, tie_word_embeddings=True)
    model = load_model(open_model(str(tmp_path)), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.frequencies[0][0].dtype == torch.float32


def test_leftovers_of_older_checkpoints_load_quietly(tmp_path: Path, make_llama, their_logits, our_logits) -> None:
    theirs = make_llama(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, file)
    torch.testing.assert_close(
        our_logits(load_model(open_model(str(tmp_path)))), their_logits(theirs), atol=1e-4, rtol=0
    )


def test_all_tensors_that_do_not_fit_are_named(tmp_path: Path, make_llama) -> None:
    make_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(64, 95)
    tensors["model.layers.7.extra"] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(InputError) as caught:
        load_model(open_model(str(tmp_path)))
    cure = "weights and config.json are not of one model: fetch both again"
    assert caught.value.mistakes == [
        f"{file}: model.norm.weight: missing: {cure}",
        f"{file}: model.layers.7.extra: unexpected: {cure}",
        f"{file}: model.layers.0.mlp.down_proj.weight: shape [64, 95], not [64, 96] as the config says: {cure}",
    ]


def test_at_most_ten_tensors_are_named(tmp_path: Path, make_llama) -> None:
    make_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(InputError) as caught:
        load_model(open_model(str(tmp_path)))
    assert len(caught.value.mistakes) == 11
    assert ": and 8 more: " in caught.value.mistakes[-1]


def test_random_init_follows_the_seed(tmp_path: Path, make_llama) -> None:
    make_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    files = open_model(str(tmp_path))
    with pytest.raises(InputError, match=r"--model\.init random"):
        load_model(files)
    first, again, other = (load_model(files, init="random", seed=seed) for seed in (1, 1, 2))
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.ndim == 1 or not torch.equal(a, c)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_quantised_while_loading_equals_quantised_afterwards(
    tmp_path: Path, make_llama, our_logits, method: str
) -> None:
    from litrecipe.model.quantize import quantize_linears

    make_llama(tmp_path)
    files = open_model(str(tmp_path))
    afterwards = load_model(files)
    quantize_linears(afterwards, Quantize(method=method))
    at_once = load_model(files, quantize=Quantize(method=method))
    assert torch.equal(our_logits(at_once), our_logits(afterwards))
