"""Families of models: how the `config.json` of each is read, in both dialects, and written back in the Hub's.

A family is one entry of `FAMILIES`: what its config says beside the keys of all, and what the decoder makes of it. The
dialects are the Hub's (`rope_theta`, `rope_scaling`) and that of transformers 5 (`rope_parameters`, `layer_types`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from litrecipe.config.errors import InputError
from litrecipe.model.architecture import Activation, Architecture, LayerKind, Rope

Config = dict[str, Any]
"""A parsed `config.json`."""


class Family(NamedTuple):
    """How the `config.json` of a family is read and written."""

    read: Callable[[Config], Architecture]
    """Raises InputError for what the decoder cannot honour."""
    class_name: str
    """The model's class in transformers."""
    own_keys: Callable[[Architecture], Config]
    """What its config holds beside the keys of all families."""
    classifier: str | None = None
    """Its sequence classifier's class, where that is not named like the model's."""


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
    family, rope = FAMILIES[architecture.family], architecture.ropes[0]
    eos = architecture.eos_ids
    return {
        "architectures": [family.class_name],
        "model_type": architecture.family,
        "hidden_act": ACTIVATIONS[architecture.activation][0],
        "torch_dtype": dtype,
        **{key: getattr(architecture, name) for name, key in REQUIRED_KEYS.items()},
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
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
    family = FAMILIES[architecture.family]
    class_name = family.classifier or family.class_name.replace("ForCausalLM", "ForSequenceClassification")
    return {
        **to_hf_config(architecture, dtype),
        "architectures": [class_name],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad_id,
    }


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
ACTIVATIONS: dict[Activation, tuple[str, ...]] = {"silu": ("silu",), "gelu_tanh": ("gelu_pytorch_tanh", "gelu")}
"""Names in configs, first that which is written. Gemma's `gelu` means its approximation, too."""

NUMBERS = {"rms_norm_eps", "rope_theta", "rope_local_base_freq", "initializer_range"}
NUMBERS |= {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"}
COUNTS = {*REQUIRED_KEYS.values(), "num_key_value_heads", "head_dim", "sliding_window"} - NUMBERS
COUNTS |= {"sliding_window_pattern", "_sliding_window_pattern", "no_rope_layer_interval"}
"""Keys of numbers above 0, and of those that are whole."""
SWITCHES = {"tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention"}
IDS = {"bos_token_id", "pad_token_id", "max_window_layers"}
OBJECTS = {"rope_parameters", "rope_scaling"}
LISTS = {"layer_types", "no_rope_layers"}


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
        (LISTS, lambda value: isinstance(value, list), "a list"),
    ):
        for key in sorted(keys & config.keys()):
            if config[key] is not None and not fits(config[key]):
                mistakes.append(f"config.json: {key}: {config[key]!r}: must be {wanted}: fetch the model again")
    return mistakes


def _are_ids(value: Any) -> bool:
    return all(type(id) is int for id in (value if isinstance(value, list) else [value]))


def _read(
    config: Config, own: Callable[[Config], dict[str, Any]], activation: Activation = "silu", **defaults: Any
) -> Architecture:
    """What all configs say, with `defaults` for the family's; `own` gives the fields that are not read here."""
    if mistakes := _wrong_types(config):
        raise InputError(*mistakes)
    config = defaults | {key: value for key, value in config.items() if value is not None or key not in defaults}
    missing = [key for key in REQUIRED_KEYS.values() if config.get(key) is None]
    mistakes = [f"config.json: {key}: missing: it has no default" for key in missing]
    names = ACTIVATIONS[activation]
    for key in ("hidden_act", "hidden_activation"):
        if (value := config.get(key)) is not None and value not in names:
            mistakes.append(f"config.json: {key}: {value}: only {' and '.join(names)} is known for this family")
    fields: dict[str, Any] = {}
    try:
        if not missing:
            fields = own(config)
        if "ropes" not in fields:
            fields["ropes"] = (_read_rope(config),)
    except InputError as error:
        mistakes += error.mistakes
    if mistakes:
        raise InputError(*mistakes)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise InputError(f"config.json: num_key_value_heads: {kv_heads}: must divide num_attention_heads {heads}")
    eos = config.get("eos_token_id")
    biased = config.get("attention_bias") or False
    return Architecture(
        **{
            **{name: config[key] for name, key in REQUIRED_KEYS.items()},
            "num_kv_heads": kv_heads,
            "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
            "tie_embeddings": config.get("tie_word_embeddings") or False,
            "qkv_bias": biased,
            "o_bias": biased,
            "mlp_bias": config.get("mlp_bias") or False,
            "bos_id": config.get("bos_token_id"),
            "eos_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            "pad_id": config.get("pad_token_id"),
            "family": config["model_type"],
            "initializer_range": config.get("initializer_range") or 0.02,
            "activation": activation,
            **fields,
        }
    )


# -- positions --------------------------------------------------------------------------------------------------------

LOCAL, GLOBAL = "sliding_attention", "full_attention"
"""What transformers calls layers with a window, and without."""
ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Kinds of rotary embedding and the numbers each needs."""
ROPE_OPTIONS = {"yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")}
"""What else a kind may give: numbers, and one switch."""


def _read_rope(config: Config, part: str | None = None, default: float = 10000.0) -> Rope:
    """From `rope_parameters` (transformers 5; a `part` of it where layers differ) or `rope_theta` and `rope_scaling`;
    raises InputError."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    values = config.get(key) or {}
    if part and key == "rope_parameters":
        key, values = f"{key}.{part}", values.get(part) or {}
        if not isinstance(values, dict):
            raise InputError(f"config.json: {key}: {values!r}: must be an object: fetch the model again")
    theta = values.get("rope_theta") or config.get("rope_theta") or default
    if not isinstance(theta, (int, float)):
        raise InputError(f"config.json: {key}.rope_theta: {theta!r}: must be a number: fetch the model again")
    kind = values.get("rope_type", values.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_NUMBERS:
        raise InputError(f"config.json: {key}.rope_type: {kind}: one of {', '.join(ROPE_NUMBERS)} is implemented")
    mistakes = [
        f"config.json: {key}.{name}: {values.get(name, 'missing')}: rope_type {kind} needs a number"
        for name in ROPE_NUMBERS[kind]
        if type(values.get(name)) not in (int, float)
    ]
    options = {name: values[name] for name in ROPE_OPTIONS.get(kind, ()) if values.get(name) is not None}
    mistakes += [
        f"config.json: {key}.{name}: {value!r}: must be a number: fetch the model again"
        for name, value in options.items()
        if not isinstance(value, bool if name == "truncate" else int | float)
    ]
    share = values.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if share not in (1, None):
        mistakes.append(f"config.json: partial_rotary_factor: {share}: heads that turn in part are not read yet")
    if mistakes:
        raise InputError(*mistakes)
    numbers = {name: values[name] for name in ROPE_NUMBERS[kind]}
    return Rope(float(theta), None if kind == "default" else {"rope_type": kind, **numbers, **options})


def _kinds(config: Config, is_local: Callable[[int], bool], *, local_rope: int = 0) -> tuple[LayerKind, ...]:
    """By `layer_types`, or, where there are none, by which layers are local; raises InputError."""
    count, window = config["num_hidden_layers"], config.get("sliding_window")
    types = config.get("layer_types")
    if types is None:
        types = [LOCAL if is_local(layer) else GLOBAL for layer in range(count)]
    if len(types) != count or not set(map(str, types)) <= {LOCAL, GLOBAL}:
        wanted = f"must name each of the {count} layers {LOCAL} or {GLOBAL}"
        raise InputError(f"config.json: layer_types: {_short(types)}: {wanted}: fetch the model again")
    if LOCAL in types and window is None:
        raise InputError("config.json: sliding_window: missing: layer_types has layers with a window")
    local, wide = LayerKind(window, local_rope), LayerKind()
    return tuple(local if one == LOCAL else wide for one in types)


def _short(values: Sequence[Any]) -> str:
    return f"{', '.join(map(str, values[:3]))}{', …' if len(values) > 3 else ''} ({len(values)})"


def _window(a: Architecture) -> int | None:
    return next((kind.window for kind in a.kinds if kind.window), None)


def _types(a: Architecture) -> list[str]:
    return [LOCAL if a.kind(layer).window else GLOBAL for layer in range(a.num_layers)]


# -- families ---------------------------------------------------------------------------------------------------------


def _nothing(_: Config) -> dict[str, Any]:
    return {}


def _mistral(config: Config) -> dict[str, Any]:
    window = config.get("sliding_window")
    return {
        "kinds": (LayerKind(window),) * config["num_hidden_layers"] if window else (),
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), False),
    }


