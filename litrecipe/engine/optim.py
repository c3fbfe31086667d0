"""Optimizers by name, and their state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from litrecipe.checkpoint.state import Pieces
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Optim, Schedule
from litrecipe.model.tensor_plan import alike, held_of

STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "paged_adamw8bit": 2.1, "sgd": 4.0}
"""Bytes of state per trained parameter in fp32; 8-bit state carries a scale for each block of 256."""


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter for everything that learns, tied ones once."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class Role:
    """Weights that have a learning rate of their own and are clipped together, such as a policy's or a critic's."""

    name: str
    """The module that holds them, as a name in what is trained; empty for everything."""
    lr: float
    """Peak learning rate."""
    grad_clip: float | None
    """Largest gradient norm."""
    schedule: Schedule | None = None
    """Of the learning rate; None: that of the run."""

    def parameters(self, of_all: dict[str, nn.Parameter]) -> list[nn.Parameter]:
        """Those of the role, out of name → parameter."""
        return [p for name, p in of_all.items() if not self.name or name.startswith(f"{self.name}.")]


class Treatment(NamedTuple):
    """What weights of a role may differ in."""

    decays: bool
    share: float = 1.0
    """Of the role's learning rate."""


def plain_treatment(name: str, parameter: nn.Parameter) -> Treatment:
    """Decay applies to matrices only: norms, biases and DoRA magnitudes are left alone."""
    return Treatment(parameter.dim() >= 2)


def make_optimizer(
    parameters: dict[str, nn.Parameter],
    config: Optim,
    roles: Sequence[Role] = (),
    treatment: Callable[[str, nn.Parameter], Treatment] = plain_treatment,
) -> torch.optim.Optimizer:
    """Build the optimizer; `treatment` says of each weight by its name how it is dealt with.

    Each group says its `role` and its `peak_lr`: that of its role, or `config.lr` where there are none, or a share.
    """
    groups: list[dict[str, Any]] = []
    treated = {parameter: treatment(name, parameter) for name, parameter in parameters.items()}
    for role in roles or [Role("", config.lr, None)]:
        alike: dict[Treatment, list[nn.Parameter]] = {}
        for parameter in role.parameters(parameters):
            alike.setdefault(treated[parameter], []).append(parameter)
        for (decays, share), some in sorted(alike.items(), reverse=True):
            lr, decay = role.lr * share, config.weight_decay if decays else 0.0
            groups.append({"params": some, "weight_decay": decay, "lr": lr, "peak_lr": lr, "role": role.name})
    adam: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if config.name == "adamw":
        return torch.optim.AdamW(groups, **adam, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.betas[0])
    import bitsandbytes as bnb

    kind = bnb.optim.AdamW8bit if config.name == "adamw8bit" else bnb.optim.PagedAdamW8bit
    return kind(groups, **adam)


def set_rates(optimizer: torch.optim.Optimizer, config: Optim, factors: Mapping[str, float]) -> None:
    """Set what the next step depends on: each group's share of its peak learning rate, by role, and Adam's epsilon.

    With `adam_style` tf, epsilon stands outside of the bias correction, as in the programs that PPO on language models
    was first published with (1909.08593): (√v + ε) / √(1 - β₂ᵗ) is √v̂ + ε / √(1 - β₂ᵗ).
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factors[group["role"]]
        if config.adam_style == "tf":
            taken = max((int(optimizer.state[p]["step"]) for p in group["params"] if p in optimizer.state), default=0)
            group["eps"] = config.eps / math.sqrt(1 - config.betas[1] ** (taken + 1))


def optimizer_bytes(name: str, trained: Iterable[nn.Parameter]) -> int:
    """About what the state of an optimizer will take."""
    return int(sum(STATE_BYTES[name] / 4 * (p.numel() * p.element_size()) for p in trained))


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """All state as tensors named `<parameter>::<key>`; plain numbers become tensors of no dimension."""
    state: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            state[f"{name}::{key}"] = alike(value, parameter) if isinstance(value, Tensor) else torch.tensor(value)
    return state


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], saved: Pieces, kind: str, saved_kind: str
) -> None:
    """Put saved state back, bit for bit. Raises InputError when it belongs to another optimizer."""
    if kind != saved_kind:
        raise InputError(
            f"optim.name: {kind}: the checkpoint holds {saved_kind} state: resume with that, or start a new out_dir"
        )
    keys: dict[str, list[str]] = {}
    for full_name in saved.names():
        name, key = full_name.rsplit("::", 1)
        keys.setdefault(name, []).append(key)
    bitsandbytes: Any = optimizer if hasattr(optimizer, "init_state") else None
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            name = next(name for name, candidate in parameters.items() if candidate is parameter)
            if name not in keys:
                continue
            if bitsandbytes:
                # Its buffers have their own makers (paged memory, shared maps), so fill them in place.
                bitsandbytes.check_overrides()
                bitsandbytes.init_state(group, parameter, group_index, index)
                bitsandbytes.initialized = True
            _fill(optimizer.state[parameter], name, keys[name], saved, parameter)


def _fill(state: dict[str, Any], name: str, keys: list[str], saved: Pieces, parameter: nn.Parameter) -> None:
    from torch.distributed.tensor import DTensor

    for key in keys:
        full_name = f"{name}::{key}"
        if isinstance(state.get(key), (int, float)):
            state[key] = saved.read(full_name).item()
        elif isinstance(state.get(key), Tensor):
            state[key].copy_(saved.read(full_name))
        elif saved.shapes[full_name] == held_of(parameter).whole_shape(parameter.shape):
            state[key] = saved.like(full_name, parameter).to(parameter.device)
            if isinstance(parameter, DTensor):
                shape, stride = parameter.shape, parameter.stride()
                state[key] = DTensor.from_local(
                    state[key], parameter.device_mesh, parameter.placements, shape=shape, stride=stride
                )
        else:
            value = saved.read(full_name)
            # fused kernels keep `step` beside the parameter, whatever its dtype
            state[key] = value.to(parameter.device)
