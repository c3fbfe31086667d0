"""DPO and its kin as an objective: pairs of a row in, terms and the field's metrics out.

Shapes: P predictions of a row, S segments of it, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from litrecipe.config.groups import REFERENCE_FREE, SORTING, Dpo
from litrecipe.model.head import Predictions
from litrecipe.model.row import Row, Sample
from litrecipe.objectives import preference
from litrecipe.objectives.answers import REF_LOGPS as REF_LOGPS
from litrecipe.objectives.answers import (
    answers_of,
    pairs_of,
    reference_logps,
    siblings_of,
    sum_by_pair,
    sum_by_segment,
    tokens_by_segment,
    without_targets,
)
from litrecipe.objectives.kto import KTO
from litrecipe.objectives.loss import Loss, Samples, Term

PER_TOKEN = ("simpo", "orpo")
PARTNERS = ("partner", "chosen_partner", "rejected_partner")
DOUBT = "doubt"
"""Extra of a sample, a number a pair: how likely its worse answer is to be the better one."""


@dataclass(frozen=True)
class Pairs:
    """What is known of N pairs; log-probabilities are sums over those tokens of an answer that are compared."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    """0 without a reference."""
    ref_rejected: Tensor
    chosen_tokens: Tensor
    """At least 1, so that the mean over no tokens is 0."""
    rejected_tokens: Tensor
    siblings: Tensor
    """How many pairs each one's sample has: they share its weight."""
    weights: Tensor | None
    """By what the losses are multiplied (WPO); without gradient."""
    doubts: Tensor | None
    """How likely the rejected is to be the better one, where that is known; `sigmoid` and `sigmoid_norm` learn it."""
    partners: dict[str, Tensor]
    """`aot`, `aot_unpaired`: what each pair's margin and log-ratios are held against."""

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        """log π - log π_ref of chosen and rejected."""
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def ratios_per_token(self) -> tuple[Tensor, Tensor]:
        """The same, divided by the answers' tokens."""
        a, b = self.ratios
        return a / self.chosen_tokens, b / self.rejected_tokens

    @property
    def logps_per_token(self) -> tuple[Tensor, Tensor]:
        """log π of chosen and rejected, divided by the answers' tokens."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


class DPO:
    """Mean over the step's samples of one loss, or of several with weights, plus the chosen answers' NLL if asked for.

    A sample of more than two answers gives all its pairs, which share its weight. The NLL is that of each sample's best
    answer, the mean over the tokens of these in the step, so a long one does not outweigh the pairs (RPO, 2404.19733;
    Llama 3, 2407.21783, section 4.1.4). Targets out of `format_ids` are in the NLL only: end of turn and headers, which
    chosen and rejected share, would be pulled both ways (Llama 3, there).
    """

    def __init__(self, config: Dpo, format_ids: Collection[int] = ()) -> None:
        self.config = config
        self.format_ids = format_ids
        self.losses = {name: _loss(name, config) for name in config.mix or [config.loss]}
        default = float(any(name in ("cpo", "orpo") for name in self.losses))
        self.nll_coef = default if config.nll_coef is None else config.nll_coef
        self.weights = dict(config.mix) or {config.loss: 1.0}
        self.needs_reference = any(name not in REFERENCE_FREE for name in self.losses)
        self.needs_collisions = config.weighting
        """Whether the predictions must bring `log_collisions`."""
        self.per_token = all(name in PER_TOKEN for name in self.losses)
        """Whether rewards are log-probabilities per token, as the losses see them."""

    def counts(self, row: Row) -> dict[str, float]:
        """Samples for each loss, tokens of the best answers for the NLL."""
        counts = dict.fromkeys(self.losses, float(len(row.sample_ids)))
        if self.nll_coef:
            counts["nll"] = float(tokens_by_segment(row)[_best(row)].sum())
        return counts

    def __call__(self, predictions: Predictions, row: Row) -> Loss:
        """Terms; and `rewards/…` (β times the log-ratio), `logps/…` of the pairs, as the losses see them."""
        pairs = self.pairs(predictions, row)
        terms = [Term(name, self._sum(loss(pairs), pairs), self.weights[name]) for name, loss in self.losses.items()]
        if self.nll_coef:
            terms.append(Term("nll", -sum_by_segment(predictions.logps, row)[_best(row)].sum(), self.nll_coef))
        return Loss(tuple(terms), self._metrics(pairs, len(row.sample_ids)))

    def pairs(self, predictions: Predictions, row: Row) -> Pairs:
        """Sums by answer. The reference's log-probabilities come with the predictions or lie in the row."""
        where = pairs_of(row)
        policy, collisions = predictions.logps, predictions.log_collisions
        reference = reference_logps(predictions, row) if self.needs_reference else torch.zeros_like(policy)
        if self.format_ids:
            row, left = without_targets(row, self.format_ids)
            policy, reference = policy[left], reference[left]
            collisions = None if collisions is None else collisions[left]
        alpha = self.config.ld_alpha
        chosen, rejected = sum_by_pair(policy, row, where, alpha).unbind(1)
        ref_chosen, ref_rejected = sum_by_pair(reference, row, where, alpha).unbind(1)
        tokens = tokens_by_segment(row)[where].clamp(min=1)
        weights = None
        if self.needs_collisions:
            if collisions is None:
                raise ValueError("the weights of pairs need log_collisions, which the predictions do not hold")
            weights = preference.wpo_weight(sum_by_pair(policy - collisions, row, where) / tokens)
        return Pairs(
            chosen=chosen,
            rejected=rejected,
            ref_chosen=ref_chosen,
            ref_rejected=ref_rejected,
            chosen_tokens=tokens[:, 0],
            rejected_tokens=tokens[:, 1],
            siblings=siblings_of(row, where),
            weights=weights,
            doubts=row.extra.get(DOUBT),
            partners={name: values for name, values in row.extra.items() if name in PARTNERS},
        )

    @staticmethod
    def _sum(losses: Tensor, pairs: Pairs) -> Tensor:
        weighed = losses if pairs.weights is None else losses * pairs.weights
        return (weighed / pairs.siblings).sum()

    def _metrics(self, pairs: Pairs, samples: int) -> dict[str, tuple[Tensor, Tensor | float]]:
        ratios = pairs.ratios_per_token if self.per_token else pairs.ratios
        chosen, rejected = (self.config.beta * ratio.detach() for ratio in ratios)
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "rewards/margins": chosen - rejected,
            "logps/chosen": pairs.chosen.detach(),
            "logps/rejected": pairs.rejected.detach(),
        }
        return {name: ((value / pairs.siblings).sum(), float(samples)) for name, value in values.items()}


