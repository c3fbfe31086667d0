"""DPO and its kin as an objective: pairs of a row in, terms and the field's metrics out.

Shapes: P predictions of a row, S segments of it, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from litrecipe.config.groups import Dpo
from litrecipe.model.head import Predictions
from litrecipe.model.row import Row
from litrecipe.objectives import preference
from litrecipe.objectives.answers import beyond_the_shorter, pairs_of, sum_by_segment, tokens_by_segment
from litrecipe.objectives.loss import Loss, Term

REFERENCE_FREE = ("simpo", "cpo", "orpo")
PER_TOKEN = ("simpo", "orpo")
PARTNERS = ("partner", "chosen_partner", "rejected_partner")
REF_LOGPS = "ref_logps"
"""Name of the extra that holds a sample's log-probabilities under the reference, one a prediction."""


@dataclass(frozen=True)
class Pairs:
    """What is known of N pairs; log-probabilities are sums over the tokens of an answer."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    """0 without a reference."""
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
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


class DPO:
    """Mean over the step's pairs of one loss, or of several with weights, plus the chosen answers' NLL if asked for.

    The NLL is the mean over the chosen tokens of the step, so a long answer does not outweigh the pairs (RPO,
    2404.19733; Llama 3, 2407.21783, section 4.1.4).
    """

    def __init__(self, config: Dpo) -> None:
        self.config = config
        self.losses = {name: _loss(name, config) for name in config.mix or [config.loss]}
        default = float(any(name in ("cpo", "orpo") for name in self.losses))
        self.nll_coef = default if config.nll_coef is None else config.nll_coef
        self.weights = dict(config.mix) or {config.loss: 1.0}
        self.needs_reference = any(name not in REFERENCE_FREE for name in self.losses)
        self.per_token = all(name in PER_TOKEN for name in self.losses)
        """Whether rewards are log-probabilities per token, as the losses see them."""

    def counts(self, row: Row) -> dict[str, float]:
        """Pairs for each loss, chosen tokens for the NLL."""
        pairs = pairs_of(row)
        counts = dict.fromkeys(self.losses, float(len(pairs)))
        if self.nll_coef:
            counts["nll"] = float(tokens_by_segment(row)[pairs[:, 0]].sum())
        return counts

    def __call__(self, predictions: Predictions, row: Row) -> Loss:
        """Terms; and `rewards/…` (β times the log-ratio), `logps/…` of the pairs."""
        pairs = self.pairs(predictions, row)
        terms = [Term(name, loss(pairs).sum(), self.weights[name]) for name, loss in self.losses.items()]
        if self.nll_coef:
            terms.append(Term("nll", -pairs.chosen.sum(), self.nll_coef))
        return Loss(tuple(terms), self._metrics(pairs))

    def pairs(self, predictions: Predictions, row: Row) -> Pairs:
        """Sums by answer. The reference's log-probabilities come with the predictions or lie in the row."""
        where = pairs_of(row)
        known = predictions.ref_logps if predictions.ref_logps is not None else row.extra.get(REF_LOGPS)
        if known is None:
            if self.needs_reference and len(where):
                raise ValueError("the loss needs a reference: neither predictions nor row hold its log-probabilities")
            known = torch.zeros_like(predictions.logps)
        policy, reference = (
            sum_by_segment(self._weighed(logps, row, where), row)[where] for logps in (predictions.logps, known)
        )
        tokens = tokens_by_segment(row)[where]
        return Pairs(
            chosen=policy[:, 0],
            rejected=policy[:, 1],
            ref_chosen=reference[:, 0],
            ref_rejected=reference[:, 1],
            chosen_tokens=tokens[:, 0],
            rejected_tokens=tokens[:, 1],
            partners={name: values for name, values in row.extra.items() if name in PARTNERS},
        )

    def _weighed(self, logps: Tensor, row: Row, where: Tensor) -> Tensor:
        """Log-probabilities (P,) of which those beyond the shorter answer count less (LD-DPO, 2409.06411)."""
        if self.config.ld_alpha == 1.0:
            return logps
        return torch.where(beyond_the_shorter(row, where), self.config.ld_alpha * logps, logps)

    def _metrics(self, pairs: Pairs) -> dict[str, tuple[Tensor, Tensor | float]]:
        count = float(len(pairs.chosen))
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
        return {name: (value.sum(), count) for name, value in values.items()}


def _loss(name: str, config: Dpo) -> Callable[[Pairs], Tensor]:
    """The loss of a name with its settings: Pairs → (N,)."""
    beta, smoothing = config.beta, config.label_smoothing
    through = partial(preference.through, divergence=config.divergence, alpha=config.divergence_alpha)

    def of_ratios(loss: Callable[..., Tensor], *settings: float) -> Callable[[Pairs], Tensor]:
        return lambda pairs: loss(*map(through, pairs.ratios), beta, *settings)

    def sigmoid_per_token(pairs: Pairs) -> Tensor:
        return preference.sigmoid(*pairs.ratios_per_token, beta, smoothing)

    def ipo(pairs: Pairs) -> Tensor:
        return preference.ipo(*(pairs.ratios_per_token if config.length_normalize else pairs.ratios), beta)

    def simpo(pairs: Pairs) -> Tensor:
        return preference.simpo(*pairs.ratios_per_token, beta, config.gamma, smoothing)

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
        return beta * preference.orpo(*pairs.ratios_per_token)

    return {
        "sigmoid": of_ratios(preference.sigmoid, smoothing),
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
    the gradient is its own, whatever row it is in.
    """

    def statistics(self, predictions: Predictions, row: Row) -> dict[str, Tensor]:
        """All that is sorted (n,): margins of policy and reference, log-ratios of chosen and rejected."""
        pairs = self.pairs(predictions, row)
        chosen, rejected = pairs.ratios
        margins = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
        return {"policy": margins[0], "reference": margins[1], "chosen": chosen, "rejected": rejected}

    def from_step(self, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each pair's partners (n,): the value of the other side that has the same place in its order."""
        return {
            "partner": partners(statistics["policy"], statistics["reference"]),
            "chosen_partner": partners(statistics["chosen"], statistics["rejected"]),
            "rejected_partner": partners(statistics["rejected"], statistics["chosen"]),
        }


def partners(values: Tensor, others: Tensor) -> Tensor:
    """For each of `values` (n,) the one of `others` (n,) that has the same place in ascending order."""
    return torch.empty_like(others).scatter_(0, values.argsort(stable=True), others.sort().values)


def make_dpo(config: Dpo) -> DPO:
    """The objective of a recipe's `dpo` group."""
    distributional = {"aot", "aot_unpaired"} & set(config.mix or [config.loss])
    return DistributionalDPO(config) if distributional else DPO(config)
