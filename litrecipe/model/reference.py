"""A policy beside the frozen reference that it is held to.

Shapes: P predictions of a row.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from litrecipe.model.adapters import adapter_off, let_go
from litrecipe.model.decoder import Decoder
from litrecipe.model.head import Predictions
from litrecipe.model.row import Row
from litrecipe.model.soft_targets import divergence
from litrecipe.model.tensor_plan import mark


class PolicyAndReference(nn.Module):
    """The policy's predictions, with the reference's log-probabilities (P,) of the same targets beside them.

    Without a `reference` it is the policy's own base. That is right where the adapter started from nothing; one that
    was trained before needs a frozen twin, or the policy would be held to a model it never was.
    """

    def __init__(self, policy: Decoder, reference: Decoder | None = None, temperature: float = 1.0) -> None:
        super().__init__()
        self.policy = policy
        self.reference = reference
        self.temperature = temperature
        """Of every log-probability: that at which completions are sampled."""

    def forward(self, row: Row) -> Predictions:
        """Log-probabilities (P,) of the row's targets."""
        return self.policy(row, self.temperature)._replace(ref_logps=self.ref_logps(row))

    @torch.no_grad()
    def ref_logps(self, row: Row) -> torch.Tensor:
        """The reference's log-probabilities (P,)."""
        if self.reference is not None:
            return self.reference(row, self.temperature).logps
        with adapter_off(self.policy):
            return self.policy(row, self.temperature).logps

    @torch.no_grad()
    def divergence(self, row: Row) -> torch.Tensor:
        """KL (P,) of the policy from the reference in nats at each place of a row that predicts, over the whole
        vocabulary. Summed over what the policy sampled it is, on average, the KL of whole completions."""
        policy, reference = self.policy, self.reference

        def of_both() -> torch.Tensor:
            hidden = policy.hidden(row, row.predict_from)
            if reference is not None:
                other = reference.hidden(row, row.predict_from)
            else:
                with adapter_off(policy):
                    other = policy.hidden(row, row.predict_from)
            weights = policy.lm_head.weight, (reference or policy).lm_head.weight
            cap = policy.architecture.final_softcap
            return divergence(hidden, weights[0], other, weights[1], self.temperature, cap, policy.own_tokens)

        return policy.within(of_both if reference is None else lambda: reference.within(of_both))

    def moving(self) -> dict[str, nn.Parameter]:
        """The reference's copies of what the policy learns, by their names in this module."""
        return {f"reference.{name}": twin for name, _, twin in self._learnt()}

    @torch.no_grad()
    def follow(self, alpha: float) -> None:
        """reference ← α policy + (1 - α) reference (TR-DPO, 2404.09656; α = 1 is its hard update).

        With an adapter its factors are averaged, A with A and B with B, which is not the average of their products
        (unless α is 1).
        """
        for _, parameter, twin in self._learnt():
            twin.lerp_(parameter, alpha) if alpha < 1 else twin.copy_(parameter)

    def _learnt(self) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
        """name, the policy's, the reference's."""
        assert self.reference is not None
        twins = kept(self.reference)
        for name, parameter in kept(self.policy).items():
            if parameter.requires_grad:
                yield name, parameter, twins[name]

    def train(self, mode: bool = True) -> PolicyAndReference:
        """The reference never has dropout."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self


def kept(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter as it is kept: of a model that processes share the pieces, see `let_go`."""
    let_go(model)
    return dict(model.named_parameters())


def frozen_twin(model: Decoder) -> Decoder:
    """The model as it is now, frozen: with copies of what learns, sharing what does not.

    Of a model with an adapter this is a second adapter on the same base; of one that trains whole, a second model.
    FSDP2 shares no parameters: `engine.sharding` copies them.
    """
    twin = copy.deepcopy(model, what_does_not_learn(model)).requires_grad_(False).eval()
    mark(twin)
    return twin


def what_does_not_learn(model: nn.Module) -> dict[int, Any]:
    """What a copy of the model shares with it, as `copy.deepcopy` wants to be told: frozen weights, and the scales of
    those that are in 4 bits, which are no parameters."""
    scales = (getattr(module, "quant_state", None) for module in model.modules())
    return {id(one): one for one in chain(model.parameters(), scales) if one is not None and not learns(one)}


def learns(one: Any) -> bool:
    """Whether a gradient moves it."""
    return isinstance(one, nn.Parameter) and one.requires_grad
