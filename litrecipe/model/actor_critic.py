"""What comes out where a policy and its critic read the same row.

Shapes: P predictions of a row.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from litrecipe.model.head import Predictions


class ActorCriticOutput(NamedTuple):
    """What the policy and the critic make of a row."""

    predictions: Predictions
    values: Tensor
    """(P,) what may still be expected where each target is about to be chosen; in the score's units."""
