"""The recipe of `litrecipe data prepare`: text in, token shards out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from litrecipe.config.slurm import Slurm

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
LARGEST_SHARD = 2**31
"""Bytes; what lies in a shard is found by offsets of 32 bits, and one long document more must fit."""


@dataclass
class Dedup:
    """Documents that say what an earlier one says are left out."""

    exact: bool = False
    """Leave out a document that is equal to an earlier one but for case and white space."""
    near: bool = False
    """Leave out a document that is nearly equal to an earlier one: MinHash and locality-sensitive hashing, by rensa."""
    threshold: float = 0.8
    """`near`: share of n-grams two documents must have in common (the estimated Jaccard similarity)."""
    ngram: int = 5
    """`near`: words of an n-gram."""
    permutations: int = 128
    """`near`: numbers of a signature, 4 bytes each; more estimate better."""
    bands: int = 16
    """`near`: bands of the signature of which one must be equal for two documents to be compared; must divide
    `permutations`."""
    seed: int = 1
    """`near`: seeds the hash functions."""


@dataclass
class Decontaminate:
    """Documents that hold parts of evaluation sets are left out."""

    against: list[str] = field(default_factory=list)
    """Evaluation sets: `perplexity:FILE`, `exact_match:FILE`, `preference:FILE`, or files in the forms of `sources`."""
    ngram: int = 13
    """Words in a row, as GPT-3 had it (2005.14165, appendix C), that a document and an evaluation text may not share.
    A shorter text of 8 words or more is looked for as a whole; still shorter ones are not."""


@dataclass
class PrepareRecipe:
    """Turn text into token shards for pretraining."""

    sources: list[str] = field(default_factory=list)
    """Texts: files (.jsonl, .json, .parquet, .txt; .gz and .zst), folders, hub data set ids."""
    tokenizer: str = ""
    """A folder with `tokenizer.json`, or whatever `model.source` takes, whose tokenizer is meant."""
    out: str = ""
    """The folder to write."""
    columns: dict[str, str] = field(default_factory=dict)
    """Other name of the column of text: `{text: content}`."""
    txt: Literal["file", "line"] = "file"
    """What is a document in a .txt file: the whole `file`, or each `line`."""
    eos: bool = True
    """End each document with the tokenizer's end-of-text token."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Begin each document with the tokenizer's begin-of-text token; `auto` where its post-processor does."""
    min_tokens: int = 1
    """Leave out shorter documents (BOS and EOS do not count)."""
    max_tokens: int | None = None
    """Leave out longer documents."""
    dedup: Dedup = field(default_factory=Dedup)
    decontaminate: Decontaminate = field(default_factory=Decontaminate)
    slurm: Slurm = field(default_factory=Slurm)
    on_error: Literal["error", "skip"] = "error"
    """What cannot be read: `error` tells the mistakes and stops, `skip` leaves it out, counted and listed."""
    shard_size: str = "64MB"
    """Bytes of tokens in a shard, about: `64MB`, `1GiB`. A document is never cut."""
    workers: int | None = None
    """Processes that tokenise (null: as many as there are cores); the result does not depend on it."""
    schema_version: int = 1
    """Version of these keys."""


PREPARE_RANGES = {
    "min_tokens": (lambda value: value >= 1, "1 or more"),
    "max_tokens": (lambda value: value >= 1, "1 or more"),
    "workers": (lambda value: value >= 1, "1 or more, or null"),
    "dedup.threshold": (lambda value: 0 < value <= 1, "a number above 0, and at most 1"),
    "dedup.ngram": (lambda value: value >= 1, "1 or more"),
    "dedup.permutations": (lambda value: value >= 1, "1 or more"),
    "dedup.bands": (lambda value: value >= 1, "1 or more"),
    "dedup.seed": (lambda value: value >= 0, "0 or more"),
    "decontaminate.ngram": (lambda value: value >= 8, "8 or more"),
}
"""Key → what its value must fulfil, and that in words."""


def parse_size(text: str) -> int:
    """Bytes of `64MB`, `1GiB`, `500000`. ValueError for others."""
    number = text.upper().replace(" ", "")
    unit = next((unit for unit in UNITS if number.endswith(unit)), "")
    size = float(number.removesuffix(unit)) * UNITS.get(unit, 1)
    if not 1 <= size <= LARGEST_SHARD:
        raise ValueError
    return int(size)


def missing_of_prepare(recipe: PrepareRecipe) -> Iterator[tuple[str, Any, str]]:
    """What nobody can guess."""
    if not recipe.sources:
        yield "sources", "missing", "give files, folders or hub ids: `litrecipe data prepare SRC...`"
    if not recipe.tokenizer:
        yield "tokenizer", "missing", "give a folder with tokenizer.json, or a model (`--tokenizer T`)"
    if not recipe.out:
        yield "out", "missing", "give the folder to write (`--out DIR`)"


def check_prepare(recipe: PrepareRecipe) -> Iterator[tuple[str, Any, str]]:
    """Values that are more than text to us, and keys that do not go together."""
    if unknown := [name for name in recipe.columns if name != "text"]:
        yield "columns", unknown[0], "a document has one column: {text: <its name>}"
    try:
        parse_size(recipe.shard_size)
    except ValueError:
        yield "shard_size", recipe.shard_size, "give a size such as 64MB or 1GiB, at most 2GiB"
    if recipe.max_tokens is not None and recipe.max_tokens < recipe.min_tokens:
        yield "max_tokens", recipe.max_tokens, f"is below min_tokens {recipe.min_tokens}: raise it"
    dedup = recipe.dedup
    if dedup.near and dedup.permutations % dedup.bands:
        yield "dedup.bands", dedup.bands, f"must divide dedup.permutations {dedup.permutations}: give 16 for 128"
