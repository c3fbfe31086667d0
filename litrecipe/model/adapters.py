"""Low-rank adapters on a model: put in, taken out, switched off, merged, counted.

Shapes: i inputs, o outputs of a linear layer, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter
from litrecipe.model.architecture import EXPERTS, PROJECTIONS, Architecture
from litrecipe.model.experts import ExpertMLPs
from litrecipe.model.lora_experts import LoraExperts
from litrecipe.model.names import PEFT_PREFIX, SAME_NAMES, Names
from litrecipe.model.tensor_plan import alike

if TYPE_CHECKING:
    from litrecipe.model.lora_linear import LoraLinear

HEADS = {"lm_head", "score"}
"""Linear layers that get no adapter. A reward model's `score` is small and new: it trains whole beside the adapter."""


def add_adapter(model: nn.Module, config: Adapter, *, seed: int = 0, device: torch.device | str | None = None) -> None:
    """Wrap the target layers of a model whose weights are loaded, and freeze all but the adapter.

    The adapter is fp32 whatever the model is, drawn from `seed` alone: A from U(-1/√i, 1/√i), B zero. DoRA's magnitudes
    are the row norms of the weights that are there now: load them first. A reward model's `score` becomes fp32 and
    belongs to the adapter. The adapter is on `device`, or where the model is: one of a model on the meta device has no
    values, and there magnitudes have none on any device. Raises InputError for targets that the model does not have.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from litrecipe.model.lora_linear import LoraLinear

    experts = {name: module for name, module in model.named_modules() if isinstance(module, ExpertMLPs)}
    if experts:
        _check_experts(model, config)
    config = fitting(config, getattr(model, "architecture", None))
    of_experts = [target for target in config.targets if experts and target in PROJECTIONS]
    of_layers = [target for target in config.targets if target not in of_experts]
    _check_targets(model, of_layers, PROJECTIONS if experts else ())
    peft_config = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=of_layers,
        use_rslora=config.rslora,
        use_dora=config.method == "dora",
    )
    peft_config._register_custom_module({nn.Linear: LoraLinear})
    if of_layers:
        inject_adapter_in_model(peft_config, model)
    if of_experts:
        scale = config.alpha / (math.sqrt(config.r) if config.rslora else config.r)
        for name, module in experts.items():
            model.set_submodule(name, LoraExperts(module, of_experts, config.r, scale))
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapted_layers(model):
        layer.init_weights(generator, device)
    if (score := _score(model)) is not None:
        score.float().requires_grad_()


IN_EXPERTS = dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj")
"""What holds a projection where gate and up are one."""


def fitting(config: Adapter, architecture: Architecture | None) -> Adapter:
    """The settings with the names that a model's layers have: `targets` that are fused in it are what holds them, and
    `up_proj` stands for the gate of an MLP that has none."""
    if architecture is None:
        return config
    names: dict[str, str] = {}
    if architecture.fused:
        names |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj")
    if architecture.fused or architecture.experts:
        names |= IN_EXPERTS
    if not architecture.gated:
        names |= dict.fromkeys(("gate_proj", "up_proj"), "up_proj")
    return replace(config, targets=list(dict.fromkeys(names.get(target, target) for target in config.targets)))


def _check_targets(model: nn.Module, targets: Sequence[str], others: Sequence[str]) -> None:
    """`others`: what is there beside linear layers."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    there = sorted({name.rpartition(".")[2] for name in linears} - HEADS)
    mistakes = [
        f"adapter.targets: {target}: no such layer: the model has {', '.join([*there, *others])}"
        for target in targets
        if target not in there
    ]
    if mistakes:
        raise InputError(*mistakes)


