from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from litrecipe.config.errors import InputError
from litrecipe.model.architecture import Rope, count_parameters
from litrecipe.model.decoder import Decoder
from litrecipe.model.families import FAMILIES, Family, read_architecture, to_classifier_config, to_hf_config
from litrecipe.model.reward import RewardModel

SMOL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_reads_the_hubs_dialect() -> None:
    a = read_architecture(SMOL | {"rope_scaling": {"rope_type": "llama3", **LLAMA3}})
    assert (a.vocab_size, a.hidden_size, a.num_layers, a.num_heads, a.num_kv_heads) == (49152, 576, 30, 9, 3)
    assert a.head_dim == 64
    assert a.ropes == (Rope(100000.0, {"rope_type": "llama3", **LLAMA3}),)
    assert (a.bos_id, a.eos_ids, a.pad_id) == (1, (2,), 2)
    assert a.tie_embeddings
    assert not a.qkv_bias and not a.o_bias
    assert a.family == "llama"


def test_reads_the_dialect_of_transformers_5() -> None:
    five = {key: value for key, value in SMOL.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    five |= {"rope_parameters": {"rope_type": "llama3", "rope_theta": 100000, **LLAMA3}, "dtype": "bfloat16"}
    assert read_architecture(five) == read_architecture(SMOL | {"rope_scaling": {"rope_type": "llama3", **LLAMA3}})


def test_reads_the_old_name_of_a_rope_type_and_several_stop_tokens() -> None:
    a = read_architecture(
        SMOL | {"rope_scaling": {"type": "linear", "factor": 2.0}, "eos_token_id": [2, 7], "head_dim": 48}
    )
    assert a.ropes[0].scaling == {"rope_type": "linear", "factor": 2.0}
    assert a.eos_ids == (2, 7)
    assert a.head_dim == 48


def test_what_configs_may_leave_out() -> None:
    optional = ("num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings", "eos_token_id")
    a = read_architecture({key: value for key, value in SMOL.items() if key not in optional})
    assert (a.num_kv_heads, a.ropes, a.tie_embeddings, a.eos_ids) == (9, (Rope(10000.0),), False, ())


def test_all_mistakes_at_once() -> None:
    config = SMOL | {"hidden_act": "gelu", "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
    del config["vocab_size"], config["rms_norm_eps"]
    with pytest.raises(InputError) as error:
        read_architecture(config)
    named = [mistake.split(": ")[1] for mistake in error.value.mistakes]
    assert named == ["vocab_size", "rms_norm_eps", "hidden_act", "rope_scaling.rope_type"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt_oss"}, "config.json: model_type: gpt_oss"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "config.json: rope_scaling.original_max_position"),
        (
            {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "config.json: partial_rotary_factor: 0.5",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "config.json: rope_parameters.low_freq_factor"),
        ({"num_key_value_heads": 2}, "config.json: num_key_value_heads: 2"),
    ],
)
def test_refusals_name_the_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError) as error:
        read_architecture(SMOL | change)
    assert error.value.mistakes[0].startswith(named)


def test_mistral_without_a_window_is_read() -> None:
    a = read_architecture(SMOL | {"model_type": "mistral", "sliding_window": None})
    assert a.family == "mistral"
    assert read_architecture(to_hf_config(a)) == a


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"eos_token_id": [2, 7]},
        {"eos_token_id": None, "pad_token_id": None},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 48, "tie_word_embeddings": False},
    ],
)
def test_written_configs_mean_the_same_to_us_and_to_transformers(change: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    a = read_architecture(SMOL | change)
    written = json.loads(json.dumps(to_hf_config(a, "bfloat16")))
    assert read_architecture(written) == a
    theirs = LlamaConfig(**written)
    assert theirs.dtype == torch.bfloat16
    assert read_architecture(theirs.to_dict()) == a


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_count_of_parameters(tied: bool, biased: bool) -> None:
    a = read_architecture(
        SMOL
        | {"num_hidden_layers": 2, "tie_word_embeddings": tied, "attention_bias": biased, "mlp_bias": biased}
        | {"head_dim": 48}
    )
    with torch.device("meta"):
        assert count_parameters(a) == sum(p.numel() for p in Decoder(a).parameters())
        assert count_parameters(a, is_reward_model=True) == sum(p.numel() for p in RewardModel(a).parameters())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("openelm", "granite")])
def test_a_classifiers_config_is_that_of_transformers(family: str) -> None:
    """It has none of OpenELM and Granite."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = SMOL | {"model_type": family}
    if family.startswith("gpt"):
        config = AutoConfig.for_model(family, hidden_size=576, num_attention_heads=9, num_hidden_layers=3).to_dict()
    a = read_architecture(config)
    written = json.loads(json.dumps(to_classifier_config(a, "float32", pad_id=7)))
    read = read_architecture(written)
    assert read.pad_id == 7 and replace(read, pad_id=a.pad_id) == a
    theirs = AutoConfig.for_model(**written)
    assert theirs.num_labels == 1 and theirs.pad_token_id == 7
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(theirs)
    assert [type(model).__name__] == written["architectures"]
    theirs = theirs.to_dict()
    assert {str(label): name for label, name in theirs["id2label"].items()} == written["id2label"]
    assert theirs["label2id"] == written["label2id"]


def test_smollm2_has_135_million_parameters() -> None:
    assert count_parameters(read_architecture(SMOL)) == 134_515_008


def test_a_family_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = FAMILIES["llama"]
    monkeypatch.setitem(FAMILIES, "alpaca", Family(llama.read, "AlpacaForCausalLM", lambda a: {"wool": a.num_heads}))
    config = to_hf_config(read_architecture(SMOL | {"model_type": "alpaca"}))
    assert (config["model_type"], config["architectures"], config["wool"]) == ("alpaca", ["AlpacaForCausalLM"], 9)
    assert "mlp_bias" not in config
    assert read_architecture(config).family == "alpaca"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", True),
        ("num_hidden_layers", 2.5),
        ("num_attention_heads", 0),
        ("rope_scaling", "x"),
        ("rope_theta", [1]),
        ("rope_theta", float("nan")),
        ("tie_word_embeddings", "no"),
        ("eos_token_id", ["</s>"]),
        ("model_type", ["llama"]),
        ("rope_scaling", {"rope_type": ["linear"]}),
        ("rope_scaling", {"rope_type": "linear", "factor": "2"}),
        ("rope_scaling", {"rope_type": "default", "rope_theta": "x"}),
    ],
)
def test_a_value_of_a_wrong_type_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"config\.json: {key}"):
        read_architecture(SMOL | {key: value})
