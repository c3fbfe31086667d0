"""Next-token prediction: the objective of pretraining and supervised fine-tuning.

Shapes: P predictions of a row.
"""

from __future__ import annotations

from litrecipe.model.head import Predictions
from litrecipe.model.row import Row
from litrecipe.objectives.loss import Loss, Term


class CausalLM:
    """Weighted mean of -log p(target) over all predicted tokens of the optimizer step.

    With weights w_i ∈ {0, 1} this is the token mean: every supervised token of the step counts the same, whichever
    sample, row or rank it stands in (a mean of per-row means would favour tokens of short rows).
    """

    def counts(self, row: Row) -> dict[str, float]:
        """Σ w_i of the row."""
        return {"nll": float(row.weight.sum())}

    def __call__(self, predictions: Predictions, row: Row) -> Loss:
        """-Σ w_i log p_i and the share of targets that were the likeliest token (`mean_token_accuracy`)."""
        nll = -(row.weight * predictions.logps).sum()
        right = (predictions.correct * row.weight).sum()
        return Loss((Term("nll", nll),), {"mean_token_accuracy": (right, row.weight.sum())})
