"""Token shards as litdata lays them out: `index.json` and chunks, each item of which is one document. Imports no torch
at its head.

A chunk holds uint32 numbers, how many documents it has and where each begins and the last one ends (in bytes of the
file), and then the tokens of its documents.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from litrecipe.checkpoint.manifest import sha256_of, write_text
from litrecipe.config.errors import InputError
from litrecipe.config.progress import counted

INDEX = "index.json"
WORD = 4
"""Bytes of a number of a chunk's head."""
DTYPES = {
    f"no_header_tensor:{number}": dtype
    for dtype, numbers in ((np.int32, (15, 16)), (np.int64, (17, 18)), (np.uint16, (20,)))
    for number in numbers
}
"""litdata's names of the token types that are read; some have two."""
LARGEST = 2**32 - 1
"""Bytes of a chunk, as its offsets are 32 bits wide."""


@dataclass(frozen=True)
class Chunk:
    """A chunk that is on the disk."""

    info: dict[str, Any]
    """Its entry in the index: `filename`, `chunk_bytes`, `chunk_size` (documents), `dim` (tokens)."""
    sha256: str


class ChunkWriter:
    """Writes chunk after chunk, by litdata's own writer."""

    def __init__(self, folder: Path, shard_bytes: int, chunks: int = 0) -> None:
        """`chunks`: how many are there already."""
        self.folder, self.shard_bytes = folder, shard_bytes
        self.chunks = chunks
        self.config: dict[str, Any] = {}
        """What the index says of all chunks; known when one is written."""
        self._documents: list[np.ndarray] = []
        self._bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether the documents added since the last chunk fill one."""
        return self._bytes >= self.shard_bytes

    @property
    def is_empty(self) -> bool:
        """Whether no document was added since the last chunk."""
        return not self._documents

    def add(self, tokens: np.ndarray, where: str) -> None:
        """One more document. Raises InputError for one that is too long for a chunk."""
        self._documents.append(tokens)
        self._bytes += tokens.nbytes
        if self._bytes + (len(self._documents) + 2) * WORD > LARGEST:
            raise InputError(f"{where}: a document of {len(tokens):,} tokens: too long for a shard: cut it in two")

    def write(self) -> Chunk:
        """What was added, as a chunk that is on the disk when this returns."""
        import torch
        from litdata.streaming.item_loader import TokensLoader
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(  # `LARGEST`: it is for us to say when a chunk is full
            str(self.folder), chunk_bytes=LARGEST, chunk_index=self.chunks, item_loader=TokensLoader()
        )
        for number, tokens in enumerate(self._documents):
            writer.add_item(number, torch.from_numpy(np.ascontiguousarray(tokens)))
        written = Path(writer.write_chunk(on_done=True))
        path = written.replace(self.folder / f"chunk-0-{self.chunks}.bin")  # whatever rank this process has
        with path.open("rb") as file:
            os.fsync(file.fileno())
        tokens_written = sum(map(len, self._documents))
        info = {"chunk_bytes": path.stat().st_size, "chunk_size": len(self._documents), "dim": tokens_written}
        self.config = {**writer.get_config(), "chunk_size": None, "chunk_bytes": self.shard_bytes}
        self.chunks += 1
        self._documents, self._bytes = [], 0
        return Chunk({**info, "filename": path.name}, sha256_of(path))


def write_index(folder: Path, chunks: list[Chunk], config: dict[str, Any]) -> None:
    """litdata's `index.json`, without a date."""
    index = {"chunks": [chunk.info for chunk in chunks], "config": config}
    write_text(folder / INDEX, json.dumps(index, sort_keys=True))


def read_head(path: Path, documents: int) -> np.ndarray:
    """(documents + 1,) where each document begins, and the last one ends, in bytes of the file.

    Raises InputError when the file is no chunk of that many documents, or cut.
    """
    cure = "prepare it anew, or fetch it again"
    if not path.is_file():
        raise InputError(f"{path}: missing: {cure}")
    head = np.fromfile(path, dtype="<u4", count=documents + 2)
    size = path.stat().st_size
    if len(head) < documents + 2:
        raise InputError(f"{path}: cut: {size} bytes do not hold the head of {counted(documents, 'document')}: {cure}")
    offsets = head[1:].astype(np.int64)
    is_whole = head[0] == documents and offsets[0] == head.nbytes and (np.diff(offsets) >= 0).all()
    if not is_whole:
        raise InputError(f"{path}: damaged: its head does not tell of {counted(documents, 'document')}: {cure}")
    if offsets[-1] != size:
        raise InputError(f"{path}: cut or damaged: {size} bytes, not {offsets[-1]}: {cure}")
    return offsets
