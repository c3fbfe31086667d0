"""Files whose names and layouts are not those of memory: older folders, adapters of peft, OpenELM's own names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from openelm import OPENELM, OpenElm
from safetensors.torch import load_file, save_file

from litrecipe.checkpoint.hf import save_model, save_reward_model
from litrecipe.checkpoint.load import load_model, load_reward_model
from litrecipe.checkpoint.peft_adapter import save_adapter
from litrecipe.checkpoint.source import open_model
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, Quantize
from litrecipe.model.adapters import merge_adapter
from litrecipe.model.families import FAMILIES
from litrecipe.model.names import Names

WEIGHTS = "model.safetensors"


def stir(model: torch.nn.Module, kind: str = "lora_") -> None:
    """Let an adapter say something."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if kind in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


# -- older folders ----------------------------------------------------------------------------------------------------


def test_gpt2_as_its_authors_put_it_on_the_hub(tmp_path: Path, make_llama, their_logits, our_logits) -> None:
    """Without the model's own name before all others, and with masks among the weights."""
    theirs = make_llama(tmp_path, family="gpt2", tie_word_embeddings=True)
    tensors = {name.removeprefix("transformer."): one for name, one in load_file(tmp_path / WEIGHTS).items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 9, 9) for layer in range(2)}
    save_file(tensors | masks, tmp_path / WEIGHTS)
    files = open_model(str(tmp_path))
    torch.testing.assert_close(our_logits(load_model(files)), their_logits(theirs), atol=1e-4, rtol=1e-5)
    assert not any("attn.bias" in name for name in files.shapes)


def test_pythia_as_it_is_on_the_hub(tmp_path: Path, make_llama, their_logits, our_logits) -> None:
    """Masks are bytes there, which no weight may be; frequencies and the masks' value lie beside them."""
    theirs = make_llama(tmp_path, family="gpt_neox")
    masks = {}
    for layer in range(2):
        before = f"gpt_neox.layers.{layer}.attention."
        masks |= {
            f"{before}bias": torch.ones(1, 1, 9, 9, dtype=torch.uint8),
            f"{before}masked_bias": torch.tensor(-1e9),
        }
        masks |= {f"{before}rotary_emb.inv_freq": torch.rand(2)}
    save_file(load_file(tmp_path / WEIGHTS) | masks, tmp_path / WEIGHTS)
    files = open_model(str(tmp_path))
    torch.testing.assert_close(our_logits(load_model(files)), their_logits(theirs), atol=1e-4, rtol=1e-5)
    assert len(files.weights_hash()) == 64
    save_file({"gpt_neox.embed_in.weight": torch.ones(3, dtype=torch.uint8)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"gpt_neox\.embed_in\.weight: type U8: quantised"):
        open_model(str(tmp_path))


def test_mistakes_name_the_tensors_of_the_file(tmp_path: Path, make_llama) -> None:
    make_llama(tmp_path, family="gpt2", tie_word_embeddings=True)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["transformer.h.1.attn.c_proj.bias"]
    tensors["transformer.h.7.attn.c_proj.bias"] = torch.ones(64)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(InputError) as error:
        load_model(open_model(str(tmp_path)))
    found = [line.split(": ")[1:3] for line in error.value.mistakes]
    assert found == [
        ["transformer.h.1.attn.c_proj.bias", "missing"],
        ["transformer.h.7.attn.c_proj.bias", "unexpected"],
    ]


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "targets", "own", "ours"),
    [
        ("gpt2", ["c_attn", "c_proj", "c_fc"], ["q_proj", "o_proj", "up_proj", "down_proj"], None),
        ("gpt2", ["attn.c_proj"], ["o_proj"], None),
        ("gpt2", ["mlp.c_proj", "c_attn"], ["down_proj", "k_proj"], ["c_attn", "mlp.c_proj"]),
        ("gpt_neox", ["query_key_value", "dense_4h_to_h"], ["v_proj", "down_proj"], None),
    ],
)
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_peft_is_read_and_written(
    tmp_path: Path,
    make_llama,
    their_logits,
    our_logits,
    family: str,
    targets: list[str],
    own: Any,
    ours: Any,
    dora: bool,
) -> None:
    from peft import LoraConfig, get_peft_model

    theirs = make_llama(tmp_path / "base", family=family)
    fan = family == "gpt2"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=dora, fan_in_fan_out=fan)
    adapted = get_peft_model(theirs, config).eval()
    stir(adapted)
    adapted.save_pretrained(str(tmp_path / "theirs"))
    files = open_model(str(tmp_path / "theirs"))
    model = load_model(files)
    torch.testing.assert_close(our_logits(model), their_logits(adapted), atol=1e-4, rtol=1e-5)

    settings = Adapter(method="dora" if dora else "lora", r=4, alpha=8, targets=own)
    save_adapter(tmp_path / "ours", model, settings, str(tmp_path / "base"), files.tokenizer_dir)
    saved, theirs_saved = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs"))
    assert saved.keys() == theirs_saved.keys()
    assert all(torch.equal(saved[name], theirs_saved[name]) for name in saved)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert sorted(written["target_modules"]) == sorted(ours or targets) and written.get("fan_in_fan_out", False) == fan
    # the recipe's names are those of the adapter that is trained further
    load_model(files, adapter=settings)
    with pytest.raises(InputError, match=r"on .*_proj: ask for the same"):
        load_model(files, adapter=Adapter(method="lora", r=2, targets=own))


