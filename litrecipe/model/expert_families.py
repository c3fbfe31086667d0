"""Families whose MLPs are mixtures of experts: Mixtral, Qwen 3 MoE.

Shapes: E experts, I inner size of one, d hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from litrecipe.config.errors import InputError
from litrecipe.model.architecture import EXPERTS, Architecture, Experts, LayerKind
from litrecipe.model.hf_config import Config, Family, read_common, read_rope, window_of
from litrecipe.model.names import Names

if TYPE_CHECKING:
    from torch import Tensor

TOGETHER = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The weights of all experts in memory, and what is in them of each, by memory's names for a plain MLP."""
PARTS = tuple(part for parts in TOGETHER.values() for part in parts)


class ExpertNames(Names):
    """Of families whose files have each expert's weights on their own, where memory has those of all experts as one:
    gate and up as `gate_up_proj` (E, 2 I, d), down as `down_proj` (E, d, I)."""

    def __init__(self, modules: Mapping[str, str] | None = None, *, parts: Iterable[str] = PARTS) -> None:
        """`parts` are the names of `PARTS` in files."""
        super().__init__(modules)
        self.parts = dict(zip(PARTS, parts, strict=True))
        self._inwards = {theirs: own for own, theirs in self.parts.items()}
        self._part = re.compile(rf"(.*\.{re.escape(EXPERTS)}\.\d+)\.(\w+)\.weight")

    def in_files(self, name: str) -> str:
        """An expert's weight is `model.layers.0.mlp.experts.3.up_proj.weight` here. Adapters are of all experts, under
        memory's names."""
        if ".lora_" in name:
            return name
        found = self._part.fullmatch(name)
        return super().in_files(name if found is None else f"{found[1]}.{self.parts[found[2]]}.weight")

    def in_memory(self, name: str) -> str:
        """The other way round."""
        own = super().in_memory(name)
        found = self._part.fullmatch(own)
        return own if found is None else f"{found[1]}.{self._inwards.get(found[2], found[2])}.weight"

    def read(self, tensors: Iterable[tuple[str, Tensor]], architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
        """The tensors of files as they are in memory; those of all experts with the last of their parts."""
        import torch

        a = architecture.experts
        assert a is not None
        shapes = {
            "gate_up_proj": (a.count, 2 * a.size, architecture.hidden_size),
            "down_proj": (a.count, architecture.hidden_size, a.size),
        }
        whole: dict[str, Tensor] = {}
        missing: dict[str, int] = {}
        for name, tensor in super().read(tensors, architecture):
            if self._part.fullmatch(name) is None:
                yield name, tensor
                continue
            _, expert, part = name.removesuffix(".weight").rsplit(".", 2)
            together = self._whole(name)
            leaf = together.rpartition(".")[2]
            parts = TOGETHER[leaf]
            if together not in whole:
                whole[together] = torch.empty(shapes[leaf], dtype=tensor.dtype)
                missing[together] = a.count * len(parts)
            whole[together][int(expert)].chunk(len(parts))[parts.index(part)].copy_(tensor)
            missing[together] -= 1
            if not missing[together]:
                yield together, whole.pop(together)

    def read_rows(
        self, name: str, parts: Sequence[str], rows: slice, read: Callable[[str], Tensor], architecture: Architecture
    ) -> Tensor:
        """As those of `Names`; of experts only those that are asked for are read."""
        leaf = _of_experts(name)[1]
        if leaf is None:
            return super().read_rows(name, parts, rows, read, architecture)
        import torch

        own = {self.in_memory(part): part for part in parts}
        experts = range(len(parts) // len(TOGETHER[leaf]))[rows]
        found = [
            torch.cat([read(own[f"{_of_experts(name)[0]}.{expert}.{part}.weight"]) for part in TOGETHER[leaf]])
            for expert in experts
        ]
        return torch.stack(found) if found else torch.empty(0, 1, 1)

    def keeps(self, name: str) -> bool:
        """Whether a weight lies in files as it does in memory."""
        return _of_experts(name)[1] is None and super().keeps(name)

    def _whole(self, name: str) -> str:
        """The weight of all experts that an expert's is in."""
        if self._part.fullmatch(name) is None:
            return name
        experts, _, part = name.removesuffix(".weight").rsplit(".", 2)
        return next(f"{experts}.{leaf}" for leaf, parts in TOGETHER.items() if part in parts)

    def written(self, tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
        """Tensors of memory as files have them."""
        apart: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            experts, leaf = _of_experts(name)
            if leaf is None:
                apart[name] = tensor
                continue
            for expert, weight in enumerate(tensor):
                for part, one in zip(TOGETHER[leaf], weight.chunk(len(TOGETHER[leaf])), strict=True):
                    apart[f"{experts}.{expert}.{part}.weight"] = one
        return super().written(apart, architecture)

    def parted(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Each expert's weights in memory, by the names that they have on their own."""
        apart: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            experts, leaf = _of_experts(name)
            if leaf is None:
                apart[name] = shape
                continue
            count, o, i = shape
            for part in TOGETHER[leaf]:
                one = o // len(TOGETHER[leaf]), i
                apart |= {f"{experts}.{expert}.{part}.weight": one for expert in range(count)}
        return apart


def _of_experts(name: str) -> tuple[str, str | None]:
    """`….mlp.experts` and which weight of theirs; None where it is none."""
    experts, _, leaf = name.rpartition(".")
    return (experts, leaf) if experts.endswith(f".{EXPERTS}") else (name, None)


def _experts(config: Config, default: int, **fields: Any) -> dict[str, Experts]:
    """How many there are is `num_local_experts`, `num_experts`, or the `default`. Raises InputError."""
    names = config.get("num_local_experts"), config.get("num_experts"), default
    count, chosen = next(filter(None, names)), config["num_experts_per_tok"]
    if chosen > count:
        raise InputError(f"config.json: num_experts_per_tok: {chosen}: there are {count}: fetch the model again")
    coef, jitter = config.get("router_aux_loss_coef"), config.get("router_jitter_noise") or 0.0
    coef = 0.001 if coef is None else coef
    return {"experts": Experts(count, chosen, jitter=jitter, balance_coef=coef, **fields)}


def _experts_keys(a: Architecture, count: str) -> Config:
    """`count` is the key of their number."""
    assert a.experts is not None
    return {
        count: a.experts.count,
        "num_experts_per_tok": a.experts.chosen,
        "router_aux_loss_coef": a.experts.balance_coef,
        "output_router_logits": False,
    }


def _window(config: Config, window: int | None) -> dict[str, tuple[LayerKind, ...]]:
    """That of all layers."""
    return {"kinds": (LayerKind(window),) * config["num_hidden_layers"] if window else ()}


# -- Mixtral ----------------------------------------------------------------------------------------------------------


def _mixtral(config: Config) -> dict[str, Any]:
    return {
        **_window(config, config.get("sliding_window")),
        **dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), False),
        "ropes": (read_rope(config, default=1e6),),
        **_experts(config, 8, size=config["intermediate_size"]),
    }


def _mixtral_keys(a: Architecture) -> Config:
    assert a.experts is not None
    own = {"sliding_window": window_of(a), "router_jitter_noise": a.experts.jitter}
    return {**own, **_experts_keys(a, "num_local_experts")}


MIXTRAL = Family(
    lambda c: read_common({"num_key_value_heads": 8, "num_experts_per_tok": 2, **c}, _mixtral),
    "MixtralForCausalLM",
    _mixtral_keys,
    names=ExpertNames(
        {"mlp.gate": "block_sparse_moe.gate", EXPERTS: "block_sparse_moe.experts"}, parts=("w1", "w3", "w2")
    ),
)
"""2401.04088."""


# -- Qwen 3 -----------------------------------------------------------------------------------------------------------


def _qwen3_moe(config: Config) -> dict[str, Any]:
    """Some layers may have a plain MLP."""
    every, count = config.get("decoder_sparse_step") or 1, config["num_hidden_layers"]
    named = config.get("mlp_only_layers") or []
    dense = tuple(layer for layer in range(count) if layer in named or (layer + 1) % every)
    if len(dense) == count:
        raise InputError("config.json: mlp_only_layers, decoder_sparse_step: no layer has experts: it is a qwen3")
    size, renormalise = config["moe_intermediate_size"], config.get("norm_topk_prob") or False
    return {
        **_window(config, config.get("sliding_window") if config.get("use_sliding_window") else None),
        "qk_norm": "head",
        "mlp_bias": False,
        **_experts(config, 128, size=size, renormalise=renormalise, dense_layers=dense),
    }


def _qwen3_moe_keys(a: Architecture) -> Config:
    assert a.experts is not None
    return {
        **_experts_keys(a, "num_experts"),
        "moe_intermediate_size": a.experts.size,
        "norm_topk_prob": a.experts.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(a.experts.dense_layers),
        "use_sliding_window": window_of(a) is not None,
        "sliding_window": window_of(a),
        "attention_bias": a.o_bias,
    }


DEFAULTS = {"num_key_value_heads": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
"""What its configs may leave out."""
QWEN3_MOE = Family(
    lambda c: read_common({**DEFAULTS, **c}, _qwen3_moe),
    "Qwen3MoeForCausalLM",
    _qwen3_moe_keys,
    names=ExpertNames(),
)
"""2505.09388."""
