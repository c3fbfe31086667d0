"""What the routers of a mixture of experts are held to while the model learns something else.

Shapes: L layers with a router, E experts, T tokens of a row, n samples of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Router
from litrecipe.model.decoder import Decoder
from litrecipe.model.experts import Mixture
from litrecipe.model.head import Predictions
from litrecipe.model.row import Row, Sample, Segment
from litrecipe.objectives.balance import RouterSums, load_balancing, router_sums, router_z
from litrecipe.objectives.loss import Loss, Objective, Samples, StepGlobal, Tallying, Term

BALANCE, Z = "router_balance", "router_z"
PREFIX = "router/"
"""Of the tallies."""
CHOSEN = "router_chosen"
"""Name of the extra that holds for what share of the step's tokens each expert was chosen (n, L, E), the same for all
samples."""


def with_routers(objective: Objective[Predictions], model: Decoder, router: Router) -> Objective[Predictions]:
    """The objective with what the recipe holds the model's routers to, which the model then tells of; the objective as
    it is where there are none.

    Routers that do not learn are left alone unless the recipe gives a coefficient. Raises InputError where it gives one
    to a model without routers.
    """
    experts = model.architecture.experts
    if experts is None:
        asked = {"aux_loss_coef": router.aux_loss_coef, "z_loss_coef": router.z_loss_coef}
        if mistakes := [
            f"router.{key}: {value}: the model has no experts: leave it out" for key, value in asked.items() if value
        ]:
            raise InputError(*mistakes)
        return objective
    if isinstance(objective, StepGlobal):
        raise ValueError(f"{type(objective).__name__}: looks at the step itself: routers' losses do not go with it")
    model.with_routing = True
    coef = router.aux_loss_coef
    if coef is None:
        learn = any(part.gate.weight.requires_grad for part in model.modules() if isinstance(part, Mixture))
        coef = experts.balance_coef if learn else 0.0
    kind = Balanced if coef else Routed
    return kind(objective, experts.chosen, coef, router.z_loss_coef, pooled=router.balance == "hf")


class Routed:
    """An objective, the routers' z-loss, and how busy experts are.

    Every token of a row counts once, whether it is a target or not, as with transformers.
    """

    def __init__(
        self, objective: Objective[Predictions], chosen: int, balance_coef: float, z_coef: float, *, pooled: bool
    ) -> None:
        """`chosen` experts work on each token; `pooled` takes all layers' shares together."""
        self.objective = objective
        self.chosen = chosen
        self.balance_coef, self.z_coef = balance_coef, z_coef
        self.pooled = pooled

    def counts(self, row: Row) -> dict[str, float]:
        """Tokens, beside what the objective counts."""
        tokens = float(len(row.tokens)) if row.sample_ids else 0.0
        return {**self.objective.counts(row), BALANCE: tokens, Z: tokens}

    def __call__(self, predictions: Predictions, row: Row) -> Loss:
        """The objective's terms, each of which is told alone too (`nll`), and the routers'."""
        loss, sums = self.objective(predictions, row), self.sums(predictions, row)
        terms, counts = [*loss.terms, *self.terms(sums, row)], self.objective.counts(row)
        alone = {term.name: (term.sum.detach(), counts[term.name]) for term in loss.terms}
        tallies = {f"{PREFIX}{field.name}": getattr(sums, field.name).detach() for field in fields(sums)}
        metrics, tallies = {**alone, **loss.metrics}, {**loss.tallies, **tallies}
        return replace(loss, terms=tuple(terms), metrics=metrics, tallies=tallies)

    def terms(self, sums: RouterSums, row: Row) -> list[Term]:
        """Those of the routers; a step's mean over its tokens is a row's sum here."""
        return [Term(Z, sums.squared_logsumexp.mean(), self.z_coef)] if self.z_coef else []

    def sums(self, predictions: Predictions, row: Row) -> RouterSums:
        """Those of the row's tokens; the one of an empty row does not count."""
        logits = predictions.router_logits
        if logits is None:
            raise ValueError("predictions: no router_logits: set the model's with_routing")
        mask = None if row.sample_ids else row.tokens.new_zeros(len(row.tokens))
        return router_sums(logits, self.chosen, mask)

    def tell(self, tallies: Mapping[str, Tensor]) -> dict[str, float]:
        """Of a whole step: `router/balance` and `router/z`, the losses before their weights; `router/load_entropy`, the
        entropy of how its tokens spread over experts, as a share of the highest, mean over layers (1: all are as busy);
        `router/largest_share`, that of the tokens on which one expert works, the highest of all layers."""
        step = RouterSums(**{field.name: tallies[f"{PREFIX}{field.name}"] for field in fields(RouterSums)})
        load = step.chosen / step.chosen.sum(1, keepdim=True)
        entropy = torch.special.entr(load).sum(1) / math.log(load.shape[1])
        told = self.objective.tell(tallies) if isinstance(self.objective, Tallying) else {}
        return told | {
            "router/balance": float(load_balancing(step, step, self.pooled)),
            "router/z": float(router_z(step, step)),
            "router/load_entropy": float(entropy.mean()),
            "router/largest_share": float((step.chosen / step.tokens).max()),
        }


class Balanced(Routed):
    """`Routed`, and the balance loss: it is no sum over rows until it is known how often the whole step chose each
    expert."""

    own_rows = True

    def terms(self, sums: RouterSums, row: Row) -> list[Term]:
        """Those of the routers."""
        return [Term(BALANCE, self._balance(sums, row), self.balance_coef), *super().terms(sums, row)]

    def _balance(self, sums: RouterSums, row: Row) -> Tensor:
        """The row's share of the loss, times the step's tokens."""
        one = sums.tokens.new_ones(())
        chosen = row.extra[CHOSEN][0] if row.sample_ids else sums.chosen
        return load_balancing(sums, replace(sums, tokens=one, chosen=chosen), self.pooled)

    def statistics_samples(self, samples: Samples) -> list[Sample]:
        """The step's own without targets: so the pass over them spares the head and the last layer's experts."""
        return [_without_targets(samples[index]) for index in range(len(samples))]

    def statistics(self, predictions: Predictions, row: Row) -> dict[str, Tensor]:
        """How often each expert was chosen (1, L, E), of how many tokens (1,)."""
        sums = self.sums(predictions, row)
        return {"chosen": sums.chosen[None], "tokens": sums.tokens[None]}

    def from_step(self, statistics: dict[str, Tensor], samples: int) -> dict[str, Tensor]:
        """For what share of the tokens each was (n, L, E)."""
        share = statistics["chosen"].sum(0) / statistics["tokens"].sum()
        return {CHOSEN: share.expand(samples, *share.shape)}


def _without_targets(sample: Sample) -> Sample:
    segments = (Segment(one.tokens, np.zeros(len(one.tokens), np.float32), one.parent) for one in sample.segments)
    return Sample(sample.id, tuple(segments))
