"""What the `config.json` of all families have in common: required keys, types of values, positions, kinds of layers.

Both dialects are read: the Hub's (`rope_theta`, `rope_scaling`) and that of transformers 5 (`rope_parameters`,
`layer_types`). `families` says what each family has besides.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from litrecipe.config.errors import InputError
from litrecipe.model.architecture import Activation, Architecture, LayerKind, Rope, turning_dimensions
from litrecipe.model.names import SAME_NAMES, Names

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
    keys: Mapping[str, str] = MappingProxyType({})
    """What common keys are called in its config."""
    omits: Collection[str] = ()
    """Common keys that its config does not have."""
    names: Names = SAME_NAMES
    """What its files call the parts of a model."""


REQUIRED_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
}
"""Field → key; what has no default that holds for every model of a family."""
ACTIVATIONS: dict[Activation, str] = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Names that are written."""
SILU: dict[str, Activation] = {"silu": "silu"}

NUMBERS = {"rms_norm_eps", "rope_theta", "rope_local_base_freq", "initializer_range"}
NUMBERS |= {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "partial_rotary_factor"}
COUNTS = {*REQUIRED_KEYS.values(), "num_key_value_heads", "head_dim", "sliding_window"} - NUMBERS
COUNTS |= {"sliding_window_pattern", "_sliding_window_pattern", "no_rope_layer_interval"}
COUNTS |= {"num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"}
COUNTS |= {"original_max_position_embeddings", "num_gqa_groups", "ffn_dim_divisor"}
NUMBERS |= {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}
"""Keys of numbers above 0, and of those that are whole."""
LARGEST, MOST_LAYERS = 2**31 - 1, 10_000
"""Of whole numbers, and of layers: what is larger is damage or mischief, and would be counted for hours."""
WEIGHTS = {"router_aux_loss_coef", "router_jitter_noise"}
"""Keys of numbers that may be 0."""
SWITCHES = {"tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention"}
SWITCHES |= {"norm_topk_prob"}
SWITCHES |= {"use_parallel_residual", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention"}
SWITCHES |= {"normalize_qk_projections", "ffn_with_glu"}
IDS = {"bos_token_id", "pad_token_id", "max_window_layers"}
OBJECTS = {"rope_parameters", "rope_scaling"}
LISTS = {"layer_types", "no_rope_layers", "mlp_only_layers"}


def _wrong_types(config: Config) -> list[str]:
    """A mistake for every value that is not of the type of its key; null stands for the default."""
    mistakes = []
    for keys, fits, wanted in (
        (COUNTS, lambda value: type(value) is int and value > 0, "a whole number above 0"),
        (COUNTS, lambda value: type(value) is not int or value <= LARGEST, f"at most {LARGEST}"),
        (NUMBERS, lambda value: type(value) in (int, float) and value > 0, "a number above 0"),
        (WEIGHTS, lambda value: type(value) in (int, float) and value >= 0, "a number from 0 on"),
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


def read_common(
    config: Config,
    own: Callable[[Config], dict[str, Any]],
    activations: Mapping[str, Activation] = SILU,
    *,
    keys: Mapping[str, str] = MappingProxyType({}),
    **defaults: Any,
) -> Architecture:
    """What all configs say, with `defaults` for the family's; `own` gives the fields that are not read here.

    `activations` are those of the family by name, its default first; `keys` what common keys are called in its configs.
    `own` is given the common keys.
    """
    try:
        return _read(_with_common_keys(config, keys), own, activations, defaults)
    except InputError as error:
        raise InputError(*(_with_own_key(line, keys) for line in error.mistakes)) from error


def _with_common_keys(config: Config, keys: Mapping[str, str]) -> Config:
    """A common key that the family calls otherwise means nothing in its configs."""
    others = {key: value for key, value in config.items() if key not in keys and key not in keys.values()}
    return others | {key: config[own] for key, own in keys.items() if own in config}


def _with_own_key(line: str, keys: Mapping[str, str]) -> str:
    """A mistake that names the family's key, not the common one."""
    file, key, rest = line.split(": ", 2)
    return f"{file}: {keys.get(key, key)}: {rest}"


def _read(
    config: Config,
    own: Callable[[Config], dict[str, Any]],
    activations: Mapping[str, Activation],
    defaults: Config,
) -> Architecture:
    if mistakes := _wrong_types(config):
        raise InputError(*mistakes)
    config = defaults | {key: value for key, value in config.items() if value is not None or key not in defaults}
    missing = [key for key in REQUIRED_KEYS.values() if config.get(key) is None]
    mistakes = [f"config.json: {key}: missing: it has no default" for key in missing]
    if (layers := config.get("num_hidden_layers") or 0) > MOST_LAYERS:
        raise InputError(
            f"config.json: num_hidden_layers: {layers}: must be at most {MOST_LAYERS}: fetch the model again"
        )
    activation = next(iter(activations.values()))
    for key in ("hidden_act", "hidden_activation"):
        value = config.get(key)
        if isinstance(value, str) and value in activations:
            activation = activations[value]
        elif value is not None:
            names = " and ".join(activations)
            mistakes.append(f"config.json: {key}: {value}: only {names} is known for this family")
    fields: dict[str, Any] = {}
    try:
        if not missing:
            fields = own(config)
        if "ropes" not in fields:
            fields["ropes"] = (read_rope(config),)
    except InputError as error:
        mistakes += error.mistakes
    if mistakes:
        raise InputError(*mistakes)
    heads = config["num_attention_heads"]
    kv_heads = fields.pop("num_kv_heads", config.get("num_key_value_heads") or heads)
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
    "longrope": ("factor", "original_max_position_embeddings"),
}
"""Kinds of rotary embedding and the numbers each needs."""
ROPE_OPTIONS = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor",),
}
"""What else a kind may give: numbers, and one switch."""
FACTORS = ("short_factor", "long_factor")
"""Of LongRoPE: a number for each pair that turns."""


