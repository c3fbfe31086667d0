"""Preferences → samples: the prompt once, and each answer as a branch of it.

Shapes: n answers of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.data.formats import RowError, is_empty
from litrecipe.data.preferences import Mismatch, Preference, read_preferences
from litrecipe.data.prepared import Counts, Kind, Prepared, Trouble, batches, prepare
from litrecipe.data.readers import Mistakes
from litrecipe.data.tokenizer import Encoded, Tokenizer
from litrecipe.model.row import Sample, Segment
from litrecipe.objectives.answers import LABEL, SCORES


@dataclass
class ComparisonCounts(Counts):
    """What became of the preferences of one source."""

    prompt_tokens: int = 0
    chosen_tokens: int = 0
    """Of the best answers, and of those labelled as good."""
    rejected_tokens: int = 0
    """Of all other answers."""
    truncated: Trouble = field(default_factory=Trouble)
    """An answer was cut to `data.max_length`; prompts are never cut."""
    no_room: Trouble = field(default_factory=Trouble)
    """Dropped: the prompt alone fills `data.max_length`."""
    empty: Trouble = field(default_factory=Trouble)
    """Dropped: a turn without a word, or too few answers that have one."""
    identical: Trouble = field(default_factory=Trouble)
    """Dropped: the answers are the same, perhaps only after cutting."""
    mismatched: Trouble = field(default_factory=Trouble)
    """Dropped: the answers belong to different prompts."""
    tied: Trouble = field(default_factory=Trouble)
    """Dropped: all answers have the same score."""

    def __str__(self) -> str:
        said = [
            f"{self.source}: {self.samples_of_rows}, {self.prompt_tokens} tokens of prompts, {self.chosen_tokens} "
            f"chosen, {self.rejected_tokens} rejected"
        ]
        befell = {
            "truncated to data.max_length": self.truncated,
            "dropped, the prompt fills data.max_length": self.no_room,
            "dropped as empty": self.empty,
            "dropped with the same answer twice": self.identical,
            "dropped with answers to different prompts": self.mismatched,
            "dropped with all answers scored alike": self.tied,
        }
        return "; ".join(said + [f"{what}: {trouble}" for what, trouble in befell.items() if trouble.count])


@dataclass(frozen=True)
class EncodedPreference:
    """A preference in tokens."""

    preference: Preference
    prompt: Sequence[int]
    """Ids of the prompt with the opening of the assistant's turn."""
    answers: list[Encoded]
    """Ids of the prompt with each answer, and what of them the assistant says."""


def load_comparisons(data: Data, tokenizer: Tokenizer, *, seed: int, max_positions: int | None = None) -> Prepared:
    """Samples for preference learning; see `prepare`."""
    return prepare(COMPARISONS, data, tokenizer, seed=seed, max_positions=max_positions)


def _samples(
    preferences: Iterator[Preference | Mismatch], data: Data, tokenizer: Tokenizer, counts: ComparisonCounts
) -> Iterator[Sample]:
    names: set[str] = set()
    for encoded in encode_preferences(preferences, tokenizer, counts):
        if sample := make_comparison(encoded, data.max_length, counts):
            names |= sample.extra.keys()
            if len(names) > 1:
                raise InputError(f"{sample.id}: single answers with a label and pairs in one source: give two sources")
            yield sample


def encode_preferences(
    preferences: Iterable[Preference | Mismatch], tokenizer: Tokenizer, counts: ComparisonCounts
) -> Iterator[EncodedPreference]:
    """Preferences in tokens; notes in `counts` those that it leaves out, whose answers belong to different prompts.

    Prompt and answer are tokenised together, never an answer alone. Raises InputError with those that cannot be
    rendered, see `batches`.
    """
    mistakes = Mistakes()
    for batch in batches(preferences, counts, mistakes):
        usable = []
        for one in batch:
            if isinstance(one, Mismatch):
                counts.mismatched.add(one.where)
            else:
                usable.append(one)
        conversations = [one.conversation(place) for one in usable for place in range(len(one.answers))]
        encoded = iter(tokenizer.encode_batch(conversations))
        for preference in usable:
            answers = list(islice(encoded, len(preference.answers)))
            whole = [answer for answer in answers if not isinstance(answer, RowError)]
            if len(whole) < len(answers):
                refusal = next(answer for answer in answers if isinstance(answer, RowError))
                mistakes.add(f"{preference.where}: {refusal}")
            else:
                yield EncodedPreference(preference, _prompt_ids(preference, tokenizer, whole[0]), whole)


