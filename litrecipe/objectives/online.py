"""Learning from what the policy sampled, as an objective: a row's completions in, terms and the field's metrics out.

Shapes: P predictions of a row, N of them that count, S segments, A completions (segments with predictions that count).

What a row brings beside its predictions, as extras (P,): `old_logps` under the policy that sampled, at the temperature
of the predictions; `advantages`; for a critic `returns` and `old_values`; `ref_logps` where the KL is a loss;
`importance`, by which the policy's loss of each token is multiplied, where another engine than the policy drew it;
`counted`, 1 for tokens that count and 0 for those of completions that are left out (all count where there is none);
and, where `ptx_coef` asks for it, `ptx`, 1 for tokens of plain text learnt along, which count there only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from litrecipe.config.online import Grpo, Ppo
from litrecipe.model.actor_critic import ActorCriticOutput
from litrecipe.model.head import Predictions
from litrecipe.model.row import Row
from litrecipe.objectives.advantages import kl_estimate
from litrecipe.objectives.answers import reference_logps
from litrecipe.objectives.loss import Loss, Term
from litrecipe.objectives.policy_gradient import (
    beyond_clip,
    cispo,
    clipped,
    held_values,
    log_ratios,
    mirror,
    value_loss,
)

OLD_LOGPS = "old_logps"
ADVANTAGES = "advantages"
RETURNS = "returns"
OLD_VALUES = "old_values"
COUNTED = "counted"
IMPORTANCE = "importance"
PTX = "ptx"

Metrics = dict[str, tuple[Tensor, Tensor | float]]


@dataclass(frozen=True)
class Counted:
    """Which of a row's tokens count, and how much each."""

    places: Tensor
    """(P,) bool."""
    lengths: Tensor
    """(A,) tokens that count of each completion that has any."""
    shares: Tensor
    """(N,) fp32, by what each token's loss is multiplied before the sum."""
    count: float
    """By what the sum over the step is divided, this row's part."""


