"""Conversations → samples for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from litrecipe.config.groups import Data
from litrecipe.config.progress import counted
from litrecipe.data.formats import Conversation, RowError, read_conversations
from litrecipe.data.prepared import Counts, Kind, Prepared, Trouble, batches, prepare
from litrecipe.data.readers import Mistakes
from litrecipe.data.tokenizer import Encoded, Tokenizer
from litrecipe.model.row import Sample, Segment


@dataclass
class SupervisedCounts(Counts):
    """What became of the conversations of one source."""

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
            f"{self.source}: {self.samples_of_rows}, {counted(self.tokens, 'token')}, {self.learnt} of them "
            f"({share:.0f} %) learnt"
        ]
        said += [f"truncated to data.max_length: {self.truncated}"] if self.truncated.count else []
        said += [f"dropped as empty: {self.empty}"] if self.empty.count else []
        said += [f"dropped with nothing to learn: {self.masked}"] if self.masked.count else []
        return "; ".join(said)


def load_supervised(data: Data, tokenizer: Tokenizer, *, seed: int, max_positions: int | None = None) -> Prepared:
    """Samples for supervised fine-tuning; see `prepare`."""
    return prepare(SUPERVISED, data, tokenizer, seed=seed, max_positions=max_positions)


def _samples(
    conversations: Iterator[Conversation], data: Data, tokenizer: Tokenizer, counts: SupervisedCounts
) -> Iterator[Sample]:
    for conversation, encoded in encode_all(conversations, data, tokenizer, counts):
        if sample := make_sample(conversation.where, encoded, data, counts):
            yield sample


def encode_all(
    conversations: Iterable[Conversation], data: Data, tokenizer: Tokenizer, counts: SupervisedCounts
) -> Iterator[tuple[Conversation, Encoded]]:
    """Conversations with their tokens; notes in `counts` the empty ones it leaves out.

    Raises InputError with those that cannot be rendered, see `batches`.
    """
    mistakes = Mistakes()
    for batch in batches(conversations, counts, mistakes):
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


def make_sample(where: str, encoded: Encoded, data: Data, counts: SupervisedCounts) -> Sample | None:
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


SUPERVISED = Kind("supervised", 2, read_conversations, _samples, SupervisedCounts)
