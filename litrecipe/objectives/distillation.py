"""Learning from a teacher besides the tokens of the data.

Shapes: P predictions of a row.
"""

from __future__ import annotations

from dataclasses import replace

from litrecipe.model.head import Predictions
from litrecipe.model.row import Row
from litrecipe.objectives.causal_lm import CausalLM
from litrecipe.objectives.loss import Loss, Term


class Distillation(CausalLM):
    """α · mean of -log p(target) + (1 - α) τ² · mean of -Σ_v q_v log p_v, over all predicted tokens of the step.

    q is the teacher's distribution and p, in the second mean only, the student's, both at the temperature τ; the
    gradients of the second shrink with 1 / τ², which τ² makes good (Hinton et al., 1503.02531, section 2). Gemma 2
    (2408.00118) takes α = 0 and τ = 1, AFM (2407.21075) α = 0.1 and all of q on the teacher's likeliest token.
    """

    def __init__(self, alpha: float, temperature: float = 1.0, z_loss: float = 0.0) -> None:
        super().__init__(z_loss)
        self.alpha, self.temperature = alpha, temperature
        self.taught = True
        """Whether there is a teacher now; else it is `CausalLM`, and tells `nll` as well."""

    def counts(self, row: Row) -> dict[str, float]:
        """Σ w_i of the row for each term."""
        counts = super().counts(row)
        if not self.taught:
            return counts
        return counts | {"teacher": counts["nll"]}

    def __call__(self, predictions: Predictions, row: Row) -> Loss:
        """The terms; besides what `CausalLM` tells `kl`, KL(q ‖ p), and `teacher_entropy`, that of q, in nats.

        Raises ValueError where the predictions hold nothing of a teacher.
        """
        of_data = super().__call__(predictions, row)
        nll, *others = of_data.terms
        told = {"nll": (nll.sum.detach(), row.weight.sum())}
        if not self.taught:
            return replace(of_data, metrics=of_data.metrics | told)
        if predictions.kl is None or predictions.teacher_entropy is None:
            raise ValueError("distillation needs the KL from a teacher, which the predictions do not hold")
        kl, entropy = ((row.weight * values).sum() for values in (predictions.kl, predictions.teacher_entropy))
        of_teacher = Term("teacher", self.temperature**2 * (kl + entropy), 1 - self.alpha)
        told |= {
            "kl": (kl.detach(), row.weight.sum()),
            "teacher_entropy": (entropy, row.weight.sum()),
        }
        return Loss((Term(nll.name, nll.sum, self.alpha), of_teacher, *others), of_data.metrics | told)