def _check_experts(model: nn.Module, config: Adapter) -> None:
    """peft has no names for plain MLPs beside experts, and of experts neither DoRA nor dropout."""
    named = [target for target in config.targets if IN_EXPERTS.get(target, target) in PROJECTIONS]
    plain = [name for name, module in model.named_modules() if hasattr(module, "gate_proj")]
    cure = f"leave {', '.join(named)} out of adapter.targets"
    mistakes = []
    if plain:
        mistakes.append(
            f"adapter.targets: {', '.join(named)}: peft cannot tell experts from plain MLPs ({plain[0]}): {cure}"
        )
    if config.method == "dora":
        mistakes.append(f"adapter.method: dora: experts can have LoRA only: ask for lora, or {cure}")
    if config.dropout:
        mistakes.append(f"adapter.dropout: {config.dropout}: experts can have none: set it to 0, or {cure}")
    if named and mistakes:
        raise InputError(*mistakes)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter under the names of `adapter_model.safetensors`; tensors of a sharded model stay sharded."""
    let_go(model)
    return {name: alike(parameter.detach(), parameter) for name, parameter in _parameters(model).items()}


def let_go(model: nn.Module) -> None:
    """Of a model that processes share hold pieces only: what was gathered last stays, to be asked again."""
    for part in model.modules():
        if (reshard := getattr(part, "reshard", None)) is not None:
            reshard()


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy saved values into the adapter. Raises InputError naming all that is missing, unexpected or misshapen."""
    parameters = _parameters(model)
    mistakes = [f"adapter: {name}: missing from the file" for name in parameters if name not in state]
    mistakes += [f"adapter: {name}: not in this model's adapter" for name in state if name not in parameters]
    mistakes += [
        f"adapter: {name}: shape {list(state[name].shape)}: must be {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in state and state[name].shape != parameter.shape
    ]
    if mistakes:
        raise InputError(*mistakes)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def adapter_config(
    config: Adapter,
    base: str,
    *,
    names: Names = SAME_NAMES,
    with_score: bool = False,
    with_experts: bool = False,
) -> dict[str, Any]:
    """`adapter_config.json` for peft; `base` is the folder or hub id of the model it belongs to, `names` those of its
    family's files.

    `with_score`: the adapter of a reward model; `with_experts`: of one whose MLPs are experts.
    """
    of_experts = [target for target in config.targets if with_experts and target in PROJECTIONS]
    kind = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if with_score else {"task_type": "CAUSAL_LM"}
    return {
        "peft_type": "LORA",
        **kind,
        "base_model_name_or_path": base,
        "r": config.r,
        # other readers of the format take whole numbers only
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": names.targets_in_files([one for one in config.targets if one not in of_experts]),
        **({"target_parameters": [f"{EXPERTS}.{target}" for target in of_experts]} if of_experts else {}),
        **({"fan_in_fan_out": True} if names.transposes else {}),
        "use_rslora": config.rslora,
        "use_dora": config.method == "dora",
        "bias": "none",
        "inference_mode": True,
    }


@torch.no_grad()
def merge_adapter(model: nn.Module, *, dtype: torch.dtype = torch.float32) -> None:
    """Fold the adapter into the weights and take its layers out.

    A plain layer keeps its dtype; quantised layers, adapted or not, become plain ones of their restored weights in
    `dtype`.
    """
    from litrecipe.model.quantize import QuantizedLinear, dequantize, plain_linear

    for name, layer in adapted_layers(model):
        if isinstance(layer, LoraExperts):
            model.set_submodule(name, layer.merge(dtype))
            continue
        base = layer.base
        target = dtype if isinstance(base, QuantizedLinear) else base.weight.dtype
        model.set_submodule(name, plain_linear(layer.merged_weight().to(target), base.bias))
    dequantize(model, dtype=dtype)


def has_adapter(model: nn.Module) -> bool:
    """Whether there is an adapter to switch off."""
    return any(hasattr(module, "lora_A") for module in model.modules())


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is its base, bit for bit; a reward model keeps its score."""
    layers = [layer for _, layer in adapted_layers(model)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        # peft's enable_adapters would also switch requires_grad, which the optimizer and sharding rely on
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


class Count(NamedTuple):
    """Parameters of one kind."""

    total: int
    trained: int


def describe_parameters(model: nn.Module) -> dict[str, Count]:
    """Counts by kind (embedding, attention, mlp, experts, router, norm, head, adapter) and over all; a quantised weight
    counts whole."""
    counts: dict[str, Count] = {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        is_packed = leaf == "weight" and isinstance(module, nn.Linear) and not parameter.is_floating_point()
        size = module.in_features * module.out_features if is_packed else parameter.numel()
        for kind in (_kind(name), "all"):
            total, trained = counts.get(kind, (0, 0))
            counts[kind] = Count(total + size, trained + size * parameter.requires_grad)
    return counts


def _kind(name: str) -> str:
    parts = name.split(".")
    if any(part.startswith("lora_") for part in parts):
        return "adapter"
    words = dict.fromkeys(("embed_tokens", "embed_positions"), "embedding")
    words |= {"self_attn": "attention", "experts": "experts", "gate": "router", "mlp": "mlp"}
    words |= dict.fromkeys(HEADS, "head")
    return next((kind for word, kind in words.items() if word in parts), "norm")


def adapted_layers(model: nn.Module) -> list[tuple[str, LoraLinear | LoraExperts]]:
    """Path and layer of all that have an adapter."""
    from litrecipe.model.lora_linear import LoraLinear

    kinds = LoraLinear, LoraExperts
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def _score(model: nn.Module) -> nn.Module | None:
    """The head of a reward model."""
    return getattr(model, "score", None)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's own parameters under peft's names, and the score's."""
    parameters = {
        f"{PEFT_PREFIX}{path}.{name}": parameter
        for path, layer in adapted_layers(model)
        for name, parameter in layer.adapter_parameters().items()
    }
    if (score := _score(model)) is not None:
        parameters |= {f"{PEFT_PREFIX}score.{name}": parameter for name, parameter in score.named_parameters()}
    return parameters