def _phi3(config: Config) -> dict[str, Any]:
    """Projections of the same input are one. Its older configs say yarn where they mean longrope."""
    rope = _read_rope(config)
    if rope.scaling is not None:
        kind = rope.scaling["rope_type"]
        raise InputError(f"config.json: rope_scaling.type: {kind}: only models without scaling are read of this family")
    return {**_mistral(config), "fused": True, "ropes": (rope,)}


def _phi3_keys(a: Architecture) -> Config:
    return {"sliding_window": _window(a), "original_max_position_embeddings": a.max_positions}


def _qwen(config: Config) -> dict[str, Any]:
    """Upper layers may have a window, which the hub's configs name and then do not use."""
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return {}
    first = config.get("max_window_layers")
    kinds = _kinds(config, lambda layer: layer >= (28 if first is None else first))
    return {"kinds": kinds if any(kind.window for kind in kinds) else ()}


def _qwen2(config: Config) -> dict[str, Any]:
    return {**_qwen(config), "qkv_bias": True, "o_bias": False, "mlp_bias": False}


def _qwen3(config: Config) -> dict[str, Any]:
    return {**_qwen(config), "qk_norm": "head", "mlp_bias": False}


def _qwen_keys(a: Architecture) -> Config:
    window = _window(a)
    used = {"sliding_window": window, "layer_types": _types(a)} if window else {"sliding_window": None}
    return {"use_sliding_window": bool(window), "max_window_layers": a.num_layers, **used}


