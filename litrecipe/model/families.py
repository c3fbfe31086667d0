"""Families of models: how the `config.json` of each is read, in both dialects, and written back in the Hub's.

A family is one entry of `FAMILIES`: what its config says beside the keys of all, and what the decoder makes of it. The
dialects are the Hub's (`rope_theta`, `rope_scaling`) and that of transformers 5 (`rope_parameters`, `layer_types`).
"""

from __future__ import annotations

import math
from typing import Any

from litrecipe.config.errors import InputError
from litrecipe.model.architecture import Activation, Architecture, LayerKind, Rope
from litrecipe.model.expert_families import MIXTRAL, QWEN3_MOE
from litrecipe.model.gpt_families import GPT2, GPT_NEOX, OPENELM
from litrecipe.model.hf_config import (
    ACTIVATIONS,
    FACTORS,
    GLOBAL,
    LOCAL,
    REQUIRED_KEYS,
    Config,
    Family,
    read_common,
    read_kinds,
    read_rope,
    shortened,
    types_of,
    window_of,
)
from litrecipe.model.names import Names


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
    rope = architecture.ropes[0] if architecture.ropes else Rope(10000.0)
    eos = architecture.eos_ids
    common = {
        "architectures": [family.class_name],
        "model_type": architecture.family,
        "hidden_act": ACTIVATIONS[architecture.activation],
        "torch_dtype": dtype,
        **{key: getattr(architecture, name) for name, key in REQUIRED_KEYS.items()},
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        **({"partial_rotary_factor": rope.share} if rope.share != 1 else {}),
        "tie_word_embeddings": architecture.tie_embeddings,
        "initializer_range": architecture.initializer_range,
        "bos_token_id": architecture.bos_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "pad_token_id": architecture.pad_id,
        "use_cache": True,
    }
    written = {family.keys.get(key, key): value for key, value in common.items() if key not in family.omits}
    return written | family.own_keys(architecture)


def names_of(architecture: Architecture) -> Names:
    """What the files of a model of this architecture call its parts."""
    return FAMILIES[architecture.family].names


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
    """Projections of the same input are one. Its older configs say su or yarn where they mean longrope."""
    rope = read_rope(config, share=1.0, other_names={"su": "longrope", "yarn": "longrope"})
    if rope.scaling is not None and (kind := rope.scaling["rope_type"]) != "longrope":
        raise InputError(f"config.json: rope_scaling.rope_type: {kind}: only longrope is read of this family")
    return {**_mistral(config), "fused": True, "ropes": (rope,)}


def _phi3_keys(a: Architecture) -> Config:
    """transformers 4 takes no scaling with other keys than these three."""
    original, scaling = "original_max_position_embeddings", a.ropes[0].scaling
    keys: Config = {"sliding_window": window_of(a), original: a.max_positions}
    if scaling is None:
        return keys
    own = {"type": "longrope", **{name: scaling[name] for name in FACTORS}}
    if scaling["factor"] != a.max_positions / scaling[original]:
        own["factor"] = scaling["factor"]
    if "attention_factor" in scaling:
        own["attention_factor"] = scaling["attention_factor"]
    return {**keys, "rope_scaling": own, original: scaling[original]}


def _qwen(config: Config) -> dict[str, Any]:
    """Upper layers may have a window, which the hub's configs name and then do not use."""
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return {}
    first = config.get("max_window_layers")
    kinds = read_kinds(config, lambda layer: layer >= (28 if first is None else first))
    return {"kinds": kinds if any(kind.window for kind in kinds) else ()}


def _qwen2(config: Config) -> dict[str, Any]:
    return {**_qwen(config), "qkv_bias": True, "o_bias": False, "mlp_bias": False}


def _qwen3(config: Config) -> dict[str, Any]:
    return {**_qwen(config), "qk_norm": "head", "mlp_bias": False}


def _qwen_keys(a: Architecture) -> Config:
    window = window_of(a)
    used = {"sliding_window": window, "layer_types": types_of(a)} if window else {"sliding_window": None}
    return {"use_sliding_window": bool(window), "max_window_layers": a.num_layers, **used}


def _olmo2(_: Config) -> dict[str, Any]:
    return {"norms": "after", "norm": "rms_wide", "qk_norm": "whole", "mlp_bias": False}


