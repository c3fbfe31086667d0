"""A running mean of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from litrecipe.model.decoder import Decoder
from litrecipe.model.reference import kept
from litrecipe.model.tensor_plan import alike


class Average:
    """A running mean of a policy's weights, after each step (decay · itself + (1 - decay) · policy)."""

    def __init__(self, policy: Decoder, decay: float) -> None:
        self.policy, self.decay = policy, decay
        self.twins: dict[str, nn.Parameter] = {}
        """Of what the policy learns, by its names there."""

    def begin(self) -> dict[str, nn.Parameter]:
        """Start from the policy as it is, on its device; name → weights that a checkpoint must hold."""
        self.twins = {
            name: cast(nn.Parameter, alike(nn.Parameter(parameter.detach().clone(), requires_grad=False), parameter))
            for name, parameter in kept(self.policy).items()
            if parameter.requires_grad
        }
        return {f"ema.{name}": twin for name, twin in self.twins.items()}

    @torch.no_grad()
    def follow(self) -> None:
        """One step."""
        parameters = kept(self.policy)
        for name, twin in self.twins.items():
            twin.lerp_(parameters[name], 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the policy has these weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        parameters = kept(self.policy)
        for name, twin in self.twins.items():
            before = parameters[name].clone()
            parameters[name].copy_(twin)
            twin.copy_(before)