def _olmo2(_: Config) -> dict[str, Any]:
    return {"norms": "after", "norm": "rms_wide", "qk_norm": "whole", "mlp_bias": False}


def _smollm3(config: Config) -> dict[str, Any]:
    """Some layers know no positions; `no_rope_layers` has a 0 for these."""
    count, every = config["num_hidden_layers"], config.get("no_rope_layer_interval") or 4
    turns = config.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(count)]
    if len(turns) < count or not set(turns) <= {0, 1}:
        wanted = f"must have a 0 or 1 for each of the {count} layers"
        raise InputError(f"config.json: no_rope_layers: {_short(turns)}: {wanted}: fetch the model again")
    has_window = config.get("use_sliding_window") and config.get("sliding_window")
    local = _kinds(config, lambda layer: bool(has_window) and not turns[layer])
    return {
        "kinds": tuple(kind._replace(rope=0 if turn else None) for kind, turn in zip(local, turns, strict=False)),
        "ropes": (_read_rope(config, default=2e6),),
    }


def _smollm3_keys(a: Architecture) -> Config:
    turns = [int(a.kind(layer).rope is not None) for layer in range(a.num_layers)]
    window = _window(a)
    used = {"use_sliding_window": bool(window), "sliding_window": window}
    return {"no_rope_layers": turns, "layer_types": _types(a), **used, **_biases(a)}


