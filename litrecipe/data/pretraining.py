"""From the sources of a pretraining recipe to its stream of steps, and to what is held out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from litrecipe.config.errors import InputError
from litrecipe.config.pretrain import PretrainRecipe
from litrecipe.config.progress import counted
from litrecipe.data.shards import Shards, open_shards
from litrecipe.data.stream import Batches, Mixture, Sequences, Stage, StreamSource
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.model.row import Sample

ONE = "train"
"""Name of the source where a recipe has one, as `data.train`."""


@dataclass(frozen=True)
class HeldOut:
    """The first sequences of a held-out source, a `SampleList`."""

    whole: Sequences
    count: int
    bytes_per_token: float | None
    """UTF-8 bytes that a token stands for on average; None where it is not known."""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self.whole[index]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        return self.whole.lengths[: self.count]

    @property
    def fingerprint(self) -> str:
        """Hash of the samples and their order."""
        return f"{self.whole.key}:{self.whole.attend_across}:{self.count}"


@dataclass(frozen=True)
class Stream:
    """The data of a pretraining."""

    source: StreamSource
    shards: dict[str, Shards]
    """By the path or name that the recipe has."""
    val: HeldOut | None

    def report(self) -> Iterator[str]:
        """A line for each source of each stage, and for what is held out."""
        for stage in self.source.stages:
            total = sum(stage.mixture.weights.values())
            taken = stage.mixture.spent(stage.batches.until(stage.steps), {})
            for name, reel in stage.mixture.sources.items():
                where = f"{stage.name}: " if stage.name else ""
                share = stage.mixture.weights[name] / total
                yield (
                    f"{where}{name}: {counted(len(reel.documents.lengths), 'document', ',')}, "
                    f"{counted(reel.tokens, 'token', ',')} in "
                    f"{counted(len(reel), 'sequence', ',')} of {reel.length}; {share:.1%} of the stream, "
                    f"{taken[name] / len(reel):.2f} epochs"
                )
        if self.val is not None:
            whole = self.val.whole
            yield f"val: {self.val.count:,} of {counted(len(whole), 'sequence', ',')} of {whole.length}"


def open_stream(recipe: PretrainRecipe, tokenizer: Tokenizer) -> Stream:
    """Open what is prepared, prepare what is text, and lay out all stages.

    Raises InputError with the mistakes of all sources and stages, also where a stage is longer than its data.
    """
    mistakes: list[str] = []
    shards: dict[str, Shards] = {}
    stages: list[Stage] = []
    for name, part in recipe.parts.items():
        try:
            stages.append(_stage(name, part, tokenizer, shards))
        except InputError as error:
            mistakes += error.mistakes
    val = None
    if recipe.data.val:
        try:
            val = _held_out(recipe, tokenizer)
        except InputError as error:
            mistakes += error.mistakes
    if not mistakes:
        mistakes += _too_long(stages, recipe)
    if mistakes:
        raise InputError(*mistakes)
    return Stream(StreamSource(stages), shards, val)


def _stage(name: str, recipe: PretrainRecipe, tokenizer: Tokenizer, shards: dict[str, Shards]) -> Stage:
    data, prefix = recipe.data, f"stages.{name}." if name else ""
    mistakes: list[str] = []
    reels: dict[str, Sequences] = {}
    for source_name, path in (data.sources or {ONE: data.train}).items():
        key = f"{prefix}data.{f'sources.{source_name}' if data.sources else 'train'}"
        try:
            if path not in shards:
                shards[path] = open_shards(path, tokenizer, data, key=key, workers=data.workers)
            reels[source_name] = Sequences(
                source_name, shards[path], data.max_length, recipe.train.seed, attend_across=data.attend_across
            )
        except InputError as error:
            mistakes += error.mistakes
    if mistakes:
        raise InputError(*mistakes)
    shares = data.mix or {source_name: float(reel.tokens) for source_name, reel in reels.items()}
    weights = {source_name: share ** (1 / data.temperature) for source_name, share in shares.items()}
    total = sum(weights.values())
    weights = {source_name: weight / total for source_name, weight in weights.items()}
    batches, mixture = batches_of(recipe), Mixture(reels, weights, data.max_epochs)
    steps = steps_of(recipe, batches, sum(reel.tokens for reel in reels.values()))
    return Stage(name, mixture, batches, steps, taught=recipe.distil.teacher is not None)


def batches_of(recipe: PretrainRecipe) -> Batches:
    """How many sequences the steps of a stage have."""
    train = recipe.train
    return Batches(train.global_batch_size, train.initial_batch_size, train.batch_warmup_steps)


def steps_of(recipe: PretrainRecipe, batches: Batches, tokens: int) -> int:
    """The smallest of the limits `max_steps`, `max_tokens` and `epochs` of all `tokens`."""
    train, length = recipe.train, recipe.data.max_length
    limits = [] if train.max_steps is None else [train.max_steps]
    if train.max_tokens is not None:
        limits.append(batches.steps_for(math.ceil(train.max_tokens / length)))
    epochs = 1.0 if not limits and train.epochs is None else train.epochs
    if epochs is not None:
        limits.append(batches.steps_for(math.ceil(epochs * tokens / length)))
    return max(1, min(limits))


def _too_long(stages: list[Stage], recipe: PretrainRecipe) -> Iterator[str]:
    """A line for every stage whose sources are used up before it ends."""
    spent: dict[str, float] = {}
    for stage in stages:
        wanted = stage.batches.until(stage.steps)
        taken = stage.mixture.spent(wanted, spent)
        given = sum(taken.values())
        for name, reel in stage.mixture.sources.items():
            spent[reel.key] = spent.get(reel.key, 0.0) + taken[name]
        # The last step may be a short one.
        if given <= wanted - stage.batches.of_step(stage.steps - 1):
            where = f"stages.{stage.name}." if stage.name else ""
            epochs = recipe.parts[stage.name].data.max_epochs
            steps = stage.batches.steps_for(math.floor(given))
            yield (
                f"{where}data.max_epochs: {', '.join(f'{name}: {count:g}' for name, count in epochs.items())}: leaves "
                f"{steps:,} of {counted(stage.steps, 'step', ',')}: raise it, or give {where}train.max_steps {steps}"
                if steps
                else f"{where}data.max_epochs: {', '.join(epochs)}: earlier stages leave nothing of them: raise it"
            )


def _held_out(recipe: PretrainRecipe, tokenizer: Tokenizer) -> HeldOut:
    data = recipe.data
    assert data.val is not None
    shards = open_shards(data.val, tokenizer, data, key="data.val", split="validation", workers=data.workers)
    # In one order whatever the run's seed is, so that runs can be compared.
    whole = Sequences("val", shards, data.max_length, 0, attend_across=data.attend_across)
    count = max(1, min(len(whole), data.val_tokens // data.max_length))
    return HeldOut(whole, count, shards.text_bytes / shards.tokens if shards.text_bytes else None)
