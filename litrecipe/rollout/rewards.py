"""What completions are worth: the sources' scores weighed and added, and one completion held against another.

Shapes: A completions of a rollout, or of a rank's share of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from litrecipe.config import groups
from litrecipe.config.errors import InputError
from litrecipe.config.online import Rewards, Sampling
from litrecipe.config.progress import counted
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fabric import Ranks
from litrecipe.objectives.advantages import length_penalty
from litrecipe.rollout.sources import (
    FUNCTION,
    KEY,
    Completions,
    RewardSource,
    Weighted,
    called,
    find_function,
    finite,
    make_source,
)

MISSING_EOS, SOFT_LIMIT = "missing_eos", "soft_limit"
"""Names under which penalties stand among the parts of a score."""


@dataclass(frozen=True)
class Scores:
    """What completions are worth."""

    total: Tensor
    """(A,) fp32."""
    by_source: dict[str, list[float | None]]
    """Source → what it adds to each completion before scaling and clipping, None where it does not apply; penalties,
    which are added after those, stand under `missing_eos` and `soft_limit`."""
    raw: dict[str, list[float | None]]
    """Source → scores as it gave them."""

    def means(self) -> dict[str, float]:
        """Source, or penalty, → the mean of what it gave, where it gave anything."""
        given = {
            name: [score for score in scores if score is not None]
            for name, scores in (self.by_source | self.raw).items()
        }
        return {name: math.fsum(scores) / len(scores) for name, scores in given.items() if scores}


@dataclass
class Moments:
    """Mean and spread of all numbers so far (Chan et al., 1983)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    def add(self, values: Sequence[float]) -> None:
        """More numbers; their order does not matter."""
        if not values:
            return
        n, mean = len(values), math.fsum(values) / len(values)
        off = mean - self.mean
        total = self.count + n
        self.squares += math.fsum((value - mean) ** 2 for value in values) + off**2 * self.count * n / total
        self.mean += off * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation, 0 of fewer than two numbers."""
        return math.sqrt(self.squares / self.count) if self.count > 1 else 0.0

    @property
    def scale(self) -> float:
        """The standard deviation, or 1 where there is none to divide by."""
        return self.std or 1.0


@dataclass
class Scorer:
    """Scores completions with all sources: weighs and adds, scales, clips, and takes penalties off, in this order.

    A completion to which no source applies scores 0 before penalties. Of several ranks each calls with its share of the
    rollout at the same time; `gather` gives all of them what each has, and what is normalised and scaled by is of all.
    """

    sources: list[Weighted]
    config: Rewards
    online: Sampling
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    moments: Moments = field(default_factory=Moments)
    """Of the scores over the run so far, before they are scaled."""

    def __call__(self, completions: Completions) -> Scores:
        """Raises InputError where a source gives what is no score."""
        raw = {one.source.name: one.source(completions) for one in self.sources}
        for name, scores in raw.items():
            if len(scores) != len(completions):
                raise InputError(
                    f"{KEY}: {name}: {counted(len(scores), 'score')} of {counted(len(completions), 'completion')}: "
                    "give as many"
                )
        by_source = {one.source.name: self._weighed(raw[one.source.name], one.weight) for one in self.sources}
        sums = [
            math.fsum(part for part in parts if part is not None) for parts in zip(*by_source.values(), strict=True)
        ]
        total = torch.tensor(self._scaled(sums), dtype=torch.float64)
        if self.config.clip is not None:
            total = total.clamp(-self.config.clip, self.config.clip)
        total, penalties = self._punished(total, completions)
        return Scores(total.float(), by_source | penalties, raw)

    def plain(self) -> Scorer:
        """The same sum of weighed scores without normalising and scaling, by which policies of all times compare."""
        return replace(self, config=replace(self.config, combine="sum", scale="none"), moments=Moments())

    def state_dict(self) -> dict[str, Any]:
        """What scaling has seen so far, as JSON."""
        return asdict(self.moments)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        self.moments = Moments(**state)

    def _weighed(self, scores: list[float | None], weight: float) -> list[float | None]:
        shift, scale = 0.0, 1.0
        if self.config.combine == "normalise":
            rollout = Moments()
            rollout.add([score for of_rank in self.gather(scores) for score in of_rank if score is not None])
            shift, scale = rollout.mean, rollout.scale
        return [None if score is None else weight * (score - shift) / scale for score in scores]

    def _scaled(self, sums: list[float]) -> list[float]:
        """Divided by the standard deviation over the run, this rollout included (2307.04964)."""
        if self.config.scale == "none":
            return sums
        self.moments.add([value for of_rank in self.gather(sums) for value in of_rank])
        return [value / self.moments.scale for value in sums]

    def _punished(self, total: Tensor, completions: Completions) -> tuple[Tensor, dict[str, list[float | None]]]:
        """Scores less the penalties for nearing `max_new_tokens` and for being cut there; what is set, is set last."""
        penalties: dict[str, list[float | None]] = {}
        online = self.online
        if online.soft_limit:
            lengths = torch.tensor([len(tokens) for tokens in completions.tokens], dtype=torch.float64)
            near_end = length_penalty(lengths, online.max_new_tokens, online.soft_limit)
            penalties[SOFT_LIMIT] = near_end.tolist()
            total = total + near_end
        if online.missing_eos is not None:
            cut = torch.tensor([end == "length" for end in completions.ended], dtype=torch.bool)
            set_to = torch.full_like(total, -online.missing_eos)
            punished = torch.where(cut, set_to if online.missing_eos_mode == "set" else total + set_to, total)
            penalties[MISSING_EOS] = (punished - total).tolist()
            total = punished
        return total, penalties


class Judge(Protocol):
    """Compares completions of the same prompts."""

    def __call__(self, a: Completions, b: Completions) -> list[float]:
        """How likely it is that each of `a` is better than that of `b`."""


@dataclass(frozen=True)
class ScoreJudge:
    """σ(r_a - r_b) of a reward source (Bradley and Terry); ½ where it does not apply to both."""

    source: RewardSource

    def __call__(self, a: Completions, b: Completions) -> list[float]:
        return [
            0.5 if one is None or other is None else _sigmoid(one - other)
            for one, other in zip(self.source(a), self.source(b), strict=True)
        ]


@dataclass(frozen=True)
class FunctionJudge:
    """A Python function, called with `prompts`, `a`, `b` (texts) and `rows`, which gives a probability each."""

    name: str
    function: Callable[..., Any]

    def __call__(self, a: Completions, b: Completions) -> list[float]:
        """Raises InputError naming the function, and the prompt, for what is no probability."""
        prompts = a.prompts
        given: dict[str, list[Any]] = {
            "prompts": [prompt.said for prompt in prompts],
            "a": list(a.texts),
            "b": list(b.texts),
            "rows": [dict(prompt.row) for prompt in prompts],
        }
        chances = []
        for value, prompt in zip(called(self.name, self.function, given, prompts), prompts, strict=True):
            where = f"{self.name}: {prompt.where}"
            chance = finite(value, where)
            if not 0 <= chance <= 1:
                raise InputError(f"{where}: {chance:g}: give the probability, 0 to 1, that a is better")
            chances.append(chance)
        return chances


def make_judge(
    spec: str,
    tokenizer: Tokenizer,
    fabric: groups.Fabric,
    device: torch.device | str,
    *,
    budget: int = 8192,
    longest: int | None = None,
    ranks: Ranks | None = None,
) -> Judge:
    """`function:MODULE:NAME`, or any reward source, as a judge; see `make_sources`."""
    if spec.startswith(FUNCTION):
        return FunctionJudge(spec, find_function(spec))
    return ScoreJudge(make_source(spec, tokenizer, fabric, device, budget=budget, longest=longest, ranks=ranks))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))
