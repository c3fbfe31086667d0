"""What a decoder is made of, read from a Hugging Face `config.json` and written back.

A family is one entry of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from litrecipe.config.errors import InputError

Config = dict[str, Any]
"""A parsed `config.json`."""
SCORE = "score.weight"
"""The tensor (1, hidden size) that makes a reward model of a transformer, as Hugging Face names it."""


@dataclass(frozen=True)
class Architecture:
    """Shapes and constants of a decoder; everything `Decoder` needs beside its weights."""

    vocab_size: int
    """Rows of the embedding; may be padded beyond the tokenizer's tokens."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Heads of keys and values; a divisor of `num_heads` (grouped-query attention, 2305.13245)."""
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    """None, or `{"rope_type": "linear" | "llama3", …}` with the numbers of that type."""
    max_positions: int
    """Longest sequence the model was made for."""
    tie_embeddings: bool
    """Whether the head's weight is the embedding's."""
    attention_bias: bool
    """Biases on q, k, v and o."""
    mlp_bias: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    family: str
    """`model_type` of the config."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights."""


def read_architecture(config: Config) -> Architecture:
    """The architecture of a `config.json`, in the Hub's dialect or that of transformers 5.

    Raises InputError with all missing keys and all values that this decoder cannot honour.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise InputError(f"config.json: model_type: {family}: one of {', '.join(FAMILIES)} can be read")
    return FAMILIES[family].read(config)


def to_hf_config(architecture: Architecture, dtype: str = "float32") -> Config:
    """A `config.json` that transformers 4 and 5 both load; `dtype` is the name of the saved weights' torch dtype."""
    family = FAMILIES[architecture.family]
    eos = architecture.eos_ids
    return {
        "architectures": [family.class_name],
        "model_type": architecture.family,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        **{key: getattr(architecture, name) for name, key in REQUIRED_KEYS.items()},
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "rope_theta": architecture.rope_theta,
        "rope_scaling": architecture.rope_scaling,
        "tie_word_embeddings": architecture.tie_embeddings,
        "initializer_range": architecture.initializer_range,
        "bos_token_id": architecture.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": architecture.pad_id,
        "use_cache": True,
        **family.own_keys(architecture),
    }


def to_classifier_config(architecture: Architecture, dtype: str, pad_id: int) -> Config:
    """A `config.json` of a sequence classifier with one label, which is how transformers keeps a reward model.

    transformers scores the last token that is not `pad_id`.
    """
    class_name = FAMILIES[architecture.family].class_name.replace("ForCausalLM", "ForSequenceClassification")
    return {
        **to_hf_config(architecture, dtype),
        "architectures": [class_name],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_id,
    }


def count_parameters(architecture: Architecture, *, is_reward_model: bool = False) -> int:
    """Number of weights, a tied head counted once."""
    a = architecture
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    attention = a.hidden_size * (2 * queries + 2 * keys)
    attention += a.attention_bias * (queries + 2 * keys + a.hidden_size)
    mlp = 3 * a.hidden_size * a.intermediate_size
    mlp += a.mlp_bias * (2 * a.intermediate_size + a.hidden_size)
    embedding = a.vocab_size * a.hidden_size
    head = a.hidden_size if is_reward_model else (1 - a.tie_embeddings) * embedding
    return embedding + head + a.num_layers * (attention + mlp + 2 * a.hidden_size) + a.hidden_size


REQUIRED_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "rms_norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}
"""Field → key; what has no default that holds for every model of a family."""

NUMBERS = {"rms_norm_eps", "rope_theta", "initializer_range"}
COUNTS = {*REQUIRED_KEYS.values(), "num_key_value_heads", "head_dim"} - NUMBERS
"""Keys of numbers above 0, and of those that are whole."""
SWITCHES = {"tie_word_embeddings", "attention_bias", "mlp_bias"}
IDS = {"bos_token_id", "pad_token_id"}
OBJECTS = {"rope_parameters", "rope_scaling"}


