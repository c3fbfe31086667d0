"""Token shards, read: documents as runs of tokens, through memory maps. Imports no torch.

Shapes: N documents, T tokens of all of them.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from litrecipe.checkpoint.manifest import MANIFEST, entries_of, sha256_of, user_cache
from litrecipe.config.errors import InputError
from litrecipe.config.files import read_json, refuse_links_out
from litrecipe.config.groups import Data
from litrecipe.config.prepare import PrepareRecipe
from litrecipe.config.progress import warn
from litrecipe.data.cache import alone, cache_folder, key_of
from litrecipe.data.documents import Documents
from litrecipe.data.prepare import KIND, prepare, settings_of
from litrecipe.data.readers import check_sources
from litrecipe.data.shard_files import DTYPES, INDEX, read_head
from litrecipe.data.tokenizer import Tokenizer

OPEN = 64
"""Shards that are mapped at once; each holds a file open."""
CURE = "prepare it anew, or fetch it again"


class Shards:
    """A folder of token shards: of `litrecipe data prepare`, or of litdata's `optimize` from 1-d integer tensors."""

    def __init__(self, folder: str | Path) -> None:
        """Open it: the heads of all shards are looked at, their tokens are not. Raises InputError naming the file that
        is missing, cut or damaged."""
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = _manifest(self.folder)
        """What `litrecipe data prepare` wrote of it; empty for a folder of another program."""
        index = read_json(self.folder / INDEX)
        self._names, dtype, sizes = _read_index(self.folder, index)
        self._dtype = np.dtype(dtype)
        refuse_links_out(self.folder, [INDEX, *self._names])
        mistakes, offsets = [], []
        for name, documents in zip(self._names, sizes, strict=True):
            try:
                offsets.append(read_head(self.folder / name, documents))
            except InputError as error:
                mistakes += error.mistakes
        if mistakes:
            raise InputError(*mistakes)
        self._starts = np.concatenate([each[:-1] for each in offsets])
        """(N,) where a document begins in its file, bytes."""
        self.lengths: np.ndarray = np.concatenate([np.diff(each) for each in offsets]) // self._dtype.itemsize
        """(N,) int64 tokens of each document."""
        self._first = np.cumsum([0, *sizes])
        """The first document of each shard, and N."""
        self.tokens = int(self.lengths.sum())
        """T."""
        self.text_bytes = int(self.manifest.get("text_bytes", 0))
        """Bytes of UTF-8 that the documents were; 0 where that is not known."""
        self.tokenizer_fingerprint = str(self.manifest.get("tokenizer", {}).get("fingerprint", ""))
        """`Tokenizer.text_fingerprint` of the tokenizer that made them; "" where that is not known."""
        self.known_ids: int | None = None
        """Ids that there are, where each token is to be held against that: of shards without a manifest."""
        self._map = lru_cache(OPEN)(self._open)

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """(stop - start,) int64 tokens of a document, or all of them."""
        length = int(self.lengths[document])
        start, stop, _ = slice(start, stop).indices(length)
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        first = int(self._starts[document]) + start * self._dtype.itemsize
        part = self._map(shard)[first : first + max(0, stop - start) * self._dtype.itemsize]
        tokens = part.view(self._dtype).astype(np.int64)
        if self.known_ids is not None and len(tokens) and tokens.max() >= self.known_ids:
            said = f"document {document} has the id {tokens.max()}, the tokenizer {self.known_ids} ids"
            raise InputError(f"{self.folder}: {said}: give the tokenizer that these shards were made with")
        return tokens

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the tokens, their documents and their order."""
        return str(self.manifest.get("fingerprint") or key_of([sha256_of(self.folder / name) for name in self._names]))

    def verify(self) -> None:
        """Hash the shards, once for each state of their files: it is remembered. Raises InputError for altered ones."""
        mistakes = []
        for name, entry in self.manifest.get("files", {}).items():
            path = self.folder / name
            stat = path.stat()
            key = key_of(str(path.resolve()), stat.st_size, stat.st_mtime_ns, entry["sha256"])
            remembered = user_cache() / "verified" / key
            if remembered.exists():
                continue
            if sha256_of(path) != entry["sha256"]:
                mistakes.append(f"{path}: altered: its sha256 is not the one in {MANIFEST}: {CURE}")
                continue
            remembered.parent.mkdir(parents=True, exist_ok=True)
            remembered.touch()
        if mistakes:
            raise InputError(*mistakes)

    def _open(self, shard: int) -> np.ndarray:
        return np.memmap(self.folder / self._names[shard], dtype=np.uint8, mode="r")


def _manifest(folder: Path) -> dict[str, Any]:
    if entries_of(folder) is None:
        return {}
    manifest = read_json(folder / MANIFEST)
    if manifest.get("kind") != KIND:
        raise InputError(f"{folder}: holds no token shards: give a folder that `litrecipe data prepare` wrote")
    return manifest


def _read_index(folder: Path, index: dict[str, Any]) -> tuple[list[str], Any, list[int]]:
    """Names of the chunks, type of their tokens, documents in each."""
    path = folder / INDEX
    try:
        chunks, config = index["chunks"], index["config"]
        names = [str(chunk["filename"]) for chunk in chunks]
        sizes = [int(chunk["chunk_size"]) for chunk in chunks]
        formats = list(config["data_format"]) if config else []
        compression = config.get("compression") if config else None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}: not an index of litdata's: {CURE}") from error
    if not chunks:
        raise InputError(f"{path}: has no shards in it: {CURE}")
    if len(formats) != 1 or formats[0] not in DTYPES or compression:
        what = f"{compression}, " if compression else ""
        raise InputError(f"{path}: {what}{', '.join(formats)}: shards of 1-d integer tensors, uncompressed, are read")
    return names, DTYPES[formats[0]], sizes


def is_prepared(source: str) -> bool:
    """Whether a source is a folder of shards, not text."""
    return (Path(source).expanduser() / INDEX).is_file()


def open_shards(
    source: str,
    tokenizer: Tokenizer,
    data: Data | None = None,
    *,
    key: str = "data.train",
    split: str = "train",
    verify: bool = True,
    workers: int | None = None,
) -> Shards:
    """The shards of a prepared folder, or of text in the forms of `data.train`, prepared once into the cache.

    Raises InputError naming `key` where they are of another tokenizer, and for shards that are missing, cut or altered
    (hashed once for each state of their files; not at all without `verify`). `workers` prepare text (default: one a
    core).
    """
    data = data or Data()
    if not is_prepared(source):
        try:
            return _from_cache(source, tokenizer, data, split, workers)
        except InputError as error:
            raise InputError(*(_renamed(mistake, key) for mistake in error.mistakes)) from error
    shards = Shards(Path(source).expanduser())
    if shards.tokenizer_fingerprint not in ("", tokenizer.text_fingerprint):
        made_by = shards.manifest["tokenizer"]["source"] or "another"
        cure = "prepare it with this one, or give the model that one"
        raise InputError(f"{key}: {source}: was tokenised by {made_by}, which is not the model's tokenizer: {cure}")
    if not shards.tokens:
        raise InputError(f"{key}: {source}: has no tokens in it: {CURE}")
    if not shards.manifest:
        shards.known_ids = max(tokenizer.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        warn(f"{source}: has no {MANIFEST}: neither its tokenizer nor whether it is damaged can be told")
    if verify:
        shards.verify()
    return shards


def _from_cache(source: str, tokenizer: Tokenizer, data: Data, split: str, workers: int | None) -> Shards:
    """What was prepared before of the same text, or now; what is damaged is made anew."""
    check_sources({"sources": source}, split)
    recipe = PrepareRecipe([source], columns=data.columns, workers=workers)
    documents = Documents.of(recipe, split)
    folder = cache_folder(data) / "shards" / settings_of(recipe, tokenizer, documents)["key"]
    with alone(folder):
        if is_prepared(str(folder)):
            try:
                shards = Shards(folder)
                shards.verify()
                return shards
            except InputError as error:
                warn(f"what was kept in the cache is damaged and made anew ({error.mistakes[0]})")
                shutil.rmtree(folder)
        prepare(replace(recipe, out=str(folder)), tokenizer, split)
        return Shards(folder)


def _renamed(mistake: str, key: str) -> str:
    """What preparing says of its own keys, said of those that a training recipe has."""
    group = key.partition(".")[0]
    names = {"sources": key, "out": f"{group}.cache_dir", "workers": f"{group}.workers", "columns": f"{group}.columns"}
    own, colon, rest = mistake.partition(": ")
    if own == "eos":
        return f"{key}: this tokenizer has no eos_token to end documents with: name one in tokenizer_config.json"
    return f"{names.get(own, own)}{colon}{rest}"
