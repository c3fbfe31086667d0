"""How data looks to a person: a sample with its loss mask, and a table of what is wrong with a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from litrecipe.config.groups import Data
from litrecipe.config.progress import counted, track
from litrecipe.data.formats import Conversation, count_rows, read_conversations
from litrecipe.data.prepared import Trouble, hold_out
from litrecipe.data.readers import Mistakes
from litrecipe.data.supervised import SupervisedCounts, encode_all, make_sample
from litrecipe.data.tokenizer import Encoded, Tokenizer
from litrecipe.model.row import Sample, Segment
from litrecipe.objectives.answers import LABEL, SCORES

LEARNT = "bold green"
CONTEXT = "dim"


def render(sample: Sample, tokenizer: Tokenizer) -> Group:
    """The text of a sample; what is learnt is green and between ⟦ ⟧, so that it shows without colours too.

    The answers to one prompt stand side by side. Control tokens are shown as they are written. A character whose bytes
    fall into several tokens is shown with its last one.
    """
    answers = [segment for segment in sample.segments if segment.parent >= 0]
    prompt = [_text(segment, tokenizer) for segment in sample.segments if segment.parent < 0]
    told = [Text(sample.id, style="bold"), *prompt]
    if not answers:
        return Group(*told, "")
    table = Table(box=box.MINIMAL, padding=0, collapse_padding=True, show_edge=False)
    for title in _titles(sample, len(answers)):
        table.add_column(title, ratio=1, overflow="fold")
    table.add_row(*(_text(segment, tokenizer) for segment in answers))
    return Group(*told, table, "")


def _text(segment: Segment, tokenizer: Tokenizer) -> Text:
    text = Text()
    stream = tokenizer.decode_stream(skip_special=False)
    learning = False
    for token, weight in zip(segment.tokens.tolist(), segment.weights.tolist(), strict=True):
        if (weight > 0) != learning:
            text.append("⟧" if learning else "⟦", style=LEARNT)
            learning = not learning
        text.append(stream.push(token), style=LEARNT if learning else CONTEXT)
    text.append(stream.finish() + ("⟧" if learning else ""), style=LEARNT if learning else CONTEXT)
    return text


def _titles(sample: Sample, answers: int) -> list[str]:
    """What stands above each answer: which one it is, and what its row says of it."""
    if LABEL in sample.extra:
        return ["good" if sample.extra[LABEL][0] else "bad"]
    names = ["chosen", "rejected"] if answers == 2 else [f"answer {place}" for place in range(1, answers + 1)]
    scores = sample.extra.get(SCORES, np.full(answers, np.nan))
    return [name if np.isnan(score) else f"{name} ({score:g})" for name, score in zip(names, scores, strict=True)]


@dataclass
class Keys:
    """What samples say, as hashes: word for word, and without case and white space. The lists are parallel."""

    exact: list[bytes] = field(default_factory=list)
    loose: list[bytes] = field(default_factory=list)
    prompts: list[bytes] = field(default_factory=list)
    """Loosely, all but the last turn."""
    places: list[str] = field(default_factory=list)
    """Where the samples stand."""

    def add(self, conversation: Conversation) -> None:
        """One more sample."""
        said = [f"{m['role']}: {m.get('content')} {m.get('tool_calls', '')}" for m in conversation.messages]
        self.exact.append(hashed(said))
        self.loose.append(hashed(map(loosely, said)))
        self.prompts.append(hashed(map(loosely, said[:-1])) if len(said) > 1 else self.loose[-1])
        self.places.append(conversation.where)

    def part(self, indices: Iterable[int]) -> Keys:
        """Those of some samples."""
        chosen = Keys()
        for index in indices:
            chosen.exact.append(self.exact[index])
            chosen.loose.append(self.loose[index])
            chosen.prompts.append(self.prompts[index])
            chosen.places.append(self.places[index])
        return chosen


@dataclass
class SourceCheck:
    """What was found in one source."""

    counts: SupervisedCounts
    lengths: list[int] = field(default_factory=list)
    """Tokens of each conversation before anything is cut off."""
    keys: Keys = field(default_factory=Keys)
    """Of the samples that are left."""
    endless: Trouble = field(default_factory=Trouble)
    """Has a turn of the assistant in which no end-of-sequence token is learnt: the model would never stop."""
    double_bos: Trouble = field(default_factory=Trouble)

    def note(self, conversation: Conversation, encoded: Encoded, data: Data, tokenizer: Tokenizer) -> None:
        """Look at one conversation."""
        ids, mask = encoded
        self.lengths.append(len(ids))
        if not _ends(ids, mask, tokenizer.eos_ids):
            self.endless.add(conversation.where)
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:
            self.double_bos.add(conversation.where)
        if make_sample(conversation.where, encoded, data, self.counts):
            self.keys.add(conversation)


def look_at(source: str, data: Data, tokenizer: Tokenizer) -> SourceCheck:
    """Read, render and tokenise a source and look at all of it. Raises InputError with all wrong rows."""
    found = SourceCheck(SupervisedCounts(source))
    mistakes = Mistakes()
    total = count_rows(source, data, mistakes)
    mistakes.raise_if_any()
    conversations = track(read_conversations(source, data), f"looking at {source}", total)
    for conversation, encoded in encode_all(conversations, data, tokenizer, found.counts):
        found.note(conversation, encoded, data, tokenizer)
    return found


def repeats(keys: Sequence[bytes], places: Sequence[str]) -> Trouble:
    """Places whose key was there before them."""
    seen: set[bytes] = set()
    repeated = Trouble()
    for key, place in zip(keys, places, strict=True):
        if key in seen:
            repeated.add(place)
        seen.add(key)
    return repeated


def leaks(keys: Sequence[bytes], places: Sequence[str], train_keys: Iterable[bytes]) -> Trouble:
    """Places of held-out samples whose key occurs in the training data."""
    known = set(train_keys)
    leaked = Trouble()
    for key, place in zip(keys, places, strict=True):
        if key in known:
            leaked.add(place)
    return leaked


def check_conversations(data: Data, tokenizer: Tokenizer, seed: int) -> list[Table]:
    """The tables that `litrecipe data check` prints: one a source, and one about leakage when data is held out."""
    train = look_at(data.train, data, tokenizer)
    tables = [_source_table("data.train", train, data)]
    if data.val:
        val = look_at(data.val, data, tokenizer)
        tables += [_source_table("data.val", val, data), _leakage_table(train.keys, val.keys)]
    elif data.val_fraction:
        kept, held_out = hold_out(len(train.keys.places), data.val_fraction, seed)
        tables.append(_leakage_table(train.keys.part(kept), train.keys.part(held_out)))
    return tables


def _source_table(key: str, found: SourceCheck, data: Data) -> Table:
    counts = found.counts
    table = Table("", "", title=f"{key}: {counts.source}", show_header=False, title_justify="left")
    table.add_row("rows", f"{counts.rows:,}")
    table.add_row("samples", f"{counts.samples:,}")
    table.add_row("tokens", f"{counts.tokens:,}")
    table.add_row("learnt tokens", f"{counts.learnt:,} ({share(counts.learnt, counts.tokens)})")
    if found.lengths:
        table.add_row("length: median, 90 %, 99 %, longest", marks(found.lengths))
    troubles = {
        f"longer than data.max_length {data.max_length} and cut": counts.truncated,
        "empty, dropped": counts.empty,
        "nothing to learn, dropped": counts.masked,
        "said before, word for word": repeats(found.keys.exact, found.keys.places),
        "said before, but for case and white space": repeats(found.keys.loose, found.keys.places),
        "a turn that is learnt without its end (EOS)": found.endless,
        "BOS twice": found.double_bos,
    }
    for what, trouble in troubles.items():
        table.add_row(what, told(trouble, counts.rows))
    return table


def _leakage_table(train: Keys, held_out: Keys) -> Table:
    count = len(held_out.places)
    table = Table("", "", title=f"held out: {counted(count, 'sample', ',')}", show_header=False, title_justify="left")
    table.add_row("also in train, word for word", told(leaks(held_out.exact, held_out.places, train.exact), count))
    table.add_row(
        "also in train, but for case and white space", told(leaks(held_out.loose, held_out.places, train.loose), count)
    )
    table.add_row("prompt also in train", told(leaks(held_out.prompts, held_out.places, train.prompts), count))
    return table


def marks(lengths: Sequence[int]) -> str:
    """Median, 90 %, 99 % and longest."""
    found = np.quantile(lengths, [0.5, 0.9, 0.99, 1.0], method="inverted_cdf").astype(int)
    return ", ".join(f"{mark:,}" for mark in found)


def told(trouble: Trouble, of: int) -> Text:
    """A cell of a table: which share of the rows, and the first of them."""
    if not trouble.count:
        return Text("none", style="green")
    return Text(f"{share(trouble.count, of)}: {trouble}", style="yellow")


def share(part: int, whole: int) -> str:
    """In per cent."""
    return f"{100 * part / max(1, whole):.1f} %"


def _ends(ids: np.ndarray, mask: np.ndarray, eos_ids: tuple[int, ...]) -> bool:
    """Whether every run of learnt tokens has an end-of-sequence token in it."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    is_eos = np.isin(ids, eos_ids)
    return all(is_eos[start:stop].any() for start, stop in edges.reshape(-1, 2))


def loosely(text: str) -> str:
    """Without case and white space."""
    return " ".join(text.casefold().split())


def hashed(said: Iterable[str]) -> bytes:
    """A short hash of some texts."""
    return blake2b("\x00".join(said).encode(), digest_size=16).digest()
