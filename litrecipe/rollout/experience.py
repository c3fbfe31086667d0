"""From completions to what is learnt from them: samples, and numbers beside each of their predictions.

Shapes: A completions of a rollout; P tokens of all of them, completion after completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from litrecipe.config import stop
from litrecipe.config.progress import track
from litrecipe.data.packing import pack
from litrecipe.data.remembered import predictions
from litrecipe.engine.fabric import Ranks
from litrecipe.model.row import Row, Sample, Segment, make_row
from litrecipe.rollout.rewards import Scores
from litrecipe.rollout.sources import Completions

T = TypeVar("T")


@dataclass(frozen=True)
class Scored:
    """Completions, those of a prompt side by side, and what was thought of them."""

    completions: Completions
    scores: Scores
    groups: Tensor
    """(A,) int64; which prompt each completes."""

    @property
    def lengths(self) -> Tensor:
        """(A,) int64; tokens of each completion."""
        return torch.tensor([len(tokens) for tokens in self.completions.tokens], dtype=torch.int64)

    @property
    def truncated(self) -> Tensor:
        """(A,) bool; whether the completion was cut at the longest length."""
        return torch.tensor([ended == "length" for ended in self.completions.ended], dtype=torch.bool)

    @property
    def prompts(self) -> int:
        """How many there are."""
        return len(self.groups.unique())

    def at(self, places: Sequence[int]) -> Scored:
        """Some of the completions, in the order of `places`."""

        def some(values: list[T]) -> list[T]:
            return [values[place] for place in places]

        c, s = self.completions, self.scores
        parts, raw = ({name: some(values) for name, values in kept.items()} for kept in (s.by_source, s.raw))
        return Scored(
            c.at(places),
            Scores(s.total[list(places)], parts, raw),
            self.groups[list(places)],
        )

    def in_order(self) -> Scored:
        """The same in order of the groups."""
        return self.at(self.groups.argsort(stable=True).tolist())


def joined(parts: Sequence[Scored]) -> Scored:
    """One after the other."""

    def strung(lists: Iterable[list[T]]) -> list[T]:
        return list(chain.from_iterable(lists))

    completions, scores = [part.completions for part in parts], [part.scores for part in parts]
    return Scored(
        Completions(
            strung(one.prompts for one in completions),
            strung(one.texts for one in completions),
            strung(one.tokens for one in completions),
            strung(one.ended for one in completions),
            None if any(one.logps is None for one in completions) else strung(one.logps or [] for one in completions),
        ),
        Scores(
            torch.cat([one.total for one in scores]),
            {name: strung(one.by_source[name] for one in scores) for name in scores[0].by_source},
            {name: strung(one.raw[name] for one in scores) for name in scores[0].raw},
        ),
        torch.cat([part.groups for part in parts]),
    )


@dataclass(frozen=True)
class Rollout:
    """What was sampled and scored, as it is learnt from."""

    number: int
    """From 1 on."""
    scored: Scored
    samples: list[Sample]
    """Prompts with completions as branches, whose predictions are the P tokens in order."""


def samples_of(scored: Scored, number: int, budget: int) -> tuple[list[Sample], list[int]]:
    """Each prompt with its completions as branches, as many of them together as fit `budget` tokens; and its group.

    What is learnt from a completion does not depend on the others of its sample, so the cut changes nothing.
    """
    completions = scored.completions
    groups = scored.groups.unique(return_inverse=True)[1].tolist()
    samples: list[Sample] = []
    of_samples: list[int] = []
    first = 0
    while first < len(completions):
        prompt = np.asarray(completions.prompts[first].tokens)
        last, room = first, budget - len(prompt)
        while last < len(completions) and groups[last] == groups[first]:
            room -= len(completions.tokens[last])
            if room < 0 and last > first:
                break
            last += 1
        segments = [Segment(prompt, np.zeros(len(prompt), dtype=np.float32))]
        segments += [
            Segment(np.asarray(tokens), np.ones(len(tokens), dtype=np.float32), parent=0)
            for tokens in completions.tokens[first:last]
        ]
        samples.append(Sample(f"{completions.prompts[first].where}@{number}:{first}", tuple(segments)))
        of_samples.append(groups[first])
        first = last
    return samples, of_samples


@torch.no_grad()
def measure(
    ask: Callable[[Row], dict[str, Tensor]],
    samples: Sequence[Sample],
    *,
    budget: int,
    device: torch.device | str,
    ranks: Ranks,
    progress: str,
) -> dict[str, Tensor]:
    """What `ask` says of every prediction: name → (P,) float32 on the CPU, from name → (P of a row,).

    The rows are made as in training, of at most `budget` tokens. Of several ranks each asks for its share, and all get
    everything.
    """
    packing = pack([sample.length for sample in samples], budget, multiple_of=ranks.world)
    mine = packing.rows[ranks.rank :: ranks.world] or [[]]
    found: list[tuple[int, dict[str, np.ndarray]]] = []
    for places in track(mine, f"{progress}: row"):
        stop.poll()
        said = ask(make_row([samples[place] for place in places]).to(device))
        ends = np.cumsum([predictions(samples[place]) for place in places])[:-1]
        parts = {name: np.split(values.float().cpu().numpy(), ends) for name, values in said.items()}
        found += [(place, {name: of_rows[n] for name, of_rows in parts.items()}) for n, place in enumerate(places)]
    everywhere = dict(pair for of_rank in ranks.agree(found) for pair in of_rank)
    in_order = [everywhere[place] for place in range(len(samples))]
    return {name: torch.from_numpy(np.concatenate([one[name] for one in in_order])) for name in in_order[0]}


def with_extras(samples: Sequence[Sample], extras: dict[str, Tensor]) -> list[Sample]:
    """The samples, each with its own part of the extras (P,)."""
    ends = np.cumsum([predictions(sample) for sample in samples])[:-1]
    parts = {name: np.split(values.float().numpy(), ends) for name, values in extras.items()}
    return [
        replace(sample, extra={**sample.extra, **{name: of_samples[n] for name, of_samples in parts.items()}})
        for n, sample in enumerate(samples)
    ]


def by_completion(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums (A,) of what tokens (P,) got."""
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0)


def spread(values: Tensor, lengths: Tensor) -> Tensor:
    """Each completion's value (A,) for each of its tokens (P,)."""
    return values.repeat_interleave(lengths)
