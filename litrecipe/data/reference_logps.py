"""Log-probabilities under the reference, computed once for all epochs and kept beside the tokens.

Shapes: P predictions of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litrecipe import __version__
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.config.progress import track
from litrecipe.data.cache import cache_folder, key_of
from litrecipe.data.packing import pack
from litrecipe.data.prepared import kept
from litrecipe.data.samples import SampleSet
from litrecipe.model.row import Row, Sample, make_row
from litrecipe.objectives.answers import REF_LOGPS

VERSION = 1
"""Raise it when the same inputs give other numbers, or other files."""
WINDOW = 64
"""Samples among which rows are packed."""


def with_reference(
    samples: SampleSet, ref_logps: Callable[[Row], Tensor], reference: list[Any], data: Data, budget: int
) -> SampleSet:
    """The same samples, which carry their log-probabilities under the reference as an extra.

    `ref_logps` gives those of a row (P,) of at most `budget` tokens; longer samples are left without (they fit into no
    row of the training either). `reference` (JSON values) is everything that the numbers depend on besides the samples:
    weights, adapter, quantisation, precision. Nothing is computed where another run of the same left its numbers.
    """
    key = key_of(VERSION, __version__, torch.__version__, samples.fingerprint, reference, budget)
    folder = cache_folder(data) / "reference" / key
    about = {"reference": reference, "samples": samples.fingerprint, "budget": budget}
    found = kept(folder, lambda: SampleSet.write(folder, _computed(samples, ref_logps, budget), about=lambda: about))
    if found.about != about:
        other = next(name for name in about if found.about.get(name) != about[name])
        raise InputError(f"{folder}: log-probabilities of another {other}: remove this folder, it is made anew")
    return found


@torch.no_grad()
def _computed(samples: SampleSet, ref_logps: Callable[[Row], Tensor], budget: int) -> Iterator[Sample]:
    indices = iter(track(range(len(samples)), "log-probabilities under the reference: sample"))
    while window := list(islice(indices, WINDOW)):
        here = [samples[index] for index in window]
        found: dict[int, np.ndarray] = {}
        for row in pack([sample.length for sample in here], budget).rows:
            values = ref_logps(make_row([here[place] for place in row])).float().cpu().numpy()
            ends = np.cumsum([predictions(here[place]) for place in row])
            found |= dict(zip(row, np.split(values, ends[:-1]), strict=True))
        for place, sample in enumerate(here):
            values = found.get(place, np.zeros(0, dtype=np.float32))
            yield replace(sample, extra={**sample.extra, REF_LOGPS: values})


def predictions(sample: Sample) -> int:
    """How many tokens of a sample are predicted."""
    return sum(int(np.count_nonzero(segment.weights)) for segment in sample.segments)