class PolicyGradient:
    """Mean over what the step's completions did of a policy's loss; beside it, if asked for, KL, entropy, plain text.

    `aggregate` says which mean: over the step's tokens; over its completions of the mean over their tokens; or the sum
    over tokens divided by completions times `max_new_tokens` (Dr. GRPO, 2503.20783). Only completions that count do.
    """

    def __init__(self, config: Grpo | Ppo, max_new_tokens: int | None = None) -> None:
        self.config = config
        self.loss = config.loss if isinstance(config, Grpo) else "clip"
        self.ratio = config.ratio if isinstance(config, Grpo) else "token"
        self.max_new_tokens = config.max_new_tokens if max_new_tokens is None else max_new_tokens
        self.kl_coef = config.kl_coef if config.kl_in == "loss" else 0.0
        """Weight of the KL as a loss; who steers it sets it before a step."""
        self.has_kl = bool(self.kl_coef)
        self.needs_reference = self.has_kl
        """Whether rows or predictions must bring `ref_logps`."""
        self.needs_entropy = bool(config.entropy_coef)
        """Whether the predictions' entropy must be one that is learnt; one that is measured is told, no more."""

    def counts(self, row: Row) -> dict[str, float]:
        """Tokens or completions for each term, see `aggregate`; weighed tokens of plain text."""
        names = ["policy"] + ["kl"] * self.has_kl + ["entropy"] * self.needs_entropy
        counts = dict.fromkeys(names, self.counted(row).count)
        if self.config.ptx_coef:
            counts["ptx"] = float((row.weight * extra_of(row, PTX)).sum())
        return counts

    def counted(self, row: Row) -> Counted:
        """The tokens of completions that count, known before anything is predicted."""
        places = torch.ones_like(row.target, dtype=torch.bool)
        if COUNTED in row.extra:
            places = row.extra[COUNTED] > 0.5
        if self.config.ptx_coef:
            places = places & (extra_of(row, PTX) < 0.5)
        lengths = torch.bincount(row.segment[places], minlength=len(row.spans))
        lengths = lengths[lengths > 0]
        shares, count = torch.ones(int(lengths.sum()), device=lengths.device), float(lengths.sum())
        if self.config.aggregate == "sequence":
            shares, count = (1 / lengths).repeat_interleave(lengths), float(len(lengths))
        elif self.config.aggregate == "constant":
            count = float(len(lengths) * self.max_new_tokens)
        return Counted(places, lengths, shares, count)

    def __call__(self, predictions: Predictions, row: Row) -> Loss:
        """The terms; `policy/…`, means over tokens that count: `ratio` of new to old policy, as the loss sees it, its
        largest `ratio_max`, `approxkl` (k2: half the square of a token's log-ratio), `clipfrac_low` and `…_high`, where
        clipping stops the policy, and `entropy` in nats."""
        counted = self.counted(row)
        logps, old = predictions.logps[counted.places], extra_of(row, OLD_LOGPS)[counted.places]
        advantages = extra_of(row, ADVANTAGES)[counted.places]
        log_ratio = log_ratios(logps, old, counted.lengths, self.ratio)
        losses = self._losses(logps, log_ratio, advantages)
        if IMPORTANCE in row.extra:
            losses = losses * row.extra[IMPORTANCE][counted.places]
        terms = [Term("policy", (losses * counted.shares).sum())]
        if self.has_kl:
            reference = reference_logps(predictions, row)[counted.places]
            kl = kl_estimate(logps, reference, self.config.kl_estimator)
            terms.append(Term("kl", (kl * counted.shares).sum(), self.kl_coef))
        if self.needs_entropy:
            entropy = self._learnt_entropy(predictions)[counted.places]
            terms.append(Term("entropy", (entropy * counted.shares).sum(), -self.config.entropy_coef))
        if self.config.ptx_coef:
            nll = -(row.weight * extra_of(row, PTX) * predictions.logps).sum()
            terms.append(Term("ptx", nll, self.config.ptx_coef))
        ratio = log_ratio.detach().exp()
        told = {"ratio": ratio, "approxkl": kl_estimate(logps.detach(), old, "k2")}
        told |= self._clipping(log_ratio, advantages)
        if predictions.entropy is not None:
            told["entropy"] = predictions.entropy.detach()[counted.places]
        metrics = means({f"policy/{name}": values for name, values in told.items()})
        return Loss(tuple(terms), metrics, {"policy/ratio_max": ratio.max()} if len(ratio) else {})

    def _losses(self, logps: Tensor, log_ratio: Tensor, advantages: Tensor) -> Tensor:
        """(N,) of the tokens that count."""
        config = self.config
        if self.loss == "cispo":
            return cispo(logps, log_ratio, advantages, self._high)
        if self.loss == "mirror":
            assert isinstance(config, Grpo)
            return mirror(log_ratio, advantages, config.mirror_coef)
        return clipped(log_ratio, advantages, config.clip, self._high, config.dual_clip)

    def _clipping(self, log_ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
        """Where (N,) there is any; `mirror` has none, `cispo` none below."""
        low, high = beyond_clip(log_ratio, advantages, self.config.clip, self._high)
        below, above = {"clipfrac_low": low}, {"clipfrac_high": high}
        return {"clip": below | above, "cispo": above, "mirror": {}}[self.loss]

    @property
    def _high(self) -> float:
        return self.config.clip if self.config.clip_high is None else self.config.clip_high

    @staticmethod
    def _learnt_entropy(predictions: Predictions) -> Tensor:
        entropy = predictions.entropy
        if entropy is None or (predictions.logps.requires_grad and not entropy.requires_grad):
            raise ValueError("the bonus needs an entropy with gradient, which the predictions do not hold")
        return entropy


class ActorCritic:
    """A policy's loss with that of the critic beside it, which learns the returns of the same tokens."""

    def __init__(self, config: Ppo, max_new_tokens: int | None = None) -> None:
        self.config = config
        self.actor = PolicyGradient(config, max_new_tokens)
        self.learns_policy = True
        """Off while the critic warms up: then no term hangs on the predictions, and the policy's gradients are None
        (zeros would still move it, by what the optimizer remembers and by weight decay)."""

    def counts(self, row: Row) -> dict[str, float]:
        """As the policy's; the value's are those of the policy."""
        counts = self.actor.counts(row)
        return {**(counts if self.learns_policy else {}), "value": counts["policy"]}

    def __call__(self, output: ActorCriticOutput, row: Row) -> Loss:
        """The terms; `policy/…`; and `value/…`, means over tokens that count: `mean`, `error` (V - R)², and `clipfrac`,
        where clipping stops the critic."""
        policy = self.actor(output.predictions, row)
        counted = self.actor.counted(row)
        values = output.values[counted.places]
        returns, old = (extra_of(row, name)[counted.places] for name in (RETURNS, OLD_VALUES))
        losses = value_loss(values, old, returns, self.config.value_clip)
        value = Term("value", (losses * counted.shares).sum(), self.config.value_coef)
        errors = (values.detach() - returns).square()
        told = {"mean": values.detach(), "error": errors}
        if self.config.value_clip is not None:
            held = held_values(values.detach(), old, self.config.value_clip)
            told["clipfrac"] = (held - returns).square() > errors
        metrics = policy.metrics | means({f"value/{name}": x for name, x in told.items()})
        return Loss((*policy.terms, value) if self.learns_policy else (value,), metrics, policy.maxima)


def extra_of(row: Row, name: str) -> Tensor:
    """An extra (P,) of a row; an empty row has none of its own. Raises ValueError where it is missing."""
    if name in row.extra:
        return row.extra[name]
    if len(row.target):
        raise ValueError(f"the loss needs {name}, which the row does not hold")
    return row.weight.new_zeros(0)


def means(values: dict[str, Tensor]) -> Metrics:
    """Sums and counts of values (N,) by name."""
    return {name: (x.float().sum() if x.dtype == torch.bool else x.sum(), float(len(x))) for name, x in values.items()}
