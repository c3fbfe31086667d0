"""What an objective returns.

A step's loss is Σ_terms weight · (Σ over the step of sum) / (Σ over the step of count). Sums come from the forward
passes of the step's rows, counts from its data before the first of them, so the gradient does not depend on how the
samples are cut into rows, micro-batches or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from litrecipe.model.head import Predictions
from litrecipe.model.row import Row


@dataclass(frozen=True)
class Term:
    """One part of a loss on one row."""

    name: str
    """Names the count that divides the sum, and the metric (`loss/<name>` where there are several)."""
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


class Objective(Protocol):
    """Turns a row's predictions into a loss."""

    def counts(self, row: Row) -> dict[str, float]:
        """By what each term's sum is divided; known from the row alone."""
        ...

    def __call__(self, predictions: Predictions, row: Row) -> Loss:
        """The row's terms and metrics."""
        ...
