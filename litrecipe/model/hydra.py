"""One transformer with two heads: a language model that is its own judge (Hydra-RLHF, 2309.00754).

Shapes: P predictions of a row, A answers of it, C predictions of the best answers only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from litrecipe.model.adapters import adapter_off
from litrecipe.model.decoder import Decoder
from litrecipe.model.head import Predictions
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import Row


class HydraOutput(NamedTuple):
    """What both heads make of a row."""

    rewards: Tensor
    """(A,) fp32, as a reward model's."""
    predictions: Predictions
    """(C,) of the tokens of each sample's best answer."""


class Hydra(Decoder, RewardModel):
    """A language model and a reward model on one transformer, which both of them train."""

    def forward(self, row: Row, best: Row | None = None) -> HydraOutput:  # type: ignore[override]
        """Rewards of all answers; log-probabilities of the best ones, no others go through the language model's head.

        A and C may be 0; the result still hangs on the graph. `best` is `of_best(row)`, where that is known.
        """
        best = of_best(row) if best is None else best
        ends = self.ends(row)
        hidden = self.hidden(row, torch.cat([ends, best.predict_from]))
        rewarded, predicting = hidden.split([len(ends), len(best.predict_from)])
        return HydraOutput(self.scores(rewarded), self.said(predicting, best))


class BaseJudge(RewardModel):
    """The reward model below a policy's adapter: the same transformer with the adapter off, not a second one.

    It must not be a part of what is trained.
    """

    def __init__(self, policy: Decoder, score: Tensor, statistics: tuple[float, float] | None) -> None:
        """`score` (1, d) and `statistics` are those of the hydra that the policy is an adapter on."""
        with torch.device("meta"):
            super().__init__(policy.architecture)
        self.model = policy.model
        self._policy = (policy,)  # not a part of this one
        self.score.weight = nn.Parameter(score, requires_grad=False)
        self.statistics = statistics

    def forward(self, row: Row) -> Tensor:
        """Rewards (A,), as those of a `RewardModel` with the base's weights, bit for bit."""
        with adapter_off(self):
            return self._policy[0].within(lambda: super(BaseJudge, self).forward(row))


def of_best(row: Row) -> Row:
    """The row with the predictions (C,) of each sample's best answer only, which stands first."""
    first: dict[int, int] = {}
    for span in row.answers.tolist():
        first.setdefault(row.sample_of_span[span], span)
    best = torch.tensor(list(first.values()), dtype=torch.int64, device=row.segment.device)
    kept = torch.isin(row.segment, best)
    names = "predict_from", "target", "weight", "segment"
    return replace(row, **{name: getattr(row, name)[kept] for name in names}, answers=best)
