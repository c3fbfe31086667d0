"""The groups of keys of methods that sample, choose among the samples, and learn from what was chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from litrecipe.config.groups import Dpo, TrainingRecipe
from litrecipe.config.online import LoraAdapter, Online, OnlineRecipe, Rewards, Sampling


@dataclass
class IterativeDpo(Sampling):
    """Rounds of preference learning: sample, pair the best completion with the worst, learn the pairs, go on."""

    completions_per_prompt: int = 4
    """Completions of each prompt."""
    prompts_per_round: int = 64
    """Prompts that are answered in a round, by the policy as it stands."""
    minibatches: int = 8
    """Optimizer steps in which the pairs of a round are gone through once."""
    epochs: int = 1
    """How often they are gone through."""
    online: bool = False
    """A round is one step: each samples anew (OAIF, 2402.04792)."""
    reference: Literal["auto", "latest", "start"] = "auto"
    """What the policy is held to: itself at the start of the round (`latest`) or of the run (`start`). `auto` is
    `latest`, and `start` when `online`."""
    judge: str | None = None
    """`function:MODULE:NAME`, which compares completions two by two, instead of `rewards.sources`: the score of one is
    how often it beats the others of its prompt."""
    margin: float = 0.0
    """By how much the better completion's score must exceed the worse one's; equal scores make no pair."""
    gold_margin: float | None = None
    """The same where the better one is `gold` (DNO asks for more there; null: as `margin`)."""
    max_repetition: float | None = None
    """Share of three-word runs that were said before, from 0 to 1, above which a completion is never chosen, and
    rejected before all others (DNO; try 0.3; null: only scores count)."""
    soft_labels: bool = False
    """Learn with which probability the better one is better, σ of the difference of scores, not that it is (DNO's
    regression)."""
    min_chosen: float | None = None
    """Score that the better one must reach (DNO, 2404.03715; null: any)."""
    gold: str | None = None
    """Column that holds a good answer: it is scored and chosen or rejected like a sampled one (null: none)."""
    history: float = 0.0
    """Share of the pairs of the round before that are learnt again; half that share of the one before it, and so on
    (DNO; try 0.3)."""

    @property
    def holds_to_start(self) -> bool:
        """What `reference` comes to."""
        return self.reference == "start" or (self.reference == "auto" and self.online)

    @property
    def candidates(self) -> int:
        """Completions of each prompt among which is chosen."""
        return self.completions_per_prompt + (self.gold is not None)

    def as_rollouts(self) -> Online:
        """A round as a rollout, whose completions are the candidates."""
        shared = {name: getattr(self, name) for name in Sampling.__dataclass_fields__}
        return Online(
            **shared | {"completions_per_prompt": self.candidates},
            rollout_batch_size=self.prompts_per_round * self.candidates,
            minibatches=1 if self.online else self.minibatches,
            epochs=self.epochs,
            kl_coef=0.0,
        )


@dataclass
class IterativeDpoRecipe(OnlineRecipe):
    """Rounds of preference learning on the policy's own completions: full, LoRA or DoRA."""

    out_dir: str = "runs/iterative-dpo"
    iterative_dpo: IterativeDpo = field(default_factory=IterativeDpo)
    dpo: Dpo = field(default_factory=Dpo)


@dataclass
class RejectionSampling(Sampling):
    """Sample several completions of each prompt, and fine-tune on the best."""

    completions_per_prompt: int = 10
    """Completions of each prompt (Llama 3: 10 to 30)."""
    prompts_per_batch: int = 16
    """Prompts that are answered together; what is interrupted goes on after the last whole batch."""
    keep: int = 1
    """How many of the best completions of a prompt are learnt."""
    min_score: float | None = None
    """Leave out completions that score less, and so prompts whose best does (null: none)."""
    truncated: Literal["drop", "learn"] = "drop"
    """`drop` learns no completion that was cut, which would teach to break off."""
    only_sample: bool = False
    """Stop when the completions are chosen; the same command without it goes on."""


@dataclass
class RejectionSamplingRecipe(TrainingRecipe):
    """Fine-tuning on the best of the model's own completions: full, LoRA or DoRA."""

    adapter: LoraAdapter = field(default_factory=LoraAdapter)
    rewards: Rewards = field(default_factory=Rewards)
    out_dir: str = "runs/rejection-sampling"
    rejection_sampling: RejectionSampling = field(default_factory=RejectionSampling)
