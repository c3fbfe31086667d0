"""Conversations → tokenised samples, once: read, check, render, tokenise, and keep under a hash of all that matters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from litrecipe import __version__
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.config.progress import track, warn
from litrecipe.data.cache import alone, cache_folder, key_of
from litrecipe.data.formats import Conversation, RowError, count_rows, read_conversations
from litrecipe.data.readers import Mistakes, source_hash
from litrecipe.data.samples import SampleSet, is_complete
from litrecipe.data.tokenizer import Encoded, Tokenizer
from litrecipe.model.row import Sample, Segment

CACHE_VERSION = 2
"""Raise it when the same inputs give other samples, or other files."""
BATCH = 1000
"""Conversations tokenised at once."""
NAMED = 5
"""Places remembered for each kind of trouble."""


@dataclass
class Trouble:
    """How many rows something befell, and where the first of them are."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        """One more."""
        self.count += 1
        if self.count <= NAMED:
            self.first.append(where)

    def __str__(self) -> str:
        names = ", ".join(where.rpartition("/")[2] for where in self.first)
        return f"{self.count} ({names}{', …' if self.count > NAMED else ''})"


@dataclass
class Counts:
    """What became of the rows of one source."""

    source: str
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    learnt: int = 0
    """Tokens that are learnt."""
    truncated: Trouble = field(default_factory=Trouble)
    """Cut to `data.max_length`."""
    empty: Trouble = field(default_factory=Trouble)
    """Dropped: a turn without a word, or fewer than two tokens."""
    masked: Trouble = field(default_factory=Trouble)
    """Dropped: nothing to learn, or nothing left of it after cutting."""

    def __str__(self) -> str:
        share = 100 * self.learnt / max(1, self.tokens)
        said = [
            f"{self.source}: {self.samples} samples"
            + (f" of {self.rows} rows" if self.rows != self.samples else "")
            + f", {self.tokens} tokens, {self.learnt} of them ({share:.0f} %) learnt"
        ]
        said += [f"truncated to data.max_length: {self.truncated}"] if self.truncated.count else []
        said += [f"dropped as empty: {self.empty}"] if self.empty.count else []
        said += [f"dropped with nothing to learn: {self.masked}"] if self.masked.count else []
        return "; ".join(said)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Counts:
        """What `asdict` made."""
        troubles = {name: Trouble(**state[name]) for name in ("truncated", "empty", "masked")}
        return cls(**{**state, **troubles})


@dataclass(frozen=True)
class DataReport:
    """Counts of the training data and of the held-out data, and how many samples of the former were held out."""

    train: Counts
    val: Counts | None = None
    held_out: int = 0

    def __str__(self) -> str:
        """A line for each source."""
        said = [f"train {self.train}"]
        if self.held_out:
            said[0] += f"; {self.held_out} samples of it held out"
        if self.val is not None:
            said.append(f"val   {self.val}")
        return "\n".join(said)


@dataclass(frozen=True)
class Supervised:
    """Data for supervised fine-tuning."""

    train: SampleSet
    val: SampleSet | None
    report: DataReport


def load_supervised(data: Data, tokenizer: Tokenizer, *, seed: int, max_positions: int | None = None) -> Supervised:
    """The samples of `data.train` and `data.val`, tokenised now or when they were first asked for.

    Several processes may ask at once: one writes, the others wait. `seed` decides which samples `data.val_fraction`
    holds out; `max_positions` is the model's context. Raises InputError with all wrong rows of a source, when nothing
    in it can be learnt, or when a sample is longer than the context.
    """
    if tokenizer.template.tells_time and data.date is None:
        raise InputError(
            "data.date: missing: this model's chat template prints today's date: pin one, e.g. --data.date 2024-07-26"
        )
    loaded = _load(data, tokenizer, seed)
    longest = max(part.lengths.max() for part in (loaded.train, loaded.val) if part is not None)
    if max_positions is not None and longest > max_positions:
        raise InputError(
            f"data.max_length: {data.max_length}: the model's context is {max_positions} tokens, the longest sample "
            f"has {longest}: give {max_positions} or less"
        )
    return loaded


def _load(data: Data, tokenizer: Tokenizer, seed: int) -> Supervised:
    train, train_counts = _load_source("data.train", data.train, data, tokenizer)
    if data.val:
        val, val_counts = _load_source("data.val", data.val, data, tokenizer)
        return Supervised(train, val, DataReport(train_counts, val_counts))
    if data.val_fraction:
        kept, held_out = hold_out(len(train), data.val_fraction, seed)
        report = DataReport(train_counts, held_out=len(held_out))
        return Supervised(train.subset(kept), train.subset(held_out), report)
    return Supervised(train, None, DataReport(train_counts))


def hold_out(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split range(count) into what is trained on and what is held out (at least one of each), both ascending."""
    if count < 2:
        raise InputError(f"data.val_fraction: {fraction}: {count} sample cannot be split: give data.val")
    held = min(max(1, round(count * fraction)), count - 1)
    order = np.random.default_rng([seed, 0x5E1D]).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


