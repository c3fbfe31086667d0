"""What an objective returns.

A step's loss is Σ_terms weight · (Σ over the step of sum) / (Σ over the step of count). Sums come from the forward
passes of the step's rows, counts from its data before the first of them, so the gradient does not depend on how the
samples are cut into rows, micro-batches or ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from litrecipe.model.row import Row, Sample

Output = TypeVar("Output", contravariant=True)
"""What the model makes of a row: `Predictions` of a language model, rewards (A,) of a reward model."""


@dataclass(frozen=True)
class Term:
    """One part of a loss on one row."""

    name: str
    """Names the count that divides the sum."""
    sum: Tensor
    """() with gradient; the sum over what the row holds."""
    weight: float = 1.0
    """Its weight in the step's loss."""


@dataclass(frozen=True)
class Loss:
    """What one row gives to the step."""

    terms: tuple[Term, ...]
    metrics: dict[str, tuple[Tensor, Tensor | float]] = field(default_factory=dict)
    """name → (sum, count); reported as the quotient over the step. Without gradient."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """name → () of which the largest over the step is reported; left out where there is nothing. Without gradient."""
    tallies: dict[str, Tensor] = field(default_factory=dict)
    """name → what adds up over the step, and which a `Tallying` objective makes metrics of. Without gradient."""


class Samples(Protocol):
    """A list of samples, which may lie on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class Objective(Protocol[Output]):
    """Turns what the model makes of a row into a loss."""

    def counts(self, row: Row) -> dict[str, float]:
        """By what each term's sum is divided; known from the row alone."""
        ...

    def __call__(self, output: Output, row: Row, /) -> Loss:
        """The row's terms and metrics."""
        ...


@runtime_checkable
class StepGlobal(Objective[Output], Protocol[Output]):
    """An objective whose terms depend on the whole step: on a sort over its pairs, or a mean over its samples.

    Rows made of `statistics_samples` are run once without gradient to gather `statistics`; what `from_step` makes of
    them reaches each row as extras.
    """

    def statistics_samples(self, samples: Samples) -> list[Sample]:
        """What is looked at before a step on `samples` (all ranks'); packed into rows as they are."""
        ...

    def statistics(self, output: Output, row: Row, /) -> dict[str, Tensor]:
        """name → (n, …) values of a row that is looked at; n may be 0."""
        ...

    def from_step(self, statistics: dict[str, Tensor], samples: int) -> dict[str, Tensor]:
        """name of an extra → a value (…) for each of the step's samples, from the statistics of all that was looked at.

        Both are in order of the rows, rank by rank.
        """
        ...


@runtime_checkable
class OfOwnRows(StepGlobal[Output], Protocol[Output]):
    """One that looks at nothing but the step's own samples. Where every rank has one row of them, the pass that learns
    from it tells the statistics as well."""

    own_rows: bool


@runtime_checkable
class Tallying(Objective[Output], Protocol[Output]):
    """One whose metrics are more than quotients of sums over rows."""

    def tell(self, tallies: Mapping[str, Tensor]) -> dict[str, float]:
        """name → value, of the step's `tallies`, over all rows and ranks."""
        ...


def step_loss(loss: Loss, counts: dict[str, float]) -> Tensor:
    """A row's share of the step's loss: Σ weight · sum / count."""
    return torch.stack([term.weight * term.sum / max(counts[term.name], 1e-12) for term in loss.terms]).sum()


def detached(loss: Loss) -> Loss:
    """The same numbers without the graph behind them."""
    terms = tuple(Term(term.name, term.sum.detach(), term.weight) for term in loss.terms)
    return Loss(terms, loss.metrics, loss.maxima, loss.tallies)


def metric_sums(losses: list[Loss]) -> dict[str, float]:
    """Every metric's sum and count over some rows, as `name:sum` and `name:count`."""
    parts = [
        {f"{name}:sum": float(total), f"{name}:count": float(count)}
        for loss in losses
        for name, (total, count) in loss.metrics.items()
    ]
    return add_up(parts)


def metric_maxima(losses: list[Loss]) -> dict[str, float]:
    """The largest over some rows of each of their `maxima`."""
    largest: dict[str, float] = {}
    for loss in losses:
        for name, value in loss.maxima.items():
            largest[name] = max(float(value), largest.get(name, -math.inf))
    return largest


def tally(losses: Sequence[Loss]) -> dict[str, Tensor]:
    """Every tally of some rows, at least one, added up."""
    return {name: torch.stack([loss.tallies[name] for loss in losses]).sum(0) for name in losses[0].tallies}


def quotients(totals: dict[str, float]) -> dict[str, float]:
    """name:sum / name:count for every name of which there was something to count.

    `rewards/margins` is also the difference of `rewards/chosen` and `rewards/rejected`: that of means over answers that
    are no pairs, as KTO's, is no sum over rows.
    """
    names = [key.removesuffix(":sum") for key in totals if key.endswith(":sum")]
    means = {name: totals[f"{name}:sum"] / totals[f"{name}:count"] for name in names if totals[f"{name}:count"]}
    if {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means.setdefault("rewards/margins", means["rewards/chosen"] - means["rewards/rejected"])
    return means


def add_up(parts: list[dict[str, float]]) -> dict[str, float]:
    """Key-wise sum."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total