def _smollm3(config: Config) -> dict[str, Any]:
    """Some layers know no positions; `no_rope_layers` has a 0 for these."""
    count, every = config["num_hidden_layers"], config.get("no_rope_layer_interval") or 4
    turns = config.get("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(count)]
    if len(turns) < count or not set(turns) <= {0, 1}:
        wanted = f"must have a 0 or 1 for each of the {count} layers"
        raise InputError(f"config.json: no_rope_layers: {shortened(turns)}: {wanted}: fetch the model again")
    has_window = config.get("use_sliding_window") and config.get("sliding_window")
    local = read_kinds(config, lambda layer: bool(has_window) and not turns[layer])
    return {
        "kinds": tuple(kind._replace(rope=0 if turn else None) for kind, turn in zip(local, turns, strict=False)),
        "ropes": (read_rope(config, default=2e6),),
    }


def _smollm3_keys(a: Architecture) -> Config:
    turns = [int(a.kind(layer).rope is not None) for layer in range(a.num_layers)]
    window = window_of(a)
    used = {"use_sliding_window": bool(window), "sliding_window": window}
    return {"no_rope_layers": turns, "layer_types": types_of(a), **used, **_biases(a)}


def _biases(a: Architecture) -> Config:
    return {"attention_bias": a.o_bias, "mlp_bias": a.mlp_bias}


def _granite(config: Config) -> dict[str, Any]:
    """Llama with multipliers: what is trained at one width carries over to others (muP, MiniCPM 2404.06395)."""
    scores = config.get("attention_multiplier")
    return {
        "embedding_scale": float(config.get("embedding_multiplier") or 1.0),
        "residual_scale": float(config.get("residual_multiplier") or 1.0),
        "logit_divisor": float(config.get("logits_scaling") or 1.0),
        "query_scalar": 1.0 if scores is None else 1 / scores**2,
    }


def _granite_keys(a: Architecture) -> Config:
    assert a.query_scalar is not None
    return {
        **_biases(a),
        "embedding_multiplier": a.embedding_scale,
        "residual_multiplier": a.residual_scale,
        "logits_scaling": a.logit_divisor,
        "attention_multiplier": 1 / math.sqrt(a.query_scalar),
    }


def _gemma(config: Config) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise InputError("config.json: use_bidirectional_attention: true: only causal models are read")
    return {"norm": "rms_plus_one", "embedding_scale": math.sqrt(config["hidden_size"]), "mlp_bias": False}


def _gemma2(config: Config) -> dict[str, Any]:
    return {
        **_gemma(config),
        "norms": "around",
        "kinds": read_kinds(config, lambda layer: layer % 2 == 0),
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
        "kinds": read_kinds(config, lambda layer: (layer + 1) % every != 0, local_rope=1),
        "qk_norm": "head",
        "ropes": (read_rope(config, GLOBAL, default=1e6), read_rope(local, LOCAL, default=base)),
    }


def _gemma_keys(a: Architecture) -> Config:
    return {"hidden_activation": ACTIVATIONS[a.activation], "attention_bias": a.o_bias}


def _gemma2_keys(a: Architecture) -> Config:
    return {
        **_gemma_keys(a),
        "query_pre_attn_scalar": a.query_scalar,
        "attn_logit_softcapping": a.attention_softcap,
        "final_logit_softcapping": a.final_softcap,
        "sliding_window": window_of(a),
        "layer_types": types_of(a),
    }


def _gemma3_keys(a: Architecture) -> Config:
    return {**_gemma2_keys(a), "rope_local_base_freq": a.ropes[1].theta}


GEMMA: Config = {"head_dim": 256, "tie_word_embeddings": True}
"""What configs of the family may leave out."""
TANH: dict[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"}
"""Its names of activations: `gelu` means the approximation, too."""
GEMMA2: Config = {**GEMMA, "query_pre_attn_scalar": 256, "sliding_window": 4096}
SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}

FAMILIES: dict[str, Family] = {
    "llama": Family(lambda c: read_common(c, _nothing), "LlamaForCausalLM", _biases),
    "mistral": Family(
        lambda c: read_common(c, _mistral), "MistralForCausalLM", lambda a: {"sliding_window": window_of(a)}
    ),
    "phi3": Family(
        lambda c: read_common(c, _phi3, original_max_position_embeddings=4096), "Phi3ForCausalLM", _phi3_keys
    ),
    "qwen2": Family(lambda c: read_common(c, _qwen2), "Qwen2ForCausalLM", _qwen_keys),
    "qwen3": Family(
        lambda c: read_common(c, _qwen3, head_dim=128),
        "Qwen3ForCausalLM",
        lambda a: {**_qwen_keys(a), "attention_bias": a.o_bias},
    ),
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
    "olmo2": Family(lambda c: read_common(c, _olmo2), "Olmo2ForCausalLM", lambda a: {"attention_bias": a.o_bias}),
    "smollm3": Family(
        lambda c: read_common(c, _smollm3, tie_word_embeddings=True, num_key_value_heads=4),
        "SmolLM3ForCausalLM",
        _smollm3_keys,
    ),
    "granite": Family(lambda c: read_common(c, _granite), "GraniteForCausalLM", _granite_keys),
    "gemma": Family(lambda c: read_common(c, _gemma, TANH, **GEMMA), "GemmaForCausalLM", _gemma_keys),
    "gemma2": Family(
        lambda c: read_common({**SOFTCAPS, **c}, _gemma2, TANH, **GEMMA2), "Gemma2ForCausalLM", _gemma2_keys
    ),
    "gemma3_text": Family(
        lambda c: read_common(c, _gemma3, TANH, **GEMMA2),
        "Gemma3ForCausalLM",
        _gemma3_keys,
        classifier="Gemma3TextForSequenceClassification",
    ),
    "gpt_neox": GPT_NEOX,
    "gpt2": GPT2,
    "openelm": OPENELM,
}
"""`model_type` → family."""