def _load_source(key: str, source: str, data: Data, tokenizer: Tokenizer) -> tuple[SampleSet, Counts]:
    cache_key = key_of(
        [CACHE_VERSION, __version__, source, source_hash(source), tokenizer.fingerprint],
        [data.format, data.columns, data.max_length, data.mask],
    )
    folder = cache_folder(data) / "supervised" / cache_key
    with alone(folder):
        samples = _open(folder)
        if samples is None:
            samples = _tokenise_into(folder, source, data, tokenizer)
    counts = Counts.from_json(samples.about)
    if not len(samples):
        raise InputError(f"{key}: nothing in it can be learnt ({counts}): look at it with `litrecipe data preview`")
    return samples, counts


def _open(folder: Path) -> SampleSet | None:
    if not is_complete(folder):
        return None
    try:
        return SampleSet(folder)
    except InputError as error:
        warn(f"tokenised data is damaged and made anew ({error})")
        return None


def _tokenise_into(folder: Path, source: str, data: Data, tokenizer: Tokenizer) -> SampleSet:
    mistakes = Mistakes()
    total = count_rows(source, data, mistakes)
    mistakes.raise_if_any()
    conversations = track(read_conversations(source, data), f"tokenising {source}", total)
    counts = Counts(source)
    return SampleSet.write(folder, _samples(conversations, data, tokenizer, counts), about=lambda: asdict(counts))


def _samples(
    conversations: Iterator[Conversation], data: Data, tokenizer: Tokenizer, counts: Counts
) -> Iterator[Sample]:
    for conversation, encoded in encode_all(conversations, data, tokenizer, counts):
        if sample := make_sample(conversation.where, encoded, data, counts):
            yield sample


def encode_all(
    conversations: Iterable[Conversation], data: Data, tokenizer: Tokenizer, counts: Counts
) -> Iterator[tuple[Conversation, Encoded]]:
    """Conversations with their tokens, a batch at a time; notes in `counts` the rows and the empty ones it leaves out.

    Those that cannot be rendered are raised together as InputError, at the end or once there are many: a broken chat
    template, slow perhaps, would refuse all rows.
    """
    mistakes = Mistakes()
    conversations = iter(conversations)
    while batch := list(islice(conversations, BATCH if counts.rows else Mistakes.SHOWN)):
        counts.rows += len(batch)
        spoken = []
        for conversation in batch:
            if conversation.empty_turn is None:
                spoken.append(conversation)
            else:
                counts.empty.add(conversation.where)
        for conversation, encoded in zip(spoken, tokenizer.encode_batch(spoken, data.mask), strict=True):
            if isinstance(encoded, RowError):
                mistakes.add(f"{conversation.where}: {encoded}")
            else:
                yield conversation, encoded
        if mistakes.count >= Mistakes.SHOWN:
            raise InputError(*mistakes.shown, "… and perhaps more: the rows after these were not looked at")
    mistakes.raise_if_any()


def make_sample(where: str, encoded: Encoded, data: Data, counts: Counts) -> Sample | None:
    """One conversation as a sample, cut to `data.max_length`; None when nothing of it can be learnt."""
    ids, mask = encoded
    if len(ids) > data.max_length:
        counts.truncated.add(where)
        ids, mask = ids[: data.max_length], mask[: data.max_length]
    if len(ids) < 2:
        counts.empty.add(where)
        return None
    weights = mask.astype(np.float32)
    weights[0] = 0  # nothing predicts the first token
    learnt = int(weights.sum())
    if not learnt:
        counts.masked.add(where)
        return None
    counts.samples += 1
    counts.tokens += len(ids)
    counts.learnt += learnt
    return Sample(where, (Segment(ids, weights),))
