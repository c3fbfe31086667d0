"""Log-probabilities under the reference, computed once for all epochs and kept beside the tokens.

Shapes: P predictions of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from litrecipe.config.groups import Data
from litrecipe.data.cache import cache_folder
from litrecipe.data.remembered import KnownSamples, WithExtras, Witness, remembered
from litrecipe.model.row import Row
from litrecipe.objectives.answers import REF_LOGPS


def with_reference(
    samples: KnownSamples,
    ref_logps: Callable[[Row], Tensor],
    reference: list[Any],
    data: Data,
    budget: int,
    rank: int = 0,
    world: int = 1,
) -> WithExtras:
    """The same samples, which carry their log-probabilities under the reference as an extra.

    `ref_logps` gives those of a row (P,) of at most `budget` tokens; `reference` (JSON values) is everything that the
    numbers depend on besides the samples: weights, adapter, quantisation, precision. See `remembered`.
    """
    witness = Witness("reference", lambda row: {REF_LOGPS: ref_logps(row).float()}, reference, budget)
    return remembered(samples, witness, cache_folder(data), rank, world)
