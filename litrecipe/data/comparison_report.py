"""What is wrong with a set of preferences, as `litrecipe data check` tells it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from rich.table import Table

from litrecipe.config.groups import Data
from litrecipe.config.progress import counted, track
from litrecipe.data.comparisons import (
    ComparisonCounts,
    EncodedPreference,
    encode_preferences,
    make_comparison,
    prompt_of,
)
from litrecipe.data.formats import count_rows
from litrecipe.data.preferences import Preference, read_preferences
from litrecipe.data.prepared import hold_out
from litrecipe.data.readers import Mistakes
from litrecipe.data.report import hashed, leaks, loosely, marks, repeats, share, told
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.objectives.answers import LABEL


@dataclass
class ComparisonCheck:
    """What was found in one source. The lists are parallel, an entry a sample that is left."""

    counts: ComparisonCounts
    prompts: list[bytes] = field(default_factory=list)
    """Loosely, as hashes."""
    pairs: list[bytes] = field(default_factory=list)
    """Prompt, best and worst answer."""
    reversed_pairs: list[bytes] = field(default_factory=list)
    """The same with the answers exchanged."""
    roots: list[bytes] = field(default_factory=list)
    """Prompts as the samples have them."""
    places: list[str] = field(default_factory=list)
    prompt_lengths: list[int] = field(default_factory=list)
    best: list[int] = field(default_factory=list)
    """Tokens of the best answer."""
    worst: list[int] = field(default_factory=list)

    def note(self, encoded: EncodedPreference, data: Data) -> None:
        """Look at one preference."""
        sample = make_comparison(encoded, data.max_length, self.counts)
        if sample is None:
            return
        preference = encoded.preference
        prompt, answers = _prompt(preference), [str(answer.get("content")) for answer in preference.answers]
        self.prompts.append(hashed([prompt]))
        self.pairs.append(hashed([prompt, loosely(answers[0]), loosely(answers[-1])]))
        self.reversed_pairs.append(hashed([prompt, loosely(answers[-1]), loosely(answers[0])]))
        self.roots.append(prompt_of(sample))
        self.places.append(sample.id)
        self.prompt_lengths.append(len(sample.segments[0].tokens))
        if LABEL not in sample.extra:
            self.best.append(len(sample.segments[1].tokens))
            self.worst.append(len(sample.segments[-1].tokens))


def look_at(source: str, data: Data, tokenizer: Tokenizer) -> ComparisonCheck:
    """Read, render and tokenise a source and look at all of it. Raises InputError with all wrong rows."""
    found = ComparisonCheck(ComparisonCounts(source))
    mistakes = Mistakes()
    total = count_rows(source, data, mistakes, read_preferences)
    mistakes.raise_if_any()
    preferences = track(read_preferences(source, data), f"looking at {source}", total)
    for encoded in encode_preferences(preferences, tokenizer, found.counts):
        found.note(encoded, data)
    return found


def check_comparisons(data: Data, tokenizer: Tokenizer, seed: int) -> list[Table]:
    """The tables that `litrecipe data check` prints: one a source, and one about leakage when data is held out."""
    train = look_at(data.train, data, tokenizer)
    tables = [_source_table("data.train", train)]
    if data.val:
        val = look_at(data.val, data, tokenizer)
        tables += [_source_table("data.val", val), _leakage_table(train.prompts, val.prompts, val.places)]
    elif data.val_fraction:
        kept, held_out = hold_out(len(train.places), data.val_fraction, seed, train.roots)
        prompts = [train.prompts[place] for place in held_out]
        places = [train.places[place] for place in held_out]
        tables.append(_leakage_table([train.prompts[place] for place in kept], prompts, places))
    return tables


def _source_table(key: str, found: ComparisonCheck) -> Table:
    counts = found.counts
    table = Table("", "", title=f"{key}: {counts.source}", show_header=False, title_justify="left")
    table.add_row("rows", f"{counts.rows:,}")
    table.add_row("samples", f"{counts.samples:,}")
    table.add_row(
        "tokens: prompts, chosen, rejected",
        f"{counts.prompt_tokens:,}, {counts.chosen_tokens:,}, {counts.rejected_tokens:,}",
    )
    lengths = {"prompt": found.prompt_lengths, "best answer": found.best, "worst answer": found.worst}
    for what, values in lengths.items():
        if values:
            table.add_row(f"{what}: median, 90 %, 99 %, longest", marks(values))
    if found.best:
        table.add_row("the longer answer is the better one", _longer_wins(found))
    troubles = {
        "cut to data.max_length": counts.truncated,
        "the prompt fills data.max_length, dropped": counts.no_room,
        "empty, dropped": counts.empty,
        "the same answer twice, dropped": counts.identical,
        "answers to different prompts, dropped": counts.mismatched,
        "all answers scored alike, dropped": counts.tied,
        "the same pair again": repeats(found.pairs, found.places),
        "the same pair the other way round": leaks(found.reversed_pairs, found.places, found.pairs),
    }
    for what, trouble in troubles.items():
        table.add_row(what, told(trouble, counts.rows))
    return table


def _longer_wins(found: ComparisonCheck) -> str:
    """How far the choice goes by length alone; ties count half."""
    best, worst = np.array(found.best), np.array(found.worst)
    return share(int((2 * (best > worst) + (best == worst)).sum()), 2 * len(best))


def _leakage_table(train: list[bytes], held_out: list[bytes], places: list[str]) -> Table:
    table = Table(
        "", "", title=f"held out: {counted(len(places), 'sample', ',')}", show_header=False, title_justify="left"
    )
    table.add_row("prompt also in train", told(leaks(held_out, places, train), len(places)))
    return table


def _prompt(preference: Preference) -> str:
    return loosely("\n".join(f"{message['role']}: {message.get('content')}" for message in preference.prompt))
