"""Documents that hold parts of evaluation sets: n words in a row that both have. Imports no torch.

Shapes: W words of a document, G n-grams of all evaluation texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any
from urllib.parse import parse_qsl, urlencode

import numpy as np

from litrecipe.config.prepare import Decontaminate
from litrecipe.data.documents import Input
from litrecipe.data.duplicates import WORD
from litrecipe.data.readers import Mistakes, check_sources, find_files, read_file, read_rows

TASKS = ("perplexity:", "exact_match:", "preference:")
"""Built-in tasks, whose files are meant."""
SHORTEST = 8
"""Words of the shortest text that is looked for (GPT-3's least n)."""
SPLIT = "test"
"""What is read of a folder or data set with splits, as evaluating does."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd; the n-gram of words w is hashed to the sum of hash(w_i) · FACTOR^i, modulo 2^64."""


@dataclass(frozen=True)
class EvaluationTexts:
    """n-grams of evaluation sets."""

    hashes: dict[int, np.ndarray]
    """n → (G,) uint64, ascending."""
    places: dict[int, np.ndarray]
    """n → (G,) int32, which of `where` has that n-gram."""
    words: dict[str, int]
    """Word → its hash; n-grams of other words are in no evaluation set."""
    where: list[str]
    """`file:line` of each row."""
    texts: int
    too_short: int
    """Texts of fewer than `SHORTEST` words, which are not looked for."""

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """What each text has in common with an evaluation set, in words; "" for nothing."""
        return [self._common(WORD.findall(text.lower())) for text in texts]

    def _common(self, words: list[str]) -> str:
        unknown = self.words.get
        ids = np.array([unknown(word, 0) for word in words], dtype=np.uint64)
        known = np.concatenate([[0], np.cumsum(ids != 0)])
        for n, hashes in sorted(self.hashes.items(), reverse=True):
            if len(words) < n:
                continue
            starts = np.flatnonzero(known[n:] - known[:-n] == n)
            if not len(starts):
                continue
            found = hashed(ids, starts, n)
            at = np.searchsorted(hashes, found).clip(max=len(hashes) - 1)
            hits = np.flatnonzero(hashes[at] == found)
            if len(hits):
                start = int(starts[hits[0]])
                where = self.where[self.places[n][at[hits[0]]]]
                return f"has “{' '.join(words[start : start + n])}” in common with {where}"
        return ""


def hashed(ids: np.ndarray, starts: np.ndarray, n: int) -> np.ndarray:
    """Hashes of the n-grams that begin at `starts`, of the hashes of words."""
    total = np.zeros(len(starts), dtype=np.uint64)
    for offset in range(n):
        total = total * FACTOR + ids[starts + offset]
    return total


def check_against(decontaminate: Decontaminate) -> None:
    """Raise InputError for evaluation sets that cannot be found."""
    check_sources({"decontaminate.against": [_source(spec) for spec in decontaminate.against]}, SPLIT)


def evaluation_inputs(decontaminate: Decontaminate) -> list[Input]:
    """The files of the evaluation sets."""
    inputs = []
    for spec in decontaminate.against:
        source = _source(spec)
        paths = [None] if source.startswith("toy:") else [*find_files(source, SPLIT)]
        inputs += [Input(spec, path) for path in paths]
    return inputs


def read_evaluation_texts(decontaminate: Decontaminate) -> EvaluationTexts:
    """Every text in every row of the evaluation sets. Raises InputError for rows that cannot be read."""
    mistakes = Mistakes()
    where: list[str] = []
    words: dict[str, int] = {}
    grams: dict[int, dict[int, int]] = {}
    texts = too_short = 0
    for one in evaluation_inputs(decontaminate):
        rows = read_rows(_source(one.source), mistakes) if one.path is None else None
        for row, place in rows or read_file(one.path, mistakes, whole_text=True):  # type: ignore[arg-type]
            where.append(place)
            for text in _strings(row):
                found = WORD.findall(text.lower())
                texts += 1
                too_short += len(found) < SHORTEST
                if len(found) >= SHORTEST:
                    n = min(len(found), decontaminate.ngram)
                    ids = np.array([words.setdefault(word, _hash(word)) for word in found], dtype=np.uint64)
                    of_n = grams.setdefault(n, {})
                    for value in hashed(ids, np.arange(len(found) - n + 1), n).tolist():
                        of_n.setdefault(value, len(where) - 1)
    mistakes.raise_if_any()
    hashes = {n: np.array(sorted(of_n), dtype=np.uint64) for n, of_n in grams.items()}
    places = {n: np.array([grams[n][int(one)] for one in ordered], np.int32) for n, ordered in hashes.items()}
    return EvaluationTexts(hashes, places, words, where, texts, too_short)


def _source(spec: str) -> str:
    """The data of `perplexity:FILE?window=9&split=test`, or what is no task as it stands."""
    for task in TASKS:
        if spec.startswith(task):
            source, _, query = spec.removeprefix(task).partition("?")
            choice = [(key, value) for key, value in parse_qsl(query) if key in ("split", "files")]
            return spec.removeprefix(task) if source.startswith("toy:") else _with(source, choice)
    return spec


def _with(source: str, choice: list[tuple[str, str]]) -> str:
    return f"{source}?{urlencode(choice, safe='*/')}" if choice else source


def _strings(value: Any) -> Iterator[str]:
    """All texts in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _hash(word: str) -> int:
    """64 bits, never 0."""
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little") or 1
