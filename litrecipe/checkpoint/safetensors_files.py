"""Safetensors files read as a stream: checked, digested on the way, one tensor in memory at a time.

The library maps files into memory, which counts against the process until the last tensor is gone; reading them in
order costs no more, and gives the digest for nothing. Format: 8 bytes of header length, a JSON header, the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from litrecipe.checkpoint.hub import published_sha256
from litrecipe.checkpoint.manifest import check_digest, expected_sha256, sha256_of
from litrecipe.config.errors import InputError
from litrecipe.config.files import read_json

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""
FLOATS = {
    "F64": ("float64", 8, 0x7FF0_0000_0000_0000),
    "F32": ("float32", 4, 0x7F80_0000),
    "F16": ("float16", 2, 0x7C00),
    "BF16": ("bfloat16", 2, 0x7F80),
}
"""Types a weight may have: name in the file → torch's name, bytes, the bits that are all set in infinities and NaNs."""
MASKS = (".attention.bias", ".attn.bias")
"""Endings of causal masks, which older checkpoints of GPT-NeoX and GPT-2 hold, some as bytes."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `start` and `stop` are places in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def is_mask(self) -> bool:
        """Whether these are bytes that are no weights."""
        return self.dtype in ("BOOL", "U8") and self.name.endswith(MASKS)


class SafetensorsFile:
    """One file. Raises InputError naming it when it is truncated or its header makes no sense."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = _read_entries(path)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors but masks in the order of the file, in the type they are stored in.

        Raises InputError after the last one when the file is not what its manifest or the hub said it is, and at the
        first value that is not finite where neither said anything.
        """
        with self.path.open("rb") as handle:
            digest = hashlib.sha256(handle.read(self.entries[0].start if self.entries else -1))
            for entry in self.entries:
                raw = self._read(handle, entry.stop - entry.start)
                if self.expected:
                    digest.update(raw.numpy().data)
                if not entry.is_mask:
                    yield entry.name, self._tensor(entry, raw, entry.shape)
        if self.expected:
            check_digest(self.path, digest.hexdigest(), self.expected)

    def rows(self, entry: Entry, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows of a tensor. Where the digest is known it is `check` that finds what was changed in the file."""
        stop = entry.shape[0] if stop is None else stop
        size = (entry.stop - entry.start) // max(1, entry.shape[0])
        with self.path.open("rb") as handle:
            handle.seek(entry.start + start * size)
            return self._tensor(entry, self._read(handle, (stop - start) * size), (stop - start, *entry.shape[1:]))

    def check(self) -> None:
        """Raise InputError when the file is not what its manifest or the hub said it is; reads all of it, if so."""
        if self.expected:
            check_digest(self.path, sha256_of(self.path), self.expected)

    @cached_property
    def expected(self) -> str | None:
        """The digest that the file must have, where somebody said so."""
        return expected_sha256(self.path) or published_sha256(self.path)

    def _read(self, handle: BinaryIO, count: int) -> Tensor:
        import torch

        raw = torch.empty(count, dtype=torch.uint8)
        if handle.readinto(raw.numpy().data) != count:  # type: ignore[attr-defined]
            raise InputError(f"{self.path}: it became shorter while it was read: load it again")
        return raw

    def _tensor(self, entry: Entry, raw: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Bytes as numbers, which are looked at where no digest is known."""
        import torch

        if not self.expected and not _is_finite(raw.numpy(), entry.dtype):
            raise InputError(f"{self.path}: {entry.name}: holds values that are not finite: fetch the file again")
        return raw.view(getattr(torch, FLOATS[entry.dtype][0])).view(shape)

    def stored(self, entry: Entry) -> bytes:
        """A tensor's bytes."""
        with self.path.open("rb") as handle:
            handle.seek(entry.start)
            return handle.read(entry.stop - entry.start)


class SafetensorsWeights:
    """The weights of a folder: `model.safetensors`, or the shards an index names."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.files = [SafetensorsFile(path) for path in paths]
        names = [entry.name for file in self.files for entry in file.entries]
        if len(names) != len(set(names)):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{paths[0].parent}: {twice}: stored in two files: fetch the folder again")

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape."""
        return {entry.name: entry.shape for file in self.files for entry in file.entries if not entry.is_mask}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, file by file."""
        for file in self.files:
            yield from file.tensors()

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows of a tensor."""
        file, entry = self._where[name]
        return file.rows(entry, start, stop)

    def check(self, part: int = 0, parts: int = 1) -> None:
        """Check the digests of every so-manieth file."""
        for file in self.files[part::parts]:
            file.check()

    def stored(self, name: str) -> bytes:
        """A tensor's bytes as they are stored."""
        file, entry = self._where[name]
        return file.stored(entry)

    @cached_property
    def _where(self) -> dict[str, tuple[SafetensorsFile, Entry]]:
        return {entry.name: (file, entry) for file in self.files for entry in file.entries}


def find_weights(folder: Path) -> SafetensorsWeights | None:
    """The weights of a Hugging Face folder, None when it has none.

    Raises InputError for a missing shard, an index that disagrees with its shards, and for pickles.
    """
    if (index := folder / INDEX).is_file():
        return _read_sharded(index)
    if (single := folder / SINGLE).is_file():
        return SafetensorsWeights([single])
    if pickle := next(folder.glob("pytorch_model*.bin"), None):
        raise InputError(
            f"{pickle}: a pickle can run code when it is read: use a revision with safetensors, or convert it with "
            "transformers: `AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)`"
        )
    return None


def _read_sharded(index: Path) -> SafetensorsWeights:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) and "/" not in name for name in where.values()):
        raise InputError(f"{index}: weight_map: not a table of tensors and file names: fetch it again")
    paths = [index.parent / name for name in sorted(set(where.values()))]
    missing = [f"{path}: missing, though {INDEX} names it: fetch it again" for path in paths if not path.is_file()]
    if missing:
        raise InputError(*missing)
    weights = SafetensorsWeights(paths)
    found = {entry.name: file.path.name for file in weights.files for entry in file.entries}
    wrong = [name for name, shard in where.items() if found.get(name) != shard]
    if wrong:
        raise InputError(*(f"{index.parent / where[name]}: {name}: not in it: fetch it again" for name in wrong[:10]))
    return weights


