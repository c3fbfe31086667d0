"""What a model says of samples, computed once for all epochs and runs, and kept on disk beside them.

Shapes: P predictions of a row.

It lies in parts of so many samples, each a `SampleSet` of samples that have extras and no tokens, so that a pass that
was cut short goes on behind its last whole part, and several processes share it: each begins at another part, and finds
those of the others when it comes there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from litrecipe import __version__
from litrecipe.config.errors import InputError
from litrecipe.config.progress import track
from litrecipe.data.cache import key_of
from litrecipe.data.packing import pack
from litrecipe.data.prepared import kept
from litrecipe.data.samples import SampleSet
from litrecipe.data.source import SampleList
from litrecipe.model.row import Row, Sample, make_row

VERSION = 2
"""Raise it when the same inputs give other numbers, or other files."""
WINDOW = 64
"""Samples among which rows are packed."""
PART = 2048
"""Samples of a part."""


class KnownSamples(SampleList, Protocol):
    """Samples in an order that is known, from wherever they are read."""

    @property
    def fingerprint(self) -> str:
        """Hash of the samples and their order."""
        ...


class WithExtras:
    """Samples with what lies beside them."""

    def __init__(self, samples: KnownSamples, parts: Sequence[SampleSet]) -> None:
        self.samples, self.parts = samples, parts
        self.lengths = samples.lengths
        """Tokens of each sample."""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        part, place = divmod(range(len(self))[index], PART)
        return replace(sample, extra={**sample.extra, **self.parts[part][place].extra})

    @property
    def fingerprint(self) -> str:
        """Hash of the samples, their order and all that lies beside them."""
        return key_of(self.samples.fingerprint, [part.fingerprint for part in self.parts])


@dataclass(frozen=True)
class Witness:
    """A model that is asked, and what is known of it."""

    name: str
    """Names its folder in the cache, and what is being done on the progress line."""
    says: Callable[[Row], dict[str, Tensor]]
    """Names of extras → what each of a row's predictions gets, (P,) or (P, k), float32 or integers."""
    known_by: list[Any]
    """JSON values: all that its answers depend on besides the samples, such as hashes of weights, and the precision."""
    budget: int
    """Tokens of a row. Longer samples are left without extras; they fit into no row of the training either."""


def remembered(samples: KnownSamples, witness: Witness, cache: Path, rank: int = 0, world: int = 1) -> WithExtras:
    """The same samples with what the witness says of each prediction as extras, end to end.

    Nothing is computed where a run of the same left its numbers below `cache`. Each of several processes must call it
    with its rank. Raises InputError for numbers of another witness.
    """
    about = {"model": witness.known_by, "samples": samples.fingerprint, "budget": witness.budget}
    key = key_of(VERSION, __version__, torch.__version__, about)
    firsts = range(0, len(samples), PART)
    mine = rank * len(firsts) // world
    found: dict[int, SampleSet] = {}
    for first in [*firsts[mine:], *firsts[:mine]]:
        part = cache / witness.name / f"{key}-{first:09}-{min(PART, len(samples) - first)}"
        found[first] = kept(part, partial(_write, part, samples, witness, first, about))
        if found[first].about != about:
            other = next(name for name in about if found[first].about.get(name) != about[name])
            raise InputError(f"{part}: of another {other}: remove this folder, it is made anew")
    return WithExtras(samples, [found[first] for first in firsts])


def _write(folder: Path, samples: KnownSamples, witness: Witness, first: int, about: dict[str, Any]) -> SampleSet:
    """The part of the samples from the `first` on."""
    return SampleSet.write(folder, _said(samples, witness, first), lambda: about)


@torch.no_grad()
def _said(samples: KnownSamples, witness: Witness, first: int) -> Iterator[Sample]:
    """Samples of a part without their segments, with their extras."""
    part = range(first, min(first + PART, len(samples)))
    indices = iter(track(part, f"{witness.name}: sample", total=len(part)))
    nothing: dict[str, np.ndarray] | None = None
    while window := list(islice(indices, WINDOW)):
        here = [samples[index] for index in window]
        found: dict[int, dict[str, np.ndarray]] = {}
        for places in pack([sample.length for sample in here], witness.budget).rows:
            row = [here[place] for place in places]
            found |= zip(places, _by_sample(witness.says(make_row(row)), row), strict=True)
        if nothing is None:
            [nothing] = _by_sample(witness.says(make_row([])), [Sample("", ())])
        for place, sample in enumerate(here):
            yield Sample(sample.id, (), found.get(place, nothing))


def _by_sample(said: dict[str, Tensor], row: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
    """What is said of a row's predictions, (P,) or (P, k), as extras of its samples."""
    ends = np.cumsum([predictions(sample) for sample in row])[:-1]
    split = {name: np.split(values.cpu().numpy(), ends) for name, values in said.items()}
    return [{name: values[place].ravel() for name, values in split.items()} for place in range(len(row))]


def predictions(sample: Sample) -> int:
    """How many tokens of a sample are predicted."""
    return sum(int(np.count_nonzero(segment.weights)) for segment in sample.segments)
