"""Documents that are equal to an earlier one but for case and white space, or nearly equal. Imports no torch."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from typing import Any

from litrecipe.config.errors import InputError
from litrecipe.config.prepare import Dedup

WORD = re.compile(r"\w+")
DIGEST = 16
"""Bytes of a digest: among 10^12 documents two different ones have the same with a chance of 10^-15."""


@dataclass(frozen=True)
class Mark:
    """What is remembered of a document."""

    digest: bytes = b""
    """Of the text in lower case, each run of white space one space."""
    sketch: bytes = b""
    """rensa's MinHash of its n-grams of words."""


class Marks:
    """Texts → marks; runs in the processes that tokenise."""

    def __init__(self, dedup: Dedup) -> None:
        """Raises InputError where what it needs is not installed."""
        if dedup.near and find_spec("rensa") is None:
            raise InputError("dedup.near: true: rensa is not installed: `pip install 'litrecipe[dedup]'`")
        self.dedup = dedup

    def __call__(self, texts: Sequence[str]) -> list[Mark]:
        return [self._mark(text) for text in texts]

    def _mark(self, text: str) -> Mark:
        dedup = self.dedup
        digest = blake2b(" ".join(text.lower().split()).encode(), digest_size=DIGEST).digest() if dedup.exact else b""
        if not dedup.near:
            return Mark(digest)
        words = WORD.findall(text.lower())
        last = max(1, len(words) - dedup.ngram + 1)  # a text of fewer words is one n-gram
        sketch = _sketch(dedup)
        sketch.update([" ".join(words[start : start + dedup.ngram]) for start in range(last)])
        return Mark(digest, sketch.__getstate__())


def _sketch(dedup: Dedup) -> Any:
    from rensa import RMinHash

    return RMinHash(num_perm=dedup.permutations, seed=dedup.seed)


class Duplicates:
    """The marks of all documents that were kept, and whether one is a duplicate of theirs."""

    def __init__(self, dedup: Dedup) -> None:
        self.dedup = dedup
        self._exact: dict[bytes, int] = {}
        self._sketches: dict[int, Any] = {}
        self._near: Any = None
        if dedup.near:
            from rensa import RMinHashLSH

            self._near = RMinHashLSH(threshold=dedup.threshold, num_perm=dedup.permutations, num_bands=dedup.bands)

    def original(self, mark: Mark) -> tuple[str, int] | None:
        """What kind of duplicate it is, and the number of the document that it is one of; None where it is new.

        The first that is near enough is named: similarity is what their sketches estimate.
        """
        if self.dedup.exact and mark.digest in self._exact:
            return "exact_duplicate", self._exact[mark.digest]
        if self._near is not None:
            sketch = self._read(mark)
            for number in sorted(self._near.query(sketch)):
                if self._sketches[number].jaccard(sketch) >= self.dedup.threshold:
                    return "near_duplicate", number
        return None

    def keep(self, number: int, mark: Mark) -> None:
        """Remember a document that is new."""
        if self.dedup.exact:
            self._exact[mark.digest] = number
        if self._near is not None:
            self._sketches[number] = self._read(mark)
            self._near.insert(number, self._sketches[number])

    def _read(self, mark: Mark) -> Any:
        sketch = _sketch(self.dedup)
        sketch.__setstate__(mark.sketch)
        return sketch


def marks_to_json(marks: Sequence[Mark]) -> list[list[str]]:
    """Marks as they are kept with the state."""
    return [[b64encode(part).decode() for part in (mark.digest, mark.sketch)] for mark in marks]


def marks_from_json(kept: Sequence[Sequence[str]]) -> list[Mark]:
    """What `marks_to_json` wrote."""
    return [Mark(b64decode(digest), b64decode(sketch)) for digest, sketch in kept]
