"""Documents as a stream to pretrain on: cut into sequences, mixed from several sources, in one stage or several.

Shapes: N documents of a source, L tokens of a sequence.

Everything is a pure function of the recipe and a few counters, so that a run resumes to the token, on any number of
ranks. An epoch of a source is its documents in an order of that epoch's own, laid end to end and cut every L tokens;
the sequences come in an order of their own again, as those of one long document would otherwise fill a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, Protocol
from zlib import crc32

import numpy as np

from litrecipe.config.errors import InputError
from litrecipe.config.progress import counted
from litrecipe.data.source import Order, SampleList
from litrecipe.model.row import Sample, Segment


class Documents(Protocol):
    """Tokenised documents that can be read in any order."""

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens and their order."""
        ...

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Some tokens of one."""
        ...


class Sequences:
    """A source's documents as sequences, epoch after epoch: a `SampleList` of its first epoch, endless by index.

    Nothing is dropped: the last sequence of an epoch has what is left. Documents do not see each other, each is a
    segment of its own; with `attend_across` a sequence is one segment, as if it were one document.
    """

    def __init__(self, name: str, documents: Documents, length: int, seed: int, *, attend_across: bool = False) -> None:
        self.name, self.documents, self.length = name, documents, length
        self.seed, self.attend_across = seed, attend_across
        self.tokens = int(documents.lengths.sum())
        """Of an epoch."""
        self.per_epoch = -(-self.tokens // length)
        """Sequences of an epoch."""
        # By its name: one source more, or less, leaves the order of the others as it is.
        of_source = seed, crc32(name.encode())
        self._documents_order = Order(len(documents.lengths), *of_source, 0)
        self._order = Order(self.per_epoch, *of_source, 1)
        self._ends: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.per_epoch

    @property
    def key(self) -> str:
        """What has a cursor of its own in a run."""
        return f"{self.name}@{self.length}:{self.documents.fingerprint[:16]}"

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence of the first epoch."""
        return np.array([self.size(index) for index in range(self.per_epoch)])

    def size(self, index: int) -> int:
        """Tokens of a sequence."""
        is_last = self._order[index] == self.per_epoch - 1
        return self.tokens - self.length * (self.per_epoch - 1) if is_last else self.length

    def __getitem__(self, index: int) -> Sample:
        """The index-th sequence of the source, counted over all epochs."""
        epoch, place = index // self.per_epoch, self._order[index]
        if self._ends[0] != epoch:
            order = self._documents_order.of_epoch(epoch)
            self._ends = epoch, np.cumsum(self.documents.lengths[order], dtype=np.int64)
        order, ends = self._documents_order.of_epoch(epoch), self._ends[1]
        cursor = self.length * place
        stop = min(cursor + self.length, self.tokens)
        pieces: list[np.ndarray] = []
        number = int(np.searchsorted(ends, cursor, side="right"))
        while cursor < stop:
            document = int(order[number])
            begin = int(ends[number]) - int(self.documents.lengths[document])
            until = min(stop, int(ends[number]))
            pieces.append(self.documents.read(document, cursor - begin, until - begin))
            cursor, number = until, number + 1
        pieces = [piece for piece in pieces if len(piece)]
        if self.attend_across:
            pieces = [np.concatenate(pieces)]
        return Sample(f"{self.name}:{epoch}:{place}", tuple(map(_segment, pieces)))


def _segment(tokens: np.ndarray) -> Segment:
    weights = np.ones(len(tokens), dtype=np.float32)
    weights[0] = 0
    return Segment(tokens, weights)