def make_comparison(encoded: EncodedPreference, max_length: int, counts: ComparisonCounts) -> Sample | None:
    """The prompt as a root and the answers, best first, as its branches; None when there is nothing to compare.

    The prompt ends where prompt and answers first differ. Cutting keeps the start and never moves the prompt. Extras:
    `scores` (n,), NaN where the row tells none, or the `label` (1,) of a single answer.
    """
    where = encoded.preference.where
    start = common_prefix([encoded.prompt, *(ids for ids, _ in encoded.answers)])
    if start >= max_length:
        counts.no_room.add(where)
        return None
    branches: dict[int, Segment] = {}
    for place, (ids, mask) in enumerate(encoded.answers):
        ids, learnt = ids[start:max_length], np.flatnonzero(mask[start:max_length])
        if start and len(learnt) and not is_empty(encoded.preference.answers[place]):
            stop = learnt[-1] + 1  # what the template prints after the answer has nothing to say
            branches[place] = Segment(ids[:stop], mask[start : start + stop].astype(np.float32), parent=0)
    needed = min(2, len(encoded.answers))
    if len(branches) < needed or any(map(is_empty, encoded.preference.prompt)):
        counts.empty.add(where)
        return None
    branches = _distinct(branches)
    if len(branches) < needed:
        counts.identical.add(where)
        return None
    extra = _extra(encoded.preference, list(branches))
    if needed == 2 and np.ptp(extra[SCORES]) == 0:
        counts.tied.add(where)
        return None
    if any(len(ids) > max_length for ids, _ in encoded.answers):
        counts.truncated.add(where)
    best, *others = branches.values()
    counts.samples += 1
    counts.prompt_tokens += start
    tokens = [int(segment.weights.sum()) for segment in (best, *others)]
    good = 0 if encoded.preference.label is False else 1
    counts.chosen_tokens += sum(tokens[:good])
    counts.rejected_tokens += sum(tokens[good:])
    prompt = np.array(encoded.prompt[:start], dtype=np.int32)
    root = Segment(prompt, np.zeros(start, dtype=np.float32))
    return Sample(where, (root, best, *others), extra)


def common_prefix(sequences: Sequence[Sequence[int] | np.ndarray]) -> int:
    """How many ids all sequences begin with."""
    shortest = min(map(len, sequences))
    heads = np.array([np.asarray(ids[:shortest]) for ids in sequences])
    return int(np.append((heads != heads[0]).any(0), True).argmax())


def _prompt_ids(preference: Preference, tokenizer: Tokenizer, answer: Encoded) -> Sequence[int]:
    if tokenizer.has_template:
        return tokenizer.encode_prompt(preference.prompt)
    ids, mask = answer  # plain text: what is not the answer
    return ids[: int(mask.argmax())].tolist()


def _distinct(branches: dict[int, Segment]) -> dict[int, Segment]:
    """Without answers that a better one equals."""
    first: dict[bytes, int] = {}
    for place, segment in branches.items():
        first.setdefault(segment.tokens.tobytes(), place)
    return {place: branches[place] for place in first.values()}


def _extra(preference: Preference, kept: list[int]) -> dict[str, np.ndarray]:
    if preference.label is not None:
        return {LABEL: np.array([preference.label], dtype=np.float32)}
    scores = preference.scores or [np.nan] * len(preference.answers)
    return {SCORES: np.array([scores[place] for place in kept], dtype=np.float32)}


def prompt_of(sample: Sample) -> bytes:
    """The tokens of the prompt: pairs of one prompt are not independent, whichever answers they hold."""
    return sample.segments[0].tokens.tobytes()


COMPARISONS = Kind("comparisons", 3, read_preferences, _samples, ComparisonCounts, prompt_of)
