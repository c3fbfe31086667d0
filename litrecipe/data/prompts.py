"""Prompts in tokens: what a model that learns from its own answers is asked, and what is kept to judge them by.

Shapes: n tokens of a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256

import numpy as np

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.config.progress import counted, track
from litrecipe.data.formats import RowError, count_rows
from litrecipe.data.openings import Opening, read_prompts
from litrecipe.data.preferences import Mismatch
from litrecipe.data.prepared import Counts, DataReport, Trouble, batches, hold_out
from litrecipe.data.readers import Mistakes
from litrecipe.data.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Prompt(Opening):
    """What one row asks, in tokens."""

    tokens: np.ndarray
    """(n,) int32, n ≥ 1: with the opening of the assistant's turn, where a chat template prints one."""


@dataclass
class PromptCounts(Counts):
    """What became of the prompts of one source."""

    tokens: int = 0
    empty: Trouble = field(default_factory=Trouble)
    """Dropped: a turn without a word."""
    long: Trouble = field(default_factory=Trouble)
    """Dropped: longer than `data.max_length`; prompts are never cut."""
    no_room: Trouble = field(default_factory=Trouble)
    """Dropped: with the longest completion it is more than the model reads."""
    mismatched: Trouble = field(default_factory=Trouble)
    """Dropped: answers to different prompts."""
    repeated: Trouble = field(default_factory=Trouble)
    """Asked before; kept."""

    def __str__(self) -> str:
        rows = f" of {counted(self.rows, 'row')}" if self.rows != self.samples else ""
        befell = {
            "dropped as empty": self.empty,
            "dropped, longer than data.max_length": self.long,
            "dropped, no room for a completion": self.no_room,
            "dropped with answers to different prompts": self.mismatched,
            "asked before": self.repeated,
        }
        said = [f"{self.source}: {counted(self.samples, 'prompt')}{rows}, {counted(self.tokens, 'token')}"]
        return "; ".join(said + [f"{what}: {trouble}" for what, trouble in befell.items() if trouble.count])


@dataclass(frozen=True)
class PromptSet:
    """Prompts to learn from and to hold out, and what became of the rows."""

    train: list[Prompt]
    val: list[Prompt]
    """Empty where nothing is held out."""
    report: DataReport

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what is asked in training, in order, and of all that answers are judged by."""
        digest = sha256()
        for prompt in self.train:
            row = json.dumps(prompt.row, sort_keys=True, default=str)  # Parquet has dates and more
            digest.update(json.dumps([prompt.tokens.tolist(), prompt.where, row]).encode())
        return digest.hexdigest()


def load_prompts(data: Data, tokenizer: Tokenizer, *, max_new_tokens: int, max_positions: int, seed: int) -> PromptSet:
    """The prompts of `data.train` and `data.val`, or of the share `data.val_fraction` that `seed` holds out.

    Equal prompts are held out together. Every prompt has room for `max_new_tokens` within the `max_positions` that the
    model reads. Raises InputError with all wrong rows of a source, and when it leaves no prompt.
    """
    if tokenizer.template.tells_time and data.date is None:
        raise InputError(
            "data.date: missing: this model's chat template prints today's date: pin one, e.g. --data.date 2024-07-26"
        )

    def load(key: str, source: str) -> tuple[list[Prompt], PromptCounts]:
        counts = PromptCounts(source)
        mistakes = Mistakes()
        total = count_rows(source, data, mistakes, read_prompts)
        mistakes.raise_if_any()
        openings = track(read_prompts(source, data), f"tokenising {source}", total)
        prompts = list(
            _fitting(_encoded(openings, tokenizer, counts), data.max_length, max_positions, max_new_tokens, counts)
        )
        if not prompts:
            raise InputError(f"{key}: no prompt is left ({counts}): give others, or room for them (data.max_length)")
        return prompts, counts

    train, train_counts = load("data.train", data.train)
    if data.val:
        val, val_counts = load("data.val", data.val)
        return PromptSet(train, val, DataReport(train_counts, val_counts))
    if data.val_fraction:
        kept, held_out = hold_out(len(train), data.val_fraction, seed, [one.tokens.tobytes() for one in train])
        report = DataReport(train_counts, held_out=len(held_out))
        return PromptSet([train[place] for place in kept], [train[place] for place in held_out], report)
    return PromptSet(train, [], DataReport(train_counts))


def encode_prompt(opening: Opening, tokenizer: Tokenizer) -> list[int]:
    """Ids of what is asked, to be continued; raises RowError for what the chat template refuses.

    A text, and a single question where there is no chat template, is plain text after BOS.
    """
    text = opening.text
    if opening.layout == "prompt_completion" and not tokenizer.has_template:
        text = opening.messages[0]["content"]
    if text is None:
        return tokenizer.encode_prompt(opening.messages, opening.tools)
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return bos + tokenizer.encode(text)


def _encoded(
    openings: Iterator[Opening | Mismatch], tokenizer: Tokenizer, counts: PromptCounts
) -> Iterator[tuple[Opening, np.ndarray]]:
    """What is asked with its tokens, but for what is empty; raises InputError with all that cannot be rendered."""
    mistakes = Mistakes()
    for batch in batches(openings, counts, mistakes):
        for opening in batch:
            if isinstance(opening, Mismatch):
                counts.mismatched.add(opening.where)
            elif opening.is_empty:
                counts.empty.add(opening.where)
            else:
                try:
                    yield opening, np.array(encode_prompt(opening, tokenizer), dtype=np.int32)
                except RowError as error:
                    mistakes.add(f"{opening.where}: {error}")


def _fitting(
    encoded: Iterator[tuple[Opening, np.ndarray]],
    max_length: int,
    max_positions: int,
    max_new_tokens: int,
    counts: PromptCounts,
) -> Iterator[Prompt]:
    seen: set[bytes] = set()
    for opening, tokens in encoded:
        if not len(tokens):
            counts.empty.add(opening.where)
        elif len(tokens) > max_length:
            counts.long.add(opening.where)
        elif len(tokens) + max_new_tokens > max_positions:
            counts.no_room.add(opening.where)
        else:
            counts.samples += 1
            counts.tokens += len(tokens)
            if tokens.tobytes() in seen:
                counts.repeated.add(opening.where)
            seen.add(tokens.tobytes())
            yield Prompt(opening.where, opening.messages, opening.text, opening.row, opening.tools, tokens)
