"""How well rewards tell better answers from worse ones.

Shapes: A answers of a row, n answers of a sample.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litrecipe.config import stop
from litrecipe.config.progress import track
from litrecipe.data.packing import pack
from litrecipe.data.source import SampleList
from litrecipe.model.row import Row, Sample, make_row
from litrecipe.objectives.answers import SCORES, answers_of

BINS = 10
"""Of the calibration."""


@dataclass(frozen=True)
class Pair:
    """A better and a worse answer to one prompt, and what they got."""

    where: str
    prompt: str
    """A hash: pairs of one prompt are not independent."""
    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int
    weight: float
    """All pairs of one row together weigh 1."""

    @property
    def margin(self) -> float:
        """By how much the better answer is ahead."""
        return self.chosen - self.rejected

    @property
    def right(self) -> float:
        """1 when the better answer is ahead, ½ when both are equal."""
        return float(np.heaviside(self.margin, 0.5))


@torch.no_grad()
def compare(
    reward: Callable[[Row], Tensor],
    samples: SampleList | Sequence[Sample],
    *,
    budget: int,
    device: torch.device | str,
    progress: str | None = None,
    rank: int = 0,
    world: int = 1,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
) -> list[Pair]:
    """All pairs of samples, with the rewards (A,) of a row's answers that `reward` gives.

    Rows hold up to `budget` tokens; samples longer than that stand in rows of their own. Of several ranks each takes
    its share and all get the pairs of all.
    """
    lengths = [samples[place].length for place in range(len(samples))]
    packing = pack(lengths, max(budget, *lengths), multiple_of=world)
    mine = packing.rows[rank::world] or [[]]
    found: list[tuple[int, list[Pair]]] = []
    for places in track(mine, progress) if progress else mine:
        stop.poll()
        row = make_row([samples[place] for place in places]).to(device)
        found += zip(places, pairs_of_row(reward(row).tolist(), row), strict=True)
    everywhere = [pairs for of_rank in gather(found) for pairs in of_rank]
    return [pair for _, pairs in sorted(everywhere, key=lambda one: one[0]) for pair in pairs]


def pairs_of_row(rewards: Sequence[float], row: Row) -> Iterator[list[Pair]]:
    """The pairs of each sample of a row, whose answers stand best first; those scored alike by people are none."""
    rewarded = dict(zip(row.answers.tolist(), rewards, strict=True))
    known = row.extra.get(SCORES)
    scores = dict(zip(rewarded, known.tolist(), strict=True)) if known is not None else dict.fromkeys(rewarded, np.nan)
    for name, answers in zip(row.sample_ids, answers_of(row), strict=True):
        prompt = _key(row, answers[0])
        differing = [(a, b) for a, b in combinations(answers, 2) if scores[a] != scores[b]]
        yield [
            Pair(name, prompt, rewarded[a], rewarded[b], _length(row, a), _length(row, b), 1 / len(differing))
            for a, b in differing
        ]


def _length(row: Row, span: int) -> int:
    return row.spans[span].stop - row.spans[span].start


def _key(row: Row, answer: int) -> str:
    """Names the prompt that an answer hangs from."""
    parent = row.spans[row.spans[answer].parent]
    tokens = row.tokens[parent.start : parent.stop].cpu().numpy()
    return blake2b(tokens.tobytes(), digest_size=8).hexdigest()


def mean_by_prompt(
    values: Sequence[float], weights: Sequence[float], prompts: Sequence[str]
) -> tuple[float, float | None]:
    """The weighted mean and its standard error, which takes all pairs of a prompt for one observation.

    With clusters g of residuals e: √(G / (G - 1) Σ_g (Σ_{i in g} w_i e_i)²) / Σ w, the sandwich estimate for a mean.
    """
    if not values:
        return math.nan, None
    w, x = np.array(weights), np.array(values)
    mean = float((w * x).sum() / w.sum())
    clusters: dict[str, float] = defaultdict(float)
    for prompt, residual in zip(prompts, w * (x - mean), strict=True):
        clusters[prompt] += float(residual)
    if len(clusters) < 2:
        return mean, None
    spread = sum(total**2 for total in clusters.values()) * len(clusters) / (len(clusters) - 1)
    return mean, float(math.sqrt(spread) / w.sum())


def summary(pairs: Sequence[Pair]) -> dict[str, tuple[float, float | None]]:
    """Metric → value and standard error.

    `accuracy` beside `length_accuracy`, what one reaches who always takes the longer answer; `shorter_accuracy` on the
    pairs whose better answer is the shorter one; `margin`; `log_loss` and `calibration_error` of σ(margin) taken for
    the probability that the better answer is better. What there are no pairs for is left out.
    """
    shorter = [pair for pair in pairs if pair.chosen_tokens < pair.rejected_tokens]
    found = {
        "accuracy": _mean(pairs, lambda pair: pair.right),
        "length_accuracy": _mean(pairs, lambda p: float(np.heaviside(p.chosen_tokens - p.rejected_tokens, 0.5))),
        "shorter_accuracy": _mean(shorter, lambda pair: pair.right),
        "margin": _mean(pairs, lambda pair: pair.margin),
        "log_loss": _mean(pairs, lambda pair: float(np.logaddexp(0, -pair.margin))),
        "calibration_error": (calibration_error(pairs), None),
    }
    return {name: (value, error) for name, (value, error) in found.items() if not math.isnan(value)}


def _mean(pairs: Sequence[Pair], value: Callable[[Pair], float]) -> tuple[float, float | None]:
    return mean_by_prompt(
        [value(pair) for pair in pairs], [pair.weight for pair in pairs], [pair.prompt for pair in pairs]
    )


@dataclass(frozen=True)
class Bin:
    """Pairs that a model is about equally sure of."""

    sure: float
    """Mean of the probability that it gives the answer it prefers."""
    right: float
    """How often that answer is the better one."""
    weight: float


def calibration(pairs: Iterable[Pair]) -> list[Bin]:
    """Bins of equal width in the probability σ(|margin|), from ½ to 1, that the preferred answer is better."""
    bins: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
    for pair in pairs:
        sure = 1 / (1 + math.exp(-min(abs(pair.margin), 700)))
        bins[min(int((sure - 0.5) * 2 * BINS), BINS - 1)].append((sure, pair.right, pair.weight))
    found = []
    for _, members in sorted(bins.items()):
        sure, right, weight = np.array(members).T
        found.append(
            Bin(float(np.average(sure, weights=weight)), float(np.average(right, weights=weight)), float(weight.sum()))
        )
    return found


def calibration_error(pairs: Sequence[Pair]) -> float:
    """Mean distance between how sure a model is and how often it is right (ECE, 1706.04599), NaN without pairs."""
    bins = calibration(pairs)
    if not bins:
        return math.nan
    return sum(one.weight * abs(one.sure - one.right) for one in bins) / sum(one.weight for one in bins)
