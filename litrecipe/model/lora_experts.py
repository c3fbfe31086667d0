"""Low-rank updates of experts, in the layout in which peft keeps those of parameters that hold all experts.

Shapes: E experts, i inputs, o outputs of a projection, r rank of each expert's update, P tokens that are worked on,
k experts of each, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from litrecipe.model.architecture import PROJECTIONS
from litrecipe.model.experts import ExpertMLPs, Update


class LoraExperts(nn.Module):
    """LoRA (2106.09685) on frozen experts, plain or quantised: of expert e, W + s · B_e A_e."""

    def __init__(self, base: ExpertMLPs, names: Iterable[str], r: int, scale: float) -> None:
        """The update has no memory until `init_weights` gives it values."""
        super().__init__()
        self.base_layer = base
        self.r, self.scale = r, scale
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self._disable_adapters = False
        for name in PROJECTIONS:
            if name in names:
                o, i = base.shapes[name]
                self.lora_A[name] = nn.Parameter(torch.empty(base.count * r, i, device="meta"))
                self.lora_B[name] = nn.Parameter(torch.empty(o, base.count * r, device="meta"))

    def forward(self, x: Tensor, choice: Tensor, share: Tensor) -> Tensor:
        """x (P, d), with experts and their shares (P, k) → (P, d)."""
        updates = {} if self._disable_adapters else {name: self.update(name) for name in self.lora_A}
        return self.base_layer.work(x, choice, share, updates)

    def update(self, name: str) -> Update:
        """That of a projection. peft keeps A as (E r, i), expert by expert, and B as (o, r E), rank by rank."""
        a, b, experts = self.lora_A[name], self.lora_B[name], self.base_layer.count
        return Update(
            a.view(experts, self.r, a.shape[1]), b.view(b.shape[0], self.r, experts).permute(2, 0, 1), self.scale
        )

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, under the names of peft's files: it wraps the experts once for each projection, and so the
        last one's come first."""
        parameters: dict[str, nn.Parameter] = {}
        for depth, name in enumerate(reversed(list(self.lora_A))):
            inside = "base_layer." * depth
            parameters[f"{inside}lora_A.weight"] = self.lora_A[name]
            parameters[f"{inside}lora_B.weight"] = self.lora_B[name]
        return parameters

    def init_weights(self, generator: torch.Generator, device: torch.device | str | None = None) -> None:
        """As `LoraLinear`'s: each A from U(-1/√i, 1/√i) and B zero, in fp32 on a device or that of the base."""
        device = device or next(self.base_layer.parameters()).device
        for name in self.lora_A:
            shape, bound = self.lora_A[name].shape, 1 / math.sqrt(self.lora_A[name].shape[1])
            a = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
            self.lora_A[name] = nn.Parameter(a.to(device))
            b = torch.zeros(self.lora_B[name].shape, dtype=torch.float32, device=device)
            self.lora_B[name] = nn.Parameter(b)

    @torch.no_grad()
    def merge(self, dtype: torch.dtype) -> ExpertMLPs:
        """The experts with the update in their weights, in their dtype; quantised ones are restored, in `dtype`."""
        from litrecipe.model.quantize import dense_experts  # bitsandbytes takes seconds to import

        base = self.base_layer
        for name in PROJECTIONS:
            before = getattr(base, name)
            weight = dense_experts(base, name, torch.float32)
            if name in self.lora_A:
                a, b, scale = self.update(name)
                assert a is not None and b is not None
                with torch.autocast(weight.device.type, enabled=False):
                    weight = torch.baddbmm(weight, b, a, alpha=scale)
            delattr(base, name)
            kept = before.dtype if isinstance(before, Tensor) else dtype
            setattr(base, name, nn.Parameter(weight.to(kept), requires_grad=False))
        return base
