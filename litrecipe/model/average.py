"""A running mean of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from litrecipe.model.decoder import Decoder
from litrecipe.model.reference import frozen_twin


class Average:
    """A running mean of a policy's weights, after each step (decay · itself + (1 - decay) · policy)."""

    def __init__(self, policy: Decoder, decay: float) -> None:
        self.policy, self.decay = policy, decay
        self.model = policy

    def begin(self) -> dict[str, nn.Parameter]:
        """Start from the policy as it is, on its device; name → weights that a checkpoint must hold."""
        self.model = frozen_twin(self.policy)
        return {f"ema.{name}": twin for name, twin, _ in self._pairs()}

    @torch.no_grad()
    def follow(self) -> None:
        """One step."""
        for _, twin, parameter in self._pairs():
            twin.lerp_(parameter, 1 - self.decay)

    def _pairs(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        twins = dict(self.model.named_parameters())
        for name, parameter in self.policy.named_parameters():
            if parameter.requires_grad:
                yield name, twins[name], parameter