def _read_entries(path: Path) -> list[Entry]:
    """The header, checked; entries in the order of the file."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise InputError(f"{path}: truncated or no safetensors file: its header does not fit; fetch it again")
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            entries = sorted((_entry(name, value, 8 + length) for name, value in header.items()), key=lambda e: e.start)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError(f"{path}: its header is damaged ({error}): fetch it again") from error
    end = 8 + length
    for entry in entries:
        if entry.dtype not in FLOATS and not entry.is_mask:
            cure = "quantised or converted by another tool; use the original weights"
            raise InputError(f"{path}: {entry.name}: type {entry.dtype}: {cure}")
        if entry.start != end or entry.stop - entry.start != math.prod(entry.shape) * _item_size(entry):
            raise InputError(f"{path}: {entry.name}: its header is damaged: fetch it again")
        end = entry.stop
    if end != size:
        what = "truncated" if size < end else "longer than its header says"
        raise InputError(f"{path}: {what} ({size} bytes, its header says {end}): fetch it again")
    return entries


def _item_size(entry: Entry) -> int:
    return 1 if entry.is_mask else FLOATS[entry.dtype][1]


def _is_finite(raw: np.ndarray, dtype: str) -> bool:
    _, size, exponent = FLOATS[dtype]
    # numpy looks through the bits many times faster than torch's isfinite does on a busy machine.
    return not ((raw.view(f"<u{size}") & exponent) == exponent).any()


def _entry(name: str, value: dict, data: int) -> Entry:
    start, stop = (int(place) for place in value["data_offsets"])
    shape = tuple(int(n) for n in value["shape"])
    if min((start, stop, *shape)) < 0:
        raise ValueError(f"{name}: negative numbers")
    return Entry(name, str(value["dtype"]), shape, data + start, data + stop)