def _best(row: Row) -> Tensor:
    """Segment (n,) of the best answer of each of n samples."""
    return torch.tensor([answers[0] for answers in answers_of(row)], dtype=torch.int64, device=row.segment.device)


def _loss(name: str, config: Dpo) -> Callable[[Pairs], Tensor]:
    """The loss of a name with its settings: Pairs → (N,)."""
    beta, smoothing = config.beta, config.label_smoothing
    through = partial(preference.through, divergence=config.divergence, alpha=config.divergence_alpha)

    def of_ratios(loss: Callable[..., Tensor], *settings: float) -> Callable[[Pairs], Tensor]:
        return lambda pairs: loss(*map(through, pairs.ratios), beta, *settings)

    def sigmoid(pairs: Pairs) -> Tensor:
        a, b = map(through, pairs.ratios)
        return preference.sigmoid(a, b, beta, smoothing if pairs.doubts is None else pairs.doubts)

    def sigmoid_per_token(pairs: Pairs) -> Tensor:
        doubts = smoothing if pairs.doubts is None else pairs.doubts
        return preference.sigmoid(*pairs.ratios_per_token, beta, doubts)

    def ipo(pairs: Pairs) -> Tensor:
        return preference.ipo(*(pairs.ratios_per_token if config.length_normalize else pairs.ratios), beta)

    def simpo(pairs: Pairs) -> Tensor:
        return preference.simpo(*pairs.logps_per_token, beta, config.gamma, smoothing)

    def cpo(pairs: Pairs) -> Tensor:
        return preference.sigmoid(pairs.chosen, pairs.rejected, beta, smoothing)

    def aot(pairs: Pairs) -> Tensor:
        return preference.nls(beta * (pairs.chosen - pairs.rejected - pairs.partners["partner"]), smoothing)

    def aot_unpaired(pairs: Pairs) -> Tensor:
        a, b = pairs.ratios
        # Every term stands once for its chosen and once for its rejected answer: both learn, one is counted.
        of_rejected = preference.nls(beta * (pairs.partners["rejected_partner"] - b), smoothing)
        of_chosen = preference.nls(beta * (a - pairs.partners["chosen_partner"]), smoothing)
        return of_chosen + of_rejected - of_rejected.detach()

    def orpo(pairs: Pairs) -> Tensor:
        return beta * preference.orpo(*pairs.logps_per_token)

    return {
        "sigmoid": sigmoid,
        "cdpo": of_ratios(preference.sigmoid, smoothing),
        "robust": of_ratios(preference.robust, smoothing),
        "hinge": of_ratios(preference.hinge),
        "ipo": ipo,
        "exo": of_ratios(preference.exo, smoothing),
        "nca": of_ratios(preference.nca),
        "sppo": of_ratios(preference.sppo),
        "bco": of_ratios(preference.bco),
        "aot": aot,
        "aot_unpaired": aot_unpaired,
        "apo_zero": of_ratios(preference.apo_zero),
        "apo_down": of_ratios(preference.apo_down),
        "discopop": of_ratios(preference.discopop),
        "sigmoid_norm": sigmoid_per_token,
        "simpo": simpo,
        "cpo": cpo,
        "orpo": orpo,
    }[name]


