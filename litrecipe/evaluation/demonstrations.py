"""How high a reward model's rewards of good answers are: comparisons tell rewards up to a shift only.

Shapes: A answers of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from litrecipe.config.groups import RewardRecipe
from litrecipe.config.progress import say, warn
from litrecipe.data.comparisons import COMPARISONS
from litrecipe.data.packing import pack
from litrecipe.data.prepared import prepare
from litrecipe.data.source import SampleList
from litrecipe.data.supervised import SUPERVISED
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.model.row import Row, Sample, Segment, make_row


def demonstrations_of(recipe: RewardRecipe, tokenizer: Tokenizer, train: SampleList | None = None) -> list[Sample]:
    """Good answers, each a sample that ends with what is said last: those the recipe names, or the best of its pairs.

    `train` are the samples of its pairs, prepared here where they are not given.
    """
    source = recipe.reward.demonstrations
    if source is None:
        pairs = train or prepare(COMPARISONS, recipe.data, tokenizer, seed=recipe.train.seed).train
        return [replace(one, segments=one.segments[:2], extra={}) for one in some_of(pairs, recipe.reward.measured)]
    data = replace(recipe.data, train=source, val=None, val_fraction=0.0, columns={})
    said = prepare(SUPERVISED, data, tokenizer, seed=recipe.train.seed).train
    return [replace(one, segments=(until_learnt(one.segments[0]),)) for one in some_of(said, recipe.reward.measured)]


def until_learnt(segment: Segment) -> Segment:
    """Without what a chat template prints after the last answer, which was not there when the model learnt."""
    stop = int(np.flatnonzero(segment.weights)[-1]) + 1
    return Segment(segment.tokens[:stop], segment.weights[:stop])


def some_of(samples: SampleList, count: int) -> list[Sample]:
    """Up to `count` samples, spread evenly over all."""
    places = np.unique(np.linspace(0, len(samples) - 1, count).round().astype(int))
    return [samples[place] for place in places]


@torch.no_grad()
def mean_and_spread(
    reward: Callable[[Row], Tensor], demonstrations: list[Sample], budget: int, device: torch.device | str
) -> tuple[float, float] | None:
    """Mean and standard deviation of the reward (A,) of good answers, in rows of up to `budget` tokens.

    None, said, where they do not vary. Whoever uses the rewards takes them from there (2009.01325 sets the mean of
    demonstrations to 0).
    """
    rewards: list[float] = []
    lengths = [sample.length for sample in demonstrations]
    for places in pack(lengths, max(budget, *lengths)).rows:
        rewards += reward(make_row([demonstrations[place] for place in places]).to(device)).tolist()
    mean, std = float(np.mean(rewards)), float(np.std(rewards, ddof=1)) if len(rewards) > 1 else 0.0
    if std == 0.0:
        warn(f"the reward of {len(rewards)} demonstrations does not vary: reward_mean and reward_std are left out")
        return None
    say(f"reward of {len(rewards)} demonstrations: {mean:.4f} ± {std:.4f}, kept as reward_mean and reward_std")
    return mean, std