def test_an_adapter_merges_into_the_files(tmp_path: Path, make_llama, their_logits, our_logits) -> None:
    """Interleaved rows and transposed weights, from a base in 4 bits."""
    for family in ("gpt_neox", "gpt2"):
        make_llama(tmp_path / family, family=family)
        files = open_model(str(tmp_path / family))
        model = load_model(files, adapter=Adapter(method="dora", r=2), quantize=Quantize(method="nf4"))
        stir(model)
        wanted = our_logits(model)
        merge_adapter(model)
        save_model(tmp_path / f"{family} merged", model, files.tokenizer_dir, max_shard_bytes=1e5)
        assert len(list((tmp_path / f"{family} merged").glob("*.safetensors"))) > 1
        from transformers import AutoModelForCausalLM

        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"{family} merged").eval()
        torch.testing.assert_close(their_logits(again), wanted, atol=1e-3, rtol=1e-4)


def test_an_adapter_of_another_base_is_told(tmp_path: Path, make_llama) -> None:
    """Whose rows are not those of whole heads."""
    for folder, width in (("one", 64), ("other", 40)):
        make_llama(tmp_path / folder, family="gpt_neox", hidden_size=width)
    files, settings = open_model(str(tmp_path / "one")), Adapter(method="lora", r=2)
    save_adapter(tmp_path / "adapter", load_model(files, adapter=settings), settings, str(tmp_path / "other"), tmp_path)
    with pytest.raises(InputError, match=r"self_attn\.qkv_proj\.lora_B\.weight: shape \[192, 2\]: must be \[120, 2\]"):
        load_model(open_model(str(tmp_path / "adapter")))


# -- OpenELM ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def openelm(tmp_path: Path) -> tuple[OpenElm, Path]:
    """The reference and a folder as its authors' are."""
    folder = tmp_path / "openelm"
    folder.mkdir()
    theirs = OpenElm(OPENELM | {"vocab_size": 320})
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    (folder / "config.json").write_text(json.dumps(OPENELM | {"vocab_size": 320, "qkv_multipliers": [0.5, 1.0]}))
    save_file(theirs.state_dict(), folder / WEIGHTS)
    return theirs.eval(), folder


def test_openelm_there_and_back(openelm, tmp_path: Path, their_logits, our_logits, tiny_model: Path) -> None:
    theirs, folder = openelm
    files = open_model(str(folder))
    model = load_model(files)
    torch.testing.assert_close(our_logits(model), their_logits(theirs), atol=1e-4, rtol=1e-5)
    save_model(tmp_path / "ours", model, tiny_model)
    saved, right = load_file(tmp_path / "ours" / WEIGHTS), theirs.state_dict()
    assert saved.keys() == right.keys() and all(torch.equal(saved[name], right[name]) for name in right)
    assert open_model(str(tmp_path / "ours")).architecture == model.architecture

    judge = load_reward_model(files, seed=2)
    judge.score.weight.data.mul_(10)
    save_reward_model(tmp_path / "judge", judge, tiny_model, pad_token="<|endoftext|>", statistics=(0.0, 1.0))
    again = load_reward_model(open_model(str(tmp_path / "judge")))
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in judge.state_dict().items())


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_reads_openelms_adapter(openelm, tmp_path: Path, their_logits, our_logits, method: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    theirs, folder = openelm
    files = open_model(str(folder))
    model = load_model(files, adapter=Adapter(method=method, r=4, alpha=8))
    before = our_logits(model)
    stir(model)
    save_adapter(tmp_path / "adapter", model, Adapter(method=method, r=4, alpha=8), str(folder), files.tokenizer_dir)
    config = LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    assert set(config.target_modules) == {"qkv_proj", "out_proj", "proj_1", "proj_2"}
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    inject_adapter_in_model(config, theirs)
    state = {name.removeprefix("base_model.model."): one for name, one in state.items()}
    report = set_peft_model_state_dict(theirs, state)
    assert not report.unexpected_keys and not [name for name in report.missing_keys if "lora" in name]
    torch.testing.assert_close(their_logits(theirs), our_logits(model), atol=1e-4, rtol=1e-5)
    assert (our_logits(model) - before).abs().max() > 0.1
    assert torch.equal(our_logits(load_model(open_model(str(tmp_path / "adapter")))), our_logits(model))


# -- the map itself ---------------------------------------------------------------------------------------------------


def test_only_whole_words_are_names() -> None:
    names = Names({"model.norm": "ln", "mlp": "ffn", "mlp.up_proj": "ffn.in"}, prefix="t.")
    assert names.in_files("model.layers.1.mlp.up_proj.weight") == "model.layers.1.ffn.in.weight"
    assert names.in_files("model.layers.1.mlp.up_proj2.weight") == "model.layers.1.ffn.up_proj2.weight"
    assert names.in_files("model.norms.ln") == "model.norms.ln"
    assert names.in_memory("lm_head.weight") == "lm_head.weight" and names.in_memory("score.weight") == "score.weight"


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "openelm"])
def test_names_come_back(family: str) -> None:
    names = FAMILIES[family].names
    layer = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
    for own in ("model.embed_tokens", "model.norm", "lm_head", "score", *(f"model.layers.11.{part}" for part in layer)):
        for leaf in ("weight", "bias", "lora_A.weight", "lora_magnitude_vector"):
            for before in ("", "base_model.model."):
                name = f"{before}{own}.{leaf}"
                assert names.in_memory(names.in_files(name)) == name


def test_an_unknown_target_stays(tmp_path: Path, make_llama) -> None:
    """So that the error names it."""
    make_llama(tmp_path / "base", family="gpt_neox")
    files = open_model(str(tmp_path / "base"))
    with pytest.raises(InputError, match=r"adapter\.targets: c_attn: no such layer: the model has down_proj, o_proj"):
        load_model(files, adapter=Adapter(method="lora", targets=["c_attn"]))
