"""Critics, which say what a policy may expect from where it stands, and the module in which both are trained.

Shapes: P predictions of a row, A answers of it, d hidden size.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from litrecipe.model.actor_critic import ActorCriticOutput
from litrecipe.model.adapters import has_adapter, merge_adapter
from litrecipe.model.decoder import Decoder
from litrecipe.model.head import Predictions
from litrecipe.model.reference import PolicyAndReference, what_does_not_learn
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import Row


class Critic(RewardModel):
    """A reward model that is asked at every prediction of a row, before its target is known.

    Where it began as a reward model whose rewards were measured, values are in the same units as those.
    """

    def forward(self, row: Row) -> Tensor:
        """Values (P,) of `row.predict_from`; fp32."""
        return self.normalised(self.read(row, row.predict_from))


class OnlinePolicy(PolicyAndReference):
    """A policy that learns from what it sampled. The reference is asked once a rollout, not in every step."""

    def forward(self, row: Row) -> Predictions:
        """The policy's predictions."""
        return self.policy(row, self.temperature)


class ActorAndCritic(PolicyAndReference):
    """A policy beside its critic: two models, two adapters on one base, or, joined, one model with two heads."""

    def __init__(
        self, policy: Decoder, critic: Critic, reference: Decoder | None = None, temperature: float = 1.0
    ) -> None:
        super().__init__(policy, reference, temperature)
        self.critic = critic

    @property
    def joined(self) -> bool:
        """Whether both heads are on one transformer."""
        return self.critic.model is self.policy.model

    def forward(self, row: Row) -> ActorCriticOutput:  # type: ignore[override]
        """The policy's predictions, and values (P,) of the places they are made from."""
        if not self.joined:
            return ActorCriticOutput(self.policy(row, self.temperature), self.critic(row))

        def both() -> ActorCriticOutput:
            hidden = self.policy.hidden(row, row.predict_from)
            values = self.critic.normalised(self.critic.scores(hidden))
            return ActorCriticOutput(self.policy.said(hidden, row, self.temperature), values)

        return self.policy.within(both)


def critic_beside(policy: Decoder, *, joined: bool = False) -> Critic:
    """A critic that starts where the policy stands, with a head of zeros: at first it expects nothing (1909.08593).

    What does not learn is shared: beside a policy with an adapter this is a second adapter on the same base, beside one
    that trains whole a second model. `joined` shares everything but the head.
    """
    with torch.device("meta"):
        critic = Critic(policy.architecture)
    critic.model = policy.model if joined else copy.deepcopy(policy.model, what_does_not_learn(policy))
    critic.fill = policy.fill
    embedding = policy.model.embed_tokens.weight
    device = "cpu" if embedding.is_meta else embedding.device
    critic.score.weight = nn.Parameter(torch.zeros(1, embedding.shape[1], device=device))
    return critic


def critic_as(model: RewardModel) -> Critic:
    """A critic that is a reward model and trains whole; an adapter is merged. `model` is used up."""
    if has_adapter(model):
        merge_adapter(model)
    with torch.device("meta"):
        critic = Critic(model.architecture)
    critic.model, critic.score, critic.statistics = model.model, model.score, model.statistics
    critic.fill = model.fill
    return critic.requires_grad_()
