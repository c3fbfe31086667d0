"""Where the samples of each optimizer step come from.

For recorded data the order is a pure function of (seed, epoch, index) and the only state is a cursor, so that resuming,
another number of ranks or another packing never repeats or loses a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Train
from litrecipe.config.progress import counted, warn
from litrecipe.model.row import Sample


class StepSource(Protocol):
    """Yields the samples of one optimizer step after the other, the same on every rank."""

    def next_step(self) -> list[Sample]:
        """The samples of the next step; empty when there are no more."""
        ...

    def total_steps(self, train: Train) -> int:
        """How many steps the limits of `train` allow, with those that were taken before `load_state_dict`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        ...


class SampleList(Protocol):
    """Random access to samples whose lengths are known without reading them."""

    @property
    def lengths(self) -> Sequence[int] | np.ndarray:
        """Tokens of each sample."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Order:
    """In which order recorded things are gone through, epoch after epoch: a pure function of (seed, epoch, index)."""

    def __init__(self, count: int, *seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, cursor: int) -> int:
        """The cursor-th of the run."""
        epoch, place = divmod(cursor, self.count)
        return int(self.of_epoch(epoch)[place])

    def of_epoch(self, epoch: int) -> np.ndarray:
        """(count,) all of an epoch."""
        if self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng([*self.seed, epoch]).permutation(self.count))
        return self._epoch[1]


class RecordedSource:
    """Epochs over recorded samples, each in an order of its own; a step may span the end of an epoch.

    Raises InputError when no sample fits into a row, and warns when some do not.
    """

    def __init__(self, samples: SampleList, train: Train) -> None:
        _check_lengths(np.asarray(samples.lengths), train.micro_batch_tokens)
        self.samples = samples
        self.batch = train.global_batch_size
        self.seed = train.seed
        self.cursor = 0
        """Samples handed out since the start of the run."""
        self.steps = 0
        """Steps they made; a run that is lengthened may have a short one in its midst."""
        unlimited = train.epochs is None and train.max_steps is None and train.max_tokens is None
        epochs = 1.0 if unlimited else train.epochs
        self.limit = None if epochs is None else max(1, round(epochs * len(samples)))
        self.order = Order(len(samples), train.seed)

    def indices_from(self, cursor: int) -> list[int]:
        """The `global_batch_size` samples (fewer at the end of the last epoch) of the step that begins at a cursor."""
        stop = cursor + self.batch
        if self.limit is not None:
            stop = min(stop, self.limit)
        return [self.order[place] for place in range(cursor, stop)]

    def next_step(self) -> list[Sample]:
        """The samples of the step that begins at the cursor."""
        indices = self.indices_from(self.cursor)
        self.cursor += len(indices)
        self.steps += bool(indices)
        return [self.samples[index] for index in indices]

    def total_steps(self, train: Train) -> int:
        """The smallest of the limits `epochs`, `max_steps`, `max_tokens`."""
        limits = []
        if train.max_steps is not None:
            limits.append(train.max_steps)
        if self.limit is not None:
            limits.append(self._steps_until(self.limit))
        if train.max_tokens is not None:
            limits.append(self._steps_for_tokens(train.max_tokens))
        return min(limits)

    def _steps_until(self, cursor: int) -> int:
        """Steps of the run by which that many samples are handed out."""
        return self.steps + -(-(cursor - self.cursor) // self.batch)

    def _steps_for_tokens(self, tokens: int) -> int:
        lengths = np.asarray(self.samples.lengths)
        whole_epochs, rest = divmod(tokens, int(lengths.sum()))
        cursor = whole_epochs * len(self.samples)
        while rest > 0:
            rest -= int(lengths[self.order[cursor]])
            cursor += 1
        return max(1, self._steps_until(cursor))

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and what it depends on."""
        here = {"cursor": self.cursor, "steps": self.steps}
        return {**here, "samples": len(self.samples), "seed": self.seed, "batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the saved cursor. Raises InputError when it stands in another order of samples."""
        cure = "resume with the same, or start a new out_dir"
        if "samples" not in state:
            raise InputError(f"checkpoint.resume: the checkpoint is of another verb's run: {cure}")
        mistakes = []
        if state["samples"] != len(self.samples):
            was = state["samples"]
            mistakes.append(
                f"data.train: {counted(len(self.samples), 'sample')}: the checkpoint was made with {was}: {cure}"
            )
        if state.get("seed") != self.seed:
            mistakes.append(f"train.seed: {self.seed}: the checkpoint was made with {state.get('seed')}: {cure}")
        if state.get("batch") != self.batch:
            was = state.get("batch")
            mistakes.append(f"train.global_batch_size: {self.batch}: the checkpoint was made with {was}: {cure}")
        if mistakes:
            raise InputError(*mistakes)
        self.cursor, self.steps = state["cursor"], state["steps"]


def _check_lengths(lengths: np.ndarray, budget: int) -> None:
    too_long = int((lengths > budget).sum())
    if too_long == len(lengths):
        raise InputError(
            f"train.micro_batch_tokens: {budget}: no sample fits, the shortest has {counted(lengths.min(), 'token')}: "
            "give "
            f"{lengths.max()} for all of them to fit, or shorten them by data.max_length"
        )
    if too_long:
        warn(
            f"data.train: {too_long} of {counted(len(lengths), 'sample')} do not fit train.micro_batch_tokens {budget} "
            "and will "
            f"be skipped; the longest has {lengths.max()}"
        )
