"""Next-token prediction: the objective of pretraining and supervised fine-tuning.

Shapes: P predictions of a row.
"""

from __future__ import annotations

from torch import Tensor

from litrecipe.model.head import Predictions
from litrecipe.model.row import Row
from litrecipe.objectives.loss import Loss, Term


class CausalLM:
    """Weighted mean of -log p(target) over all predicted tokens of the optimizer step.

    With weights w_i ∈ {0, 1} this is the token mean: every supervised token of the step counts the same, whichever
    sample, row or rank it stands in (a mean of per-row means would favour tokens of short rows).

    `z_loss` times the same mean of (log Z)², Z the sum that the softmax divides by, keeps logits from drifting
    (PaLM, 2204.02311, section 5: 1e-4); predictions must bring `log_z` then.
    """

    def __init__(self, z_loss: float = 0.0) -> None:
        self.z_loss = z_loss
        self.needs_log_z = z_loss > 0
        """Whether the predictions must bring `log_z`."""

    def counts(self, row: Row) -> dict[str, float]:
        """Σ w_i of the row for each term."""
        return dict.fromkeys(["nll"] + ["z_loss"] * self.needs_log_z, float(row.weight.sum()))

    def __call__(self, predictions: Predictions, row: Row) -> Loss:
        """-Σ w_i log p_i and Σ w_i (log Z_i)²; the share of targets that were the likeliest token
        (`mean_token_accuracy`), and with a z-loss `nll`, `z_loss` (not yet times its weight) and the mean `log_z`.

        Raises ValueError where there is a z-loss and the predictions hold no `log_z`.
        """
        nll = -(row.weight * predictions.logps).sum()
        right, count = (predictions.correct * row.weight).sum(), row.weight.sum()
        terms = [Term("nll", nll)]
        metrics: dict[str, tuple[Tensor, Tensor | float]] = {"mean_token_accuracy": (right, count)}
        if self.needs_log_z:
            if predictions.log_z is None:
                raise ValueError("the z-loss needs log_z, which the predictions do not hold")
            squares = (row.weight * predictions.log_z.square()).sum()
            terms.append(Term("z_loss", squares, self.z_loss))
            metrics |= {
                "nll": (nll.detach(), count),
                "z_loss": (squares.detach(), count),
                "log_z": ((row.weight * predictions.log_z.detach()).sum(), count),
            }
        return Loss(tuple(terms), metrics)