@dataclass(frozen=True)
class Batches:
    """How many samples each step of a stage has: growing evenly from `initial` over the first `warmup` steps."""

    size: int
    initial: int | None = None
    warmup: int = 0

    def of_step(self, step: int) -> int:
        """Samples of a step (0-based)."""
        if self.initial is None or step >= self.warmup:
            return self.size
        return round(self.initial + (self.size - self.initial) * step / self.warmup)

    def until(self, steps: int) -> int:
        """Samples of that many steps."""
        early = min(steps, self.warmup) if self.initial is not None else 0
        return sum(map(self.of_step, range(early))) + self.size * (steps - early)

    def steps_for(self, samples: int) -> int:
        """Fewest steps with so many samples."""
        steps = 0
        while self.initial is not None and steps < self.warmup and samples > 0:
            samples -= self.of_step(steps)
            steps += 1
        return steps + max(0, -(-samples // self.size))


class Mixture:
    """Sequences of several sources in turn, so that each has its share of the tokens at any time.

    Smooth weighted round robin: with each draw every source gains its weight, and the one that has most pays the draw.
    A source whose epochs are used up drops out, and the others share what was its.
    """

    def __init__(self, sources: Mapping[str, Sequences], weights: Mapping[str, float], epochs: Mapping[str, float]):
        self.sources = dict(sources)
        self.weights = {name: weights[name] for name in sources}
        self.limits = {
            name: max(1, round(epochs[name] * sources[name].per_epoch)) for name in epochs if name in sources
        }
        """Sequences that a source has to give, where it has not endless ones."""
        self.credits = dict.fromkeys(sources, 0.0)

    def anew(self) -> Mixture:
        """The same, with nothing drawn yet."""
        mixture = Mixture(self.sources, self.weights, {})
        mixture.limits = self.limits
        return mixture

    @property
    def of_all_sources(self) -> dict[str, Any]:
        """Keys of the recipe by which all its sources are cut and put in order."""
        reel = next(iter(self.sources.values()))
        across = reel.attend_across
        return {"data.max_length": reel.length, "data.attend_across": across, "train.seed": reel.seed}

    def draw(self, cursors: dict[str, int]) -> str | None:
        """The source of the next sequence; None where all are used up. `cursors`: what each has given so far."""
        left = [name for name in self.sources if cursors[name] < self.limits.get(name, math.inf)]
        if not left:
            return None
        total = sum(self.weights[name] for name in left)
        for name in left:
            self.credits[name] += self.weights[name] / total
        chosen = max(left, key=self.credits.__getitem__)
        self.credits[chosen] -= 1
        return chosen

    def spent(self, draws: int, before: Mapping[str, float]) -> dict[str, float]:
        """About how many sequences each source has given after so many draws, `before` by key of a source: reckoned,
        not drawn. Fewer in all where the sources are used up."""
        spent = dict.fromkeys(self.sources, 0.0)
        left = {name: self.limits.get(name, math.inf) - before.get(reel.key, 0) for name, reel in self.sources.items()}
        active = {name for name in left if left[name] > 0}
        to_draw = float(draws)
        while active and to_draw > 0:
            total = sum(self.weights[name] for name in active)
            # Until the first of them is used up, each gives by its weight.
            now = min(to_draw, min(left[name] * total / self.weights[name] for name in active))
            for name in active:
                given = now * self.weights[name] / total
                spent[name], left[name] = spent[name] + given, left[name] - given
            to_draw -= now
            active = {name for name in active if left[name] > 1e-6}
        return spent


@dataclass
class Stage:
    """One part of a pretraining, as its data goes."""

    name: str
    mixture: Mixture
    batches: Batches
    steps: int
    taught: bool = True
    """Whether a teacher says something of its samples, where the run has one."""


class Drawn:
    """All samples of a run of which a teacher says something, in the order in which it takes them, for what is to be
    known of each beforehand; drawn when they are first asked for."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        last = max((place for place, stage in enumerate(stages) if stage.taught), default=-1)
        self.stages = stages[: last + 1]
        reels = {reel.key: reel for stage in self.stages for reel in stage.mixture.sources.values()}
        self._reels, self._numbers = list(reels.values()), {key: number for number, key in enumerate(reels)}

    @cached_property
    def _drawn(self) -> np.ndarray:
        """(samples, 2) int64: number of the source, and of the sequence in it."""
        drawn: list[tuple[int, int]] = []
        cursors = dict.fromkeys(self._numbers, 0)
        for stage in self.stages:
            sources = stage.mixture.sources
            mixture = stage.mixture.anew()
            for _ in range(stage.batches.until(stage.steps)):
                name = mixture.draw({name: cursors[reel.key] for name, reel in sources.items()})
                if name is None:
                    break
                key = sources[name].key
                if stage.taught:
                    drawn.append((self._numbers[key], cursors[key]))
                cursors[key] += 1
        return np.array(drawn, dtype=np.int64).reshape(-1, 2)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each."""
        return np.array([self._reels[number].size(index) for number, index in self._drawn])

    @property
    def fingerprint(self) -> str:
        """Hash of the samples and their order."""
        parts = [(key, self._reels[number].seed) for key, number in self._numbers.items()]
        across = [reel.attend_across for reel in self._reels]
        return sha256(repr([parts, across]).encode() + self._drawn.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._drawn)

    def __getitem__(self, place: int) -> Sample:
        number, index = map(int, self._drawn[place])
        return self._reels[number][index]


class StreamSource:
    """The steps of all stages of a pretraining: a `StepSource`.

    A source goes on in a later stage where it stood, if its sequences are as long there; otherwise it begins anew, in
    an order of its own.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        self.step = 0
        """Steps handed out."""
        self.cursors = {reel.key: 0 for stage in stages for reel in stage.mixture.sources.values()}
        """Sequences that each source has given."""
        self.seen = [dict.fromkeys(stage.mixture.sources, 0) for stage in stages]
        """Tokens that each source has given to each stage."""
        self._kept: SampleList | None = None

    def place(self, step: int) -> tuple[int, int]:
        """Stage, and step in it, of a step of the run; beyond the end the last stage's."""
        for number, stage in enumerate(self.stages[:-1]):
            if step < stage.steps:
                return number, step
            step -= stage.steps
        return len(self.stages) - 1, step

    def keep(self, samples: SampleList) -> None:
        """Hand out these where a teacher teaches: `samples` with what is known of them besides, in the same order."""
        self._kept = samples

    @property
    def samples(self) -> Drawn:
        """All that a teacher says something of, in order."""
        return Drawn(self.stages)

    def next_step(self) -> list[Sample]:
        """The samples of the step that comes; empty at the end of the last stage."""
        number, step = self.place(self.step)
        stage = self.stages[number]
        samples: list[Sample] = []
        wanted = stage.batches.of_step(step) if step < stage.steps else 0
        mixture = stage.mixture
        while len(samples) < wanted:
            name = mixture.draw({name: self.cursors[reel.key] for name, reel in mixture.sources.items()})
            if name is None:
                break
            reel = mixture.sources[name]
            index = self._taught_before(number, step) + len(samples)
            kept = self._kept if stage.taught else None
            sample = reel[self.cursors[reel.key]] if kept is None else kept[index]
            self.cursors[reel.key] += 1
            self.seen[number][name] += sample.length
            samples.append(sample)
        if wanted and not samples:
            where = f"stages.{stage.name}.data" if stage.name else "data"
            raise InputError(
                f"{where}.max_epochs: all sources are used up after {step} of {counted(stage.steps, 'step')}: raise it"
            )
        self.step += bool(samples)
        return samples

    def _taught_before(self, number: int, step: int) -> int:
        """Samples before a step of a stage of which a teacher says something."""
        earlier = sum(stage.batches.until(stage.steps) for stage in self.stages[:number] if stage.taught)
        return earlier + self.stages[number].batches.until(step)

    def total_steps(self, _: Any) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def told(self) -> dict[str, float]:
        """How often each source has been gone through, and if there are several its share of the stage's tokens."""
        number, _ = self.place(max(0, self.step - 1))
        sources, seen = self.stages[number].mixture.sources, self.seen[number]
        epochs = {f"epoch/{name}": self.cursors[reel.key] / reel.per_epoch for name, reel in sources.items()}
        if len(sources) == 1:
            return dict(zip(["epoch"], epochs.values(), strict=True))
        total = max(1, sum(seen.values()))
        return {f"share/{name}": tokens / total for name, tokens in seen.items()} | epochs

    def state_dict(self) -> dict[str, Any]:
        """Counters, and what they depend on."""
        number, _ = self.place(self.step)
        return {
            "step": self.step,
            "cursors": self.cursors,
            "credits": [stage.mixture.credits for stage in self.stages],
            "seen": self.seen,
            "plan": self.plan[: number + 1],
        }

    @property
    def plan(self) -> list[dict[str, Any]]:
        """Of each stage, what says which samples come when."""
        return [
            {
                "name": stage.name,
                "steps": stage.steps,
                "train.global_batch_size": stage.batches.size,
                "train.initial_batch_size": stage.batches.initial,
                "train.batch_warmup_steps": stage.batches.warmup,
                "data.mix": {name: round(weight, 6) for name, weight in stage.mixture.weights.items()},
                "data.max_epochs": stage.mixture.limits,
                "distil.teacher": "asked" if stage.taught else "null",
                **stage.mixture.of_all_sources,
                "documents": {name: reel.documents.fingerprint[:16] for name, reel in stage.mixture.sources.items()},
            }
            for stage in self.stages
        ]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there. Raises InputError naming what is otherwise in the stages begun so far; what is still to come
        may be changed, and the last begun may be longer or shorter."""
        cure = "resume with the same, or start a new out_dir"
        if "plan" not in state:
            raise InputError(f"checkpoint.resume: the checkpoint is of another verb's run: {cure}")
        mistakes = []
        last = len(state["plan"]) - 1
        if last >= len(self.stages):
            mistakes.append(f"stages: {len(self.stages)}: the checkpoint stands in stage {last + 1}: {cure}")
        for number, (was, now) in enumerate(zip(state["plan"], self.plan, strict=False)):
            # What an older litrecipe did not note cannot be told apart.
            keys = [
                key for key in now if not (key == "steps" and number == last) and was.get(key, now[key]) != now[key]
            ]
            where = f"stages.{now['name']}." if now["name"] else ""
            mistakes += [
                f"{where}{key}: {now[key]}: the checkpoint was made with {was.get(key)}: {cure}" for key in keys
            ]
        done = state["step"] - sum(stage.steps for stage in self.stages[:last])
        if last < len(self.stages) - 1 and done > self.stages[last].steps:
            stage = self.stages[last]
            mistakes.append(
                f"stages.{stage.name}: {counted(stage.steps, 'step')}: {done} of them are done: give that many or more"
            )
        if mistakes:
            raise InputError(*mistakes)
        self.step = state["step"]
        self.cursors |= state["cursors"]
        for number, (credits, seen) in enumerate(zip(state["credits"], state["seen"], strict=False)):
            if number <= last:
                self.stages[number].mixture.credits |= credits
                self.seen[number] |= seen