def _biases(a: Architecture) -> Config:
    return {"attention_bias": a.o_bias, "mlp_bias": a.mlp_bias}


def _gemma(config: Config) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise InputError("config.json: use_bidirectional_attention: true: only causal models are read")
    return {"norm": "rms_plus_one", "embedding_scale": math.sqrt(config["hidden_size"]), "mlp_bias": False}


def _gemma2(config: Config) -> dict[str, Any]:
    return {
        **_gemma(config),
        "norms": "around",
        "kinds": _kinds(config, lambda layer: layer % 2 == 0),
        "query_scalar": config["query_pre_attn_scalar"],
        "attention_softcap": config.get("attn_logit_softcapping"),
        "final_softcap": config.get("final_logit_softcapping"),
    }


def _gemma3(config: Config) -> dict[str, Any]:
    """Local layers turn by a base of their own, unscaled; every sixth is global."""
    every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    local = {"rope_parameters": {LOCAL: {}} | (config.get("rope_parameters") or {})}
    base = config.get("rope_local_base_freq") or 10000.0
    return {
        **_gemma2(config),
        "kinds": _kinds(config, lambda layer: (layer + 1) % every != 0, local_rope=1),
        "qk_norm": "head",
        "ropes": (_read_rope(config, GLOBAL, default=1e6), _read_rope(local, LOCAL, default=base)),
    }


def _gemma_keys(a: Architecture) -> Config:
    return {"hidden_activation": ACTIVATIONS[a.activation][0], "attention_bias": a.o_bias}


def _gemma2_keys(a: Architecture) -> Config:
    return {
        **_gemma_keys(a),
        "query_pre_attn_scalar": a.query_scalar,
        "attn_logit_softcapping": a.attention_softcap,
        "final_logit_softcapping": a.final_softcap,
        "sliding_window": _window(a),
        "layer_types": _types(a),
    }


def _gemma3_keys(a: Architecture) -> Config:
    return {**_gemma2_keys(a), "rope_local_base_freq": a.ropes[1].theta}


GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
"""What configs of the family may leave out."""
GEMMA2 = {**GEMMA, "query_pre_attn_scalar": 256, "sliding_window": 4096}
SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}

FAMILIES: dict[str, Family] = {
    "llama": Family(lambda c: _read(c, _nothing), "LlamaForCausalLM", _biases),
    "mistral": Family(lambda c: _read(c, _mistral), "MistralForCausalLM", lambda a: {"sliding_window": _window(a)}),
    "phi3": Family(lambda c: _read(c, _phi3), "Phi3ForCausalLM", _phi3_keys),
    "qwen2": Family(lambda c: _read(c, _qwen2), "Qwen2ForCausalLM", _qwen_keys),
    "qwen3": Family(
        lambda c: _read(c, _qwen3, head_dim=128),
        "Qwen3ForCausalLM",
        lambda a: {**_qwen_keys(a), "attention_bias": a.o_bias},
    ),
    "olmo2": Family(lambda c: _read(c, _olmo2), "Olmo2ForCausalLM", lambda a: {"attention_bias": a.o_bias}),
    "smollm3": Family(
        lambda c: _read(c, _smollm3, tie_word_embeddings=True, num_key_value_heads=4),
        "SmolLM3ForCausalLM",
        _smollm3_keys,
    ),
    "gemma": Family(lambda c: _read(c, _gemma, "gelu_tanh", **GEMMA), "GemmaForCausalLM", _gemma_keys),
    "gemma2": Family(
        lambda c: _read({**SOFTCAPS, **c}, _gemma2, "gelu_tanh", **GEMMA2), "Gemma2ForCausalLM", _gemma2_keys
    ),
    "gemma3_text": Family(
        lambda c: _read(c, _gemma3, "gelu_tanh", **GEMMA2),
        "Gemma3ForCausalLM",
        _gemma3_keys,
        classifier="Gemma3TextForSequenceClassification",
    ),
}
"""`model_type` → family."""