def read_rope(
    config: Config,
    part: str | None = None,
    default: float = 10000.0,
    *,
    share: float | None = None,
    other_names: Mapping[str, str] = MappingProxyType({}),
) -> Rope:
    """From `rope_parameters` (transformers 5; a `part` of it where layers differ) or `rope_theta` and `rope_scaling`.

    `default` is the base where none is given, `share` what part of a head turns where the config does not say it (None:
    all of it, and it may say nothing else), `other_names` what kinds are called besides. Raises InputError.
    """
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
    kind = other_names.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in ROPE_NUMBERS:
        raise InputError(f"config.json: {key}.rope_type: {kind}: one of {', '.join(ROPE_NUMBERS)} is implemented")
    if kind == "longrope":
        values = {**values, **_lengths(config, values)}
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
    said = values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    turning = (share or 1.0) if said is None else said
    if turning != 1 and (share is None or not isinstance(turning, int | float) or not 0 < turning < 1):
        cure = "all of a head turns in this family" if share is None else "must be a number from 0 to 1"
        mistakes.append(f"config.json: partial_rotary_factor: {turning}: {cure}")
    if mistakes:
        raise InputError(*mistakes)
    numbers = {name: values[name] for name in ROPE_NUMBERS[kind]}
    rope = Rope(float(theta), None, float(turning))
    if kind == "longrope":
        options |= _factors(config, key, values, rope)
    return rope if kind == "default" else rope._replace(scaling={"rope_type": kind, **numbers, **options})


def _lengths(config: Config, values: Config) -> Config:
    """LongRoPE's numbers, of which Phi-3's configs say one beside `rope_scaling` and the other not at all."""
    name = "original_max_position_embeddings"
    original, factor = config.get(name) or values.get(name), values.get("factor")
    if factor is None and type(original) is int and original > 0 and config.get("max_position_embeddings"):
        factor = config["max_position_embeddings"] / original
    return {"factor": factor, name: original}


def _factors(config: Config, key: str, values: Config, rope: Rope) -> Config:
    """LongRoPE's lists; raises InputError."""
    head_dim = config.get("head_dim") or (config.get("hidden_size") or 0) // (config.get("num_attention_heads") or 1)
    pairs = turning_dimensions(rope, head_dim) // 2
    mistakes = []
    for name in FACTORS:
        found = values.get(name)
        numbers = found if isinstance(found, list) else []
        if len(numbers) != pairs or not all(type(one) in (int, float) and one > 0 for one in numbers):
            said = shortened(numbers) if numbers else found
            wanted = f"must be {pairs} numbers above 0, one a pair that turns"
            mistakes.append(f"config.json: {key}.{name}: {said}: {wanted}: fetch the model again")
    if mistakes:
        raise InputError(*mistakes)
    return {name: [float(one) for one in values[name]] for name in FACTORS}


def read_kinds(config: Config, is_local: Callable[[int], bool], *, local_rope: int = 0) -> tuple[LayerKind, ...]:
    """By `layer_types`, or, where there are none, by which layers are local; raises InputError."""
    count, window = config["num_hidden_layers"], config.get("sliding_window")
    types = config.get("layer_types")
    if types is None:
        types = [LOCAL if is_local(layer) else GLOBAL for layer in range(count)]
    if len(types) != count or not set(map(str, types)) <= {LOCAL, GLOBAL}:
        wanted = f"must name each of the {count} layers {LOCAL} or {GLOBAL}"
        raise InputError(f"config.json: layer_types: {shortened(types)}: {wanted}: fetch the model again")
    if LOCAL in types and window is None:
        raise InputError("config.json: sliding_window: missing: layer_types has layers with a window")
    local, wide = LayerKind(window, local_rope), LayerKind()
    return tuple(local if one == LOCAL else wide for one in types)


def shortened(values: Sequence[Any]) -> str:
    """The first of them and how many there are, for messages."""
    return f"{', '.join(map(str, values[:3]))}{', …' if len(values) > 3 else ''} ({len(values)})"


def window_of(a: Architecture) -> int | None:
    """That of the layers that have one."""
    return next((kind.window for kind in a.kinds if kind.window), None)


def types_of(a: Architecture) -> list[str]:
    """`layer_types`."""
    return [LOCAL if a.kind(layer).window else GLOBAL for layer in range(a.num_layers)]
