"""A reward model: the transformer with one number at the end of a text, where Hugging Face's classifiers have it.

Shapes: T tokens of a row, A answered segments, d hidden size.
"""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litrecipe.model.architecture import Architecture
from litrecipe.model.decoder import Trunk
from litrecipe.model.head import widen
from litrecipe.model.row import Row


class Score(nn.Linear):
    """Says how good what was read is."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, d) → (n, 1) in fp32 whatever the weights are."""
        hidden = widen(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden, self.weight.to(hidden.dtype))


class RewardModel(Trunk):
    """Says how good each answer of a row is. Only the places that are scored go through the last layer."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.statistics: tuple[float, float] | None = None
        """Mean and standard deviation of the rewards of good answers, where they were measured."""
        self.score = Score(architecture.hidden_size, 1, bias=False)

    def init_weights(self, seed: int) -> None:
        """Fresh weights, see `Trunk` and `init_score`."""
        super().init_weights(seed)
        self.init_score(seed)

    @torch.no_grad()
    def init_score(self, seed: int) -> None:
        """A fresh score from N(0, 1/(d + 1)): rewards start with about the spread of one hidden unit.

        That is a standard deviation of 1/√(d + 1), as the authors of 2009.01325 ran it; their paper lacks the root.
        """
        d = self.architecture.hidden_size
        # A stream of its own, not that of fresh weights or an adapter; on the CPU, so that every device starts alike.
        generator = torch.Generator().manual_seed(random.Random(f"score {seed}").getrandbits(63))
        fresh = torch.empty(1, d, device="cpu").normal_(0, 1 / math.sqrt(d + 1), generator=generator)
        self.score.weight.copy_(fresh)

    def normalised(self, rewards: Tensor) -> Tensor:
        """Rewards whose 0 is the mean of good answers and whose unit is their spread; as they are if that is unknown.

        Comparisons tell rewards up to a shift: who adds or thresholds them uses these.
        """
        if self.statistics is None:
            return rewards
        mean, std = self.statistics
        return (rewards - mean) / std

    def forward(self, row: Row) -> Tensor:
        """Rewards (A,) of `row.answers`, read at each segment's last token; fp32 whatever the weights are.

        A may be 0; the result still hangs on the graph.
        """
        return self.read(row, self.ends(row))

    @staticmethod
    def ends(row: Row) -> Tensor:
        """Where (A,) each answer of a row ends."""
        ends = torch.tensor([span.stop - 1 for span in row.spans], device=row.tokens.device)
        return ends[row.answers]

    def read(self, row: Row, places: Tensor) -> Tensor:
        """The score of what was read up to each of some places (n,) of a row: (n,) in fp32."""
        return self.scores(self.hidden(row, places))

    def scores(self, hidden: Tensor) -> Tensor:
        """The scores (n,) in fp32 of hidden states (n, d)."""
        return self.score(hidden)[:, 0].clone()  # FSDP's hooks stay on no view
