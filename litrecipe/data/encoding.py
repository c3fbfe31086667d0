"""Texts → tokens in several processes, in order, and whatever else is to be known of a text. Imports no torch.

Shapes: n documents of a batch, T tokens of all of them, P numbers of a signature.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, TypeVar

import numpy as np
import tokenizers

from litrecipe.config import stop
from litrecipe.config.errors import InputError
from litrecipe.data.template import WRITTEN
from litrecipe.data.tokenizer import Tokenizer

AHEAD = 3
"""Batches that are under way for each process, so that none of them waits."""
PIECE = 1 << 18
"""Characters of a piece of a long text, about."""
SEAM = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
"""Where a text may be cut: before a space between two letters."""
SPLITS_BEFORE_SPACES = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    + numbers
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for numbers in ("{1,3}", "")  # Llama 3; Qwen 2
}
"""Patterns of which no match has a letter and, after it, a space, and which never look back."""

B = TypeVar("B")


@dataclass
class Encoded:
    """A batch of documents as tokens."""

    tokens: np.ndarray
    """(T,) of all documents, one after the other."""
    lengths: np.ndarray
    """(n,) int64 tokens of each."""
    features: list[Any] = field(default_factory=list)
    """What each `Feature` found of the texts."""


class Encoder:
    """From texts to tokens; can be sent to another process."""

    def __init__(
        self, tokenizer: Tokenizer, bos: Sequence[int] = (), eos: Sequence[int] = (), features: Sequence[Any] = ()
    ) -> None:
        """`bos` and `eos` begin and end each document; `features` are functions of a batch of texts."""
        self._guarded = tokenizer.backend
        self._backend = without_marks(tokenizer.backend)
        self._guard = tokenizer.template.guard
        self.bos, self.eos = list(bos), list(eos)
        self.features = list(features)
        self.dtype = token_dtype(self._backend)
        self._may_cut = may_cut(self._backend)

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Tokens of documents, in order."""
        documents = [self._tokens(text) for text in texts]
        tokens = np.concatenate(documents) if documents else np.empty(0, dtype=self.dtype)
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        return Encoded(tokens, lengths, [feature(texts) for feature in self.features])

    def _tokens(self, text: str) -> np.ndarray:
        guarded = self._guard(text)
        backend = self._backend if len(guarded) == len(text) else self._guarded
        pieces = cut(guarded) if self._may_cut else [guarded]
        ids = (backend.encode_batch_fast([piece], add_special_tokens=False)[0].ids for piece in pieces)
        return np.concatenate([np.array(part, dtype=self.dtype) for part in (self.bos, *ids, self.eos)])


def without_marks(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A `Tokenizer.backend` that does not drop marks, for texts without any: looking for them takes time."""
    state = json.loads(backend.to_str())
    first, *others = _parts(state["normalizer"], "normalizers")
    assert _drops_marks(first)
    state["normalizer"] = {"type": "Sequence", "normalizers": others} if others else None
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def token_dtype(backend: tokenizers.Tokenizer) -> np.dtype[Any]:
    """The smallest type of litdata's that holds every id: uint16, or int32."""
    largest = max(backend.get_vocab(with_added_tokens=True).values(), default=0)
    return np.dtype(np.uint16) if largest < 2**16 else np.dtype(np.int32)


def may_cut(backend: tokenizers.Tokenizer) -> bool:
    """Whether a text may be cut at a `SEAM` and its pieces tokenised one by one: the tokens are provably the same.

    They are where the text is split into words by patterns of which no match goes from a letter over a space, and which
    look at nothing before a match: then a word ends at every seam, and what comes after does not depend on what was
    before. Normalising must not move anything over a seam either, and no added token may hold one.
    """
    state = json.loads(backend.to_str())
    if state["model"]["type"] != "BPE" or state["model"].get("dropout"):
        return False
    normalizers = _parts(state["normalizer"], "normalizers")
    if any(
        part["type"] not in SMALL_NORMALIZERS and part.get("pattern") != {"String": WRITTEN} for part in normalizers
    ):
        return False
    if any((" " in one["content"] and len(one["content"]) > 1) or one["rstrip"] for one in state["added_tokens"]):
        return False
    splitters = [_splits(part) for part in _parts(state["pre_tokenizer"], "pretokenizers")]
    return None not in splitters and True in splitters


SMALL_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")


def _drops_marks(part: dict[str, Any]) -> bool:
    """Whether a normalizer is the one that `Tokenizer` puts before all others."""
    return part.get("pattern") == {"String": WRITTEN}


def _parts(state: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a sequence within sequences."""
    if state is None:
        return []
    if state["type"] != "Sequence":
        return [state]
    return [part for one in state[name] for part in _parts(one, name)]


def _splits(part: dict[str, Any]) -> bool | None:
    """Whether a step splits at every seam; None where it is not known."""
    if part["type"] == "Digits":
        return False
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return bool(part["use_regex"])  # GPT-2's pattern
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return True if part["pattern"].get("Regex") in SPLITS_BEFORE_SPACES else None
    return None


def cut(text: str) -> list[str]:
    """Pieces of a text, of about `PIECE` characters, cut at seams."""
    pieces, start = [], 0
    while start < len(text):
        seam = SEAM.search(text, start + PIECE)
        stop = seam.start() if seam else len(text)
        pieces.append(text[start:stop])
        start = stop
    return pieces


def encode_all(
    encoder: Encoder, batches: Iterable[tuple[B, Sequence[str]]], workers: int
) -> Iterator[tuple[B, Encoded]]:
    """Encode batches in that many processes; they come back in order, each with what stood beside it.

    With one worker this process does it. Raises InputError when a process was killed.
    """
    if workers == 1:
        for beside, texts in batches:
            yield beside, encoder(texts)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (encoder,))
    under_way: deque[tuple[B, Future[Encoded]]] = deque()
    try:
        for beside, texts in batches:
            under_way.append((beside, pool.submit(_encode, texts)))
            if len(under_way) > AHEAD * workers:
                first, result = under_way.popleft()
                yield first, result.result()
        for first, result in under_way:
            yield first, result.result()
    except BrokenProcessPool as error:
        cure = "give fewer of them, or more memory; the same command goes on where it was"
        raise InputError(f"workers: {workers}: one of the processes was killed: {cure}") from error
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: Encoder | None = None
"""What a worker encodes with."""


def _begin(encoder: Encoder) -> None:
    """In a worker: one thread of tokenizers, Ctrl-C is the parent's matter, and nobody outlives the parent."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop.tell_where_asked()
    _encoder = encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode(texts: Sequence[str]) -> Encoded:
    assert _encoder is not None
    return _encoder(texts)