class DistributionalDPO(DPO):
    """With `aot` or `aot_unpaired` (2406.05882), which hold sorted values of the whole step against each other.

    The statistics of the step tell each pair whom it is held against, its partners; then its share of the loss and of
    the gradient is its own, whatever row it is in. Quantiles count pairs alike, so a sample must have just one.
    """

    def statistics_samples(self, samples: Samples) -> list[Sample]:
        """The step's own."""
        return [samples[index] for index in range(len(samples))]

    def pairs(self, predictions: Predictions, row: Row) -> Pairs:
        """Raises ValueError where a sample has several pairs."""
        for name, answers in zip(row.sample_ids, answers_of(row), strict=True):
            if len(answers) > 2:
                raise ValueError(f"sample {name}: {len(answers)} answers, {' and '.join(self.losses)} takes two")
        return super().pairs(predictions, row)

    def statistics(self, predictions: Predictions, row: Row) -> dict[str, Tensor]:
        """All that is sorted (n,): margins of policy and reference, log-ratios of chosen and rejected."""
        pairs = self.pairs(predictions, row)
        chosen, rejected = pairs.ratios
        margins = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
        return {"policy": margins[0], "reference": margins[1], "chosen": chosen, "rejected": rejected}

    def from_step(self, statistics: dict[str, Tensor], samples: int) -> dict[str, Tensor]:
        """Each pair's partners (n,): the value of the other side that has the same place in its order."""
        return {
            "partner": partners(statistics["policy"], statistics["reference"]),
            "chosen_partner": partners(statistics["chosen"], statistics["rejected"]),
            "rejected_partner": partners(statistics["rejected"], statistics["chosen"]),
        }


def partners(values: Tensor, others: Tensor) -> Tensor:
    """For each of `values` (n,) the one of `others` (n,) that has the same place in ascending order."""
    return torch.empty_like(others).scatter_(0, values.argsort(stable=True), others.sort().values)


def make_dpo(config: Dpo, format_ids: Collection[int] = ()) -> DPO | KTO:
    """The objective of a recipe's `dpo` group; `format_ids` are the tokens that `mask_format_tokens` is about."""
    losses = set(config.mix or [config.loss])
    if losses == {"kto"}:
        return KTO(config)
    if "kto" in losses:
        raise ValueError("dpo.mix: kto takes rated answers, the others pairs: it cannot be one of several")
    kind = DistributionalDPO if SORTING & losses else DPO
    return kind(config, format_ids if config.mask_format_tokens else ())
