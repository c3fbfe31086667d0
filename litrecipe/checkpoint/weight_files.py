"""Safetensors files written tensor by tensor, each by another rank.

Of a model that ranks share a tensor is put together when its turn comes, so that a rank holds at most two: one of its
own file, and one that is on its way to another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.tensor import DTensor

from litrecipe.checkpoint.safetensors_files import FLOATS
from litrecipe.model.group import Group
from litrecipe.model.tensor_parallel import whole
from litrecipe.model.tensor_plan import held_of

T = TypeVar("T")

NAMES = {getattr(torch, name): theirs for theirs, (name, _, _) in FLOATS.items()}
"""Types by their names in files."""
Written = dict[str, dict[str, Any]]
"""Size and sha256 of files by name, as manifests have them."""


class StreamedFile:
    """One file under way; its tensors come in the order in which they are announced."""

    def __init__(self, path: Path, announced: Mapping[str, Tensor]) -> None:
        """`announced` may be on the meta device."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in announced.items():
            start, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.digest, self.size = sha256(), 0
        self.file = path.open("wb")
        self._write(len(text).to_bytes(8, "little") + text)

    def add(self, *tensors: Tensor) -> None:
        """The next ones."""
        for tensor in tensors:
            self._write(tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data)

    def finish(self) -> dict[str, Any]:
        """Wait until it is on the disk; its size and sha256."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"bytes": self.size, "sha256": self.digest.hexdigest()}

    def close(self) -> None:
        """Of a full disk it was told before."""
        with suppress(OSError):
            self.file.close()

    def _write(self, content: bytes | memoryview) -> None:
        self.file.write(content)
        self.digest.update(content)
        self.size += len(content)


class Attempts:
    """What may go wrong by itself: after the first failure nothing more is attempted."""

    def __init__(self) -> None:
        self.failure: OSError | None = None

    def make(self, act: Callable[[], T]) -> T | None:
        """What `act` returns, None where it fails."""
        if self.failure is None:
            try:
                return act()
            except OSError as error:
                self.failure = error
        return None


class WeightFiles:
    """Tensors that are to lie in several files. Every rank must have the same, and write them with the others."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        files: Mapping[str, Sequence[str]],
        translate: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        dtype: torch.dtype | None = None,
        group: Group | None = None,
    ) -> None:
        """`files`: name → names of the tensors in it, which `translate` turns into what files have of them. Tensors are
        stored in `dtype`, or as they are. The ranks of a `group` have parts of them."""
        self.tensors, self.files, self.group = tensors, files, group
        self.translate, self.dtype = translate, dtype

    def announced(self, name: str) -> dict[str, Tensor]:
        """What a file will have, without values."""
        shapes = {own: held_of(tensor).whole_shape(tensor.shape) for own, tensor in self._of(name)}
        dtypes = {own: self.dtype or tensor.dtype for own, tensor in self._of(name)}
        empty = {own: torch.empty(shape, dtype=dtypes[own], device="meta") for own, shape in shapes.items()}
        return self.translate(empty)

    def write(self, folder: Path) -> Written:
        """Write this rank's share; returns what all have written. What replicas hold the first rank writes.

        Raises the first error of any rank on all of them, once all are through: one whose disk is full still helps.
        """
        rank, world = rank_and_world()
        shared = self.group is not None or any(isinstance(tensor, DTensor) for tensor in self.tensors.values())
        writers = world if shared else 1
        names, written, attempts = list(self.files), Written(), Attempts()
        for first in range(0, len(names), writers):
            group = names[first : first + writers]
            mine = group[rank] if rank < len(group) else None
            file = None if mine is None else attempts.make(partial(StreamedFile, folder / mine, self.announced(mine)))
            for turn in zip_longest(*(self.files[name] for name in group)):
                whole = [None if own is None else self._whole(own, of == rank) for of, own in enumerate(turn)]
                if file is not None and (found := whole[rank]) is not None:
                    attempts.make(partial(file.add, *self.translate({turn[rank]: found}).values()))
            if file is not None and mine is not None:
                if entry := attempts.make(file.finish):
                    written[mine] = entry
                file.close()
        return _told(written, attempts.failure)

    def _of(self, name: str) -> list[tuple[str, Tensor]]:
        return [(own, self.tensors[own]) for own in self.files[name]]

    @torch.no_grad()
    def _whole(self, own: str, is_mine: bool) -> Tensor | None:
        """A tensor for the rank whose it is; all ranks put it together."""
        tensor = self.tensors[own]
        part = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        found = whole(part, held_of(tensor), self.group)
        return found.to(self.dtype or found.dtype) if is_mine else None


def _told(written: Written, failure: OSError | None) -> Written:
    """What all ranks have written. Raises what went wrong on any of them."""
    found: list[tuple[Written, OSError | None]] = [(written, failure)]
    _, world = rank_and_world()
    if world > 1:
        gathered: list[Any] = [None] * world
        torch.distributed.all_gather_object(gathered, found[0])
        found = gathered
    if failures := [error for _, error in found if error is not None]:
        raise failures[0]
    return {name: entry for of_rank, _ in found for name, entry in of_rank.items()}


def rank_and_world() -> tuple[int, int]:
    """This process's place among those that work together, and how many they are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