def _wrong_types(config: Config) -> list[str]:
    """A mistake for every value that is not of the type of its key; null stands for the default."""
    mistakes = []
    for keys, fits, wanted in (
        (COUNTS, lambda value: type(value) is int and value > 0, "a whole number above 0"),
        (NUMBERS, lambda value: type(value) in (int, float) and value > 0, "a number above 0"),
        (SWITCHES, lambda value: type(value) is bool, "true or false"),
        (IDS, lambda value: type(value) is int, "a whole number"),
        ({"eos_token_id"}, _are_ids, "a whole number, or a list of them"),
        (OBJECTS, lambda value: isinstance(value, dict), "an object"),
    ):
        for key in sorted(keys & config.keys()):
            if config[key] is not None and not fits(config[key]):
                mistakes.append(f"config.json: {key}: {config[key]!r}: must be {wanted}: fetch the model again")
    return mistakes


def _are_ids(value: Any) -> bool:
    return all(type(id) is int for id in (value if isinstance(value, list) else [value]))


def _read_llama(config: Config) -> Architecture:
    if mistakes := _wrong_types(config):
        raise InputError(*mistakes)
    missing = [key for key in REQUIRED_KEYS.values() if config.get(key) is None]
    mistakes = [f"config.json: {key}: missing: it has no default" for key in missing]
    if config.get("hidden_act", "silu") != "silu":
        mistakes.append(f"config.json: hidden_act: {config['hidden_act']}: only silu is known for this family")
    theta, scaling, rope_mistakes = _read_rope(config)
    mistakes += rope_mistakes
    if mistakes:
        raise InputError(*mistakes)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise InputError(f"config.json: num_key_value_heads: {kv_heads}: must divide num_attention_heads {heads}")
    eos = config.get("eos_token_id")
    return Architecture(
        **{name: config[key] for name, key in REQUIRED_KEYS.items()},
        num_kv_heads=kv_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=config.get("tie_word_embeddings", False),
        attention_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
        bos_id=config.get("bos_token_id"),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad_id=config.get("pad_token_id"),
        family=config["model_type"],
        initializer_range=config.get("initializer_range", 0.02),
    )


def _read_mistral(config: Config) -> Architecture:
    if config.get("sliding_window") is not None:
        raise InputError(
            f"config.json: sliding_window: {config['sliding_window']}: "
            "attention through a sliding window is not implemented; use a model whose sliding_window is null"
        )
    return _read_llama({**config, "attention_bias": False, "mlp_bias": False})


class Family(NamedTuple):
    """How the `config.json` of a family is read and written."""

    read: Callable[[Config], Architecture]
    """Raises InputError for what the decoder cannot honour."""
    class_name: str
    """The model's class in transformers."""
    own_keys: Callable[[Architecture], Config]
    """What its config holds beside the keys of all families."""


FAMILIES: dict[str, Family] = {
    "llama": Family(
        _read_llama, "LlamaForCausalLM", lambda a: {"attention_bias": a.attention_bias, "mlp_bias": a.mlp_bias}
    ),
    "mistral": Family(_read_mistral, "MistralForCausalLM", lambda a: {"sliding_window": None}),
}
"""`model_type` → family."""

ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of rotary embedding and the numbers each needs."""


def _read_rope(config: Config) -> tuple[float, dict[str, Any] | None, list[str]]:
    """Base, scaling and mistakes, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    values = config.get(key) or {}
    theta = values.get("rope_theta") or config.get("rope_theta") or 10000.0
    if not isinstance(theta, (int, float)):
        return 0.0, None, [f"config.json: {key}.rope_theta: {theta!r}: must be a number: fetch the model again"]
    theta = float(theta)
    kind = values.get("rope_type", values.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_NUMBERS:
        known = ", ".join(ROPE_NUMBERS)
        return theta, None, [f"config.json: {key}.rope_type: {kind}: one of {known} is implemented"]
    missing = [number for number in ROPE_NUMBERS[kind] if type(values.get(number)) not in (int, float)]
    if missing:
        return (
            theta,
            None,
            [
                f"config.json: {key}.{number}: {values.get(number, 'missing')}: rope_type {kind} needs a number"
                for number in missing
            ],
        )
    scaling = None if kind == "default" else {"rope_type": kind, **{n: values[n] for n in ROPE_NUMBERS[kind]}}
    return theta, scaling, []
