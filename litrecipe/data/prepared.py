"""Rows of any kind → tokenised samples, once: read, check, render, tokenise, keep under a hash of all that matters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np

from litrecipe import __version__
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.config.progress import counted, track, warn
from litrecipe.data.cache import alone, cache_folder, key_of
from litrecipe.data.formats import Reader, count_rows
from litrecipe.data.readers import Mistakes, source_hash
from litrecipe.data.samples import SampleSet, is_complete
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.model.row import Sample

BATCH = 1000
"""Rows tokenised at once."""
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
    """What became of the rows of one source; each kind of data adds its own. `str` is a line for people."""

    source: str
    rows: int = 0
    samples: int = 0

    @property
    def samples_of_rows(self) -> str:
        """`7 samples of 9 rows`, or `7 samples` where each row gave one."""
        return f"{counted(self.samples, 'sample')}" + (
            f" of {counted(self.rows, 'row')}" if self.rows != self.samples else ""
        )

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Self:
        """What `asdict` made."""
        values: dict[str, Any] = {
            name: Trouble(**value) if isinstance(value, dict) else value for name, value in state.items()
        }
        return cls(**values)


C = TypeVar("C", bound=Counts)
R = TypeVar("R")


@dataclass(frozen=True)
class Kind(Generic[C]):
    """How rows of one kind become samples."""

    name: str
    """Names its folder in the cache."""
    version: int
    """Raise it when the same inputs give other samples, or other files."""
    read: Reader
    make: Callable[[Iterator[Any], Data, Tokenizer, C], Iterator[Sample]]
    """Parsed rows → samples, with a note in the counts of what became of each row."""
    counts: type[C]
    same: Callable[[Sample], bytes] | None = None
    """What samples have in common that must not be both trained on and held out."""


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
            said[0] += f"; {counted(self.held_out, 'sample')} of it held out"
        if self.val is not None:
            said.append(f"val   {self.val}")
        return "\n".join(said)


@dataclass(frozen=True)
class Prepared:
    """Samples to train on and to hold out, and what became of the rows."""

    train: SampleSet
    val: SampleSet | None
    report: DataReport


def prepare(
    kind: Kind[Any], data: Data, tokenizer: Tokenizer, *, seed: int, max_positions: int | None = None
) -> Prepared:
    """The samples of `data.train` and `data.val`, tokenised now or when they were first asked for.

    Several processes may ask at once: one writes, the others wait. `seed` decides which samples `data.val_fraction`
    holds out; `max_positions` is the model's context. Raises InputError with all wrong rows of a source, when nothing
    in it can be learnt, or when a sample is longer than the context.
    """
    if tokenizer.template.tells_time and data.date is None:
        raise InputError(
            "data.date: missing: this model's chat template prints today's date: pin one, e.g. --data.date 2024-07-26"
        )
    loaded = _load(kind, data, tokenizer, seed)
    longest = max(part.lengths.max() for part in (loaded.train, loaded.val) if part is not None)
    if max_positions is not None and longest > max_positions:
        raise InputError(
            f"data.max_length: {data.max_length}: the model's context is {max_positions} tokens, the longest sample "
            f"has {longest}: give {max_positions} or less"
        )
    return loaded


def _load(kind: Kind[Any], data: Data, tokenizer: Tokenizer, seed: int) -> Prepared:
    train, train_counts = _load_source(kind, "data.train", data.train, data, tokenizer)
    if data.val:
        val, val_counts = _load_source(kind, "data.val", data.val, data, tokenizer)
        return Prepared(train, val, DataReport(train_counts, val_counts))
    if data.val_fraction:
        same = [kind.same(train[place]) for place in range(len(train))] if kind.same else None
        kept, held_out = hold_out(len(train), data.val_fraction, seed, same)
        report = DataReport(train_counts, held_out=len(held_out))
        return Prepared(train.subset(kept), train.subset(held_out), report)
    return Prepared(train, None, DataReport(train_counts))


def hold_out(
    count: int, fraction: float, seed: int, same: Sequence[bytes] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Split range(count) into what is trained on and what is held out (at least one of each), both ascending.

    Those for which `same` says the same stay together; then as many of these groups are held out as hold the share.
    """
    groups = np.arange(count) if same is None else np.unique(np.array(same, dtype=object), return_inverse=True)[1]
    sizes = np.bincount(groups, minlength=1)
    if len(sizes) < 2:
        what = "sample" if same is None else "prompt"
        raise InputError(f"data.val_fraction: {fraction}: one {what} cannot be split: give data.val")
    order = np.random.default_rng([seed, 0x5E1D]).permutation(len(sizes))
    reached = np.cumsum(sizes[order])
    held = min(max(1, int(np.searchsorted(reached, round(count * fraction))) + 1), len(sizes) - 1)
    is_held = np.isin(groups, order[:held])
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def _load_source(kind: Kind[C], key: str, source: str, data: Data, tokenizer: Tokenizer) -> tuple[SampleSet, C]:
    cache_key = key_of(
        [kind.version, __version__, source, source_hash(source), tokenizer.fingerprint],
        [data.format, data.columns, data.max_length, data.mask],
    )
    folder = cache_folder(data) / kind.name / cache_key
    samples = kept(folder, lambda: _tokenise_into(kind, folder, source, data, tokenizer))
    counts = kind.counts.from_json(samples.about)
    if not len(samples):
        raise InputError(f"{key}: nothing in it can be learnt ({counts}): look at it with `litrecipe data preview`")
    return samples, counts


def kept(folder: Path, make: Callable[[], SampleSet]) -> SampleSet:
    """The samples of a folder of the cache, made now where they are missing or damaged; one process makes them."""
    with alone(folder):
        if is_complete(folder):
            try:
                return SampleSet(folder)
            except InputError as error:
                warn(f"what was kept in the cache is damaged and made anew ({error})")
        return make()


def _tokenise_into(kind: Kind[C], folder: Path, source: str, data: Data, tokenizer: Tokenizer) -> SampleSet:
    mistakes = Mistakes()
    total = count_rows(source, data, mistakes, kind.read)
    mistakes.raise_if_any()
    rows = track(kind.read(source, data), f"tokenising {source}", total)
    counts = kind.counts(source)
    return SampleSet.write(folder, kind.make(rows, data, tokenizer, counts), about=lambda: asdict(counts))


def batches(rows: Iterable[R], counts: Counts, mistakes: Mistakes) -> Iterator[list[R]]:
    """Parsed rows to tokenise, some at a time and counted; whoever takes them notes in `mistakes` what cannot be done.

    The mistakes are raised together as InputError, at the end or once there are many: a broken chat template, slow
    perhaps, would refuse all rows.
    """
    rows = iter(rows)
    while batch := list(islice(rows, BATCH if counts.rows else Mistakes.SHOWN)):
        counts.rows += len(batch)
        yield batch
        if mistakes.count >= Mistakes.SHOWN:
            raise InputError(*mistakes.shown, "… and perhaps more: the rows after these were not looked at")
    mistakes.raise_if_any()
