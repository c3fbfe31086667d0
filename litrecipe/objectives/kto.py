"""KTO as an objective: rated answers of a row in, one term and the field's metrics out (2402.01306).

Shapes: P predictions of a row, A answers of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from litrecipe.config.groups import Dpo
from litrecipe.model.head import Predictions
from litrecipe.model.row import Row, Sample
from litrecipe.objectives import preference
from litrecipe.objectives.answers import LABEL, answers_of, reference_logps, sum_by_segment
from litrecipe.objectives.loss import Loss, Samples, Term

KL = "kl"
"""Name of the extra that holds the step's z, one a sample, the same for all."""


class KTO:
    """Mean over the step's answers, each by itself: good ones up, bad ones down, from where the step stands.

    An answer is what its sample's `label` says; of several, the first is good and the others bad. The step stands at z,
    the mean log-ratio of answers to other prompts, an estimate of KL(π ‖ π_ref), at least 0 and without gradient. These
    mismatched answers are run before the step, and under the reference too, which must be at hand: no log-probability
    that was kept with a sample fits another prompt.
    """

    needs_reference = True
    needs_collisions = False

    def __init__(self, config: Dpo) -> None:
        self.beta = config.beta
        self.weights = config.desirable_weight, config.undesirable_weight

    def counts(self, row: Row) -> dict[str, float]:
        """Answers."""
        return {"kto": float(len(row.answers))}

    def __call__(self, predictions: Predictions, row: Row) -> Loss:
        """The term; `rewards/…` (β times the log-ratio) and `logps/…`, means over good and over bad answers; `kl`."""
        good = _good(row)
        logps = sum_by_segment(predictions.logps, row)[row.answers]
        ratios = logps - sum_by_segment(reference_logps(predictions, row), row)[row.answers]
        kl = row.extra[KL] if row.sample_ids else ratios.new_zeros(1)
        losses = preference.kto(ratios, good, kl[0], self.beta, self.weights)
        rewards = self.beta * ratios.detach()
        metrics: dict[str, tuple[Tensor, Tensor | float]] = {KL: (kl.sum(), float(len(row.sample_ids)))}
        for name, side in (("chosen", good), ("rejected", ~good)):
            metrics[f"rewards/{name}"] = (rewards[side].sum(), side.sum())
            metrics[f"logps/{name}"] = (logps.detach()[side].sum(), side.sum())
        return Loss((Term("kto", losses.sum()),), metrics)

    def statistics_samples(self, samples: Samples) -> list[Sample]:
        """Each prompt with the answers of the next sample, the last with those of the first; none of a single sample.

        The whole step is rotated, not a row of it, or z would depend on the cut.
        """
        n = len(samples)
        if n < 2:
            return []
        neighbours = ((samples[i], samples[(i + 1) % n]) for i in range(n))
        return [Sample(x.id, (x.segments[0], *y.segments[1:])) for x, y in neighbours]

    def statistics(self, predictions: Predictions, row: Row) -> dict[str, Tensor]:
        """Log-ratios (A,) of mismatched answers."""
        return {"ratio": sum_by_segment(predictions.logps - reference_logps(predictions, row), row)[row.answers]}

    def from_step(self, statistics: dict[str, Tensor], samples: int) -> dict[str, Tensor]:
        """z = max(0, mean log-ratio), for every sample."""
        ratio = statistics["ratio"]
        z = ratio.mean().clamp(min=0) if len(ratio) else ratio.new_zeros(())
        return {KL: z.expand(samples)}


def _good(row: Row) -> Tensor:
    """Which answers (A,) are good."""
    if LABEL in row.extra:
        return row.extra[LABEL] > 0.5
    first = [place == 0 for answers in answers_of(row) for place in range(len(answers))]
    return torch.tensor(first, dtype=torch.bool, device=row.segment.device)
