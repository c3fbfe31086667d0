"""Training state on disk: complete or absent, verified when read.

A checkpoint is a folder `step-00000100` with
- `weights-00000.safetensors`, one a rank that holds something of its own: the trained weights;
- `optimizer-00000.safetensors`, likewise: optimizer tensors, named `<parameter>::<key>`;
- `state.json`: counters, random number generators, where the data stood, versions, optimizer kind;
- `manifest.json`: size and sha256 of every file, written last.

It is written under another name and renamed once it is complete, so a folder with its final name that fails its
manifest was damaged later. A folder of any other name, such as a user's copy, is no checkpoint of the run. A sharded
tensor is stored as the pieces that ranks hold, each by one of them; each file's header says where in the whole tensor,
along every dimension, its pieces begin, so any number of ranks, however they divide tensors, can read what any wrote.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from litrecipe.checkpoint.manifest import describe_file, mistakes_of, replace_folder, sync, write_manifest, write_text
from litrecipe.config.errors import InputError
from litrecipe.model.tensor_plan import held_of

SCHEMA_VERSION = 2
"""1 had pieces along dimension 0 only, and is read."""
NAME = re.compile(r"step-(\d{8,})")
LEFTOVER = re.compile(rf"{NAME.pattern}\.tmp|\.{NAME.pattern}\..+")
"""What a kill within a save leaves behind: the draft, or the folder that was to be replaced."""
PART = "@"
"""Stands between a tensor's name and the number of a piece, where a rank has several of it."""
CURE = "the checkpoint is damaged; use another"
MARGIN = 2**20
"""Bytes beside the tensors: headers, counters, random numbers."""


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint folder is named after, -1 when it is no checkpoint's name."""
    match = NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


@dataclass(frozen=True)
class Writer:
    """Who writes what: the ranks of a sharded run all do, of a replicated one only the first."""

    rank: int
    sharded: bool
    gather: Callable[[Any], list[Any]]
    """All ranks' objects, on every rank."""

    @property
    def writes_tensors(self) -> bool:
        """Whether this rank has tensors to write."""
        return self.sharded or self.rank == 0


ALONE = Writer(rank=0, sharded=False, gather=lambda value: [value])


@dataclass(frozen=True)
class Piece:
    """What one rank writes of a tensor."""

    values: Tensor
    """On the CPU."""
    offset: tuple[int, ...]
    """Where in the whole tensor it begins, along each dimension."""
    shape: tuple[int, ...]
    """Of the whole tensor."""


def pieces_of(tensors: Mapping[str, Tensor], writer: Writer, *, copied: bool = False) -> dict[str, Piece]:
    """What this rank writes of some tensors, by name, with a number where it has several pieces of one; `copied`: as
    they are now, whatever becomes of them."""
    pieces = {}
    for name, tensor in tensors.items():
        if is_written_by(writer.rank, tensor):
            shape = held_of(tensor).whole_shape(tensor.shape)
            for number, (piece, offset) in enumerate(local_pieces(tensor)):
                key = f"{name}{PART}{number}" if number else name
                pieces[key] = Piece(piece.detach().to("cpu", copy=copied), offset, shape)
    return pieces


def save(
    target: Path,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: dict[str, Any],
    writer: Writer = ALONE,
) -> None:
    """Write one checkpoint, `begin` and `finish`."""
    pieces = {"weights": pieces_of(weights, writer), "optimizer": pieces_of(optimizer, writer)}
    begin(target, pieces, state, writer)
    finish(target, pieces, writer)


def begin(target: Path, pieces: Mapping[str, Mapping[str, Piece]], state: dict[str, Any], writer: Writer) -> None:
    """Make the draft of a checkpoint and write its state, if there is room for all of it.

    `state` is rank 0's JSON; a key `ranks` in it is filled with every rank's `state["rank"]`. Raises InputError on
    every rank when there is not enough room; what was there before is untouched.
    """
    draft = draft_of(target)
    size = sum(piece.values.nbytes for of_kind in pieces.values() for piece in of_kind.values())
    of_ranks = writer.gather((size, state.get("rank")))
    with _together(writer, target):
        if writer.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            needed, free = sum(size for size, _ in of_ranks) + MARGIN, free_bytes(draft)
            if free is not None and free < needed:
                raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:.0f} MB")
            whole = {**state, "ranks": [rank for _, rank in of_ranks], "checkpoint_schema": SCHEMA_VERSION}
            whole.pop("rank", None)
            write_text(draft / "state.json", json.dumps(whole, indent=1))


def finish(target: Path, pieces: Mapping[str, Mapping[str, Piece]], writer: Writer) -> None:
    """Write the tensors of a checkpoint that was begun; it has its name only once it is complete.

    Raises InputError on every rank when the disk is full on any; what was there before is untouched.
    """
    draft = draft_of(target)
    files: dict[str, dict[str, Any]] = {}
    with _together(writer, target):
        if writer.writes_tensors:
            for kind, of_kind in pieces.items():
                path = draft / f"{kind}-{writer.rank:05d}.safetensors"
                _write_pieces(path, of_kind)
                files[path.name] = describe_file(path)
    of_ranks = writer.gather(files)
    with _together(writer, target):
        if writer.rank == 0:
            files = {name: entry for written in of_ranks for name, entry in written.items()}
            write_manifest(draft, {**files, "state.json": describe_file(draft / "state.json")})
            replace_folder(draft, target)


def draft_of(target: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return target.with_name(target.name + ".tmp")


def free_bytes(folder: Path) -> int | None:
    """Room on a folder's disk; None where its file system does not tell."""
    usage = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir()))
    return usage.free if usage.total else None


@contextmanager
def _together(writer: Writer, target: Path) -> Iterator[None]:
    """A stage of a save: it ends when all ranks have done it, and where one rank fails all raise the same error."""
    failure: str | None = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        failure = str(error)
    failures = [text for text in writer.gather(failure) if text]
    if failures:
        if writer.rank == 0:
            shutil.rmtree(draft_of(target), ignore_errors=True)
        raise InputError(_disk_mistake(target, failures[0]))


def _disk_mistake(target: Path, failure: str) -> str:
    older = newest_complete(target.parent)
    kept = f"the checkpoint {older.name} is intact" if older else "there is no older checkpoint"
    free = free_bytes(target.parent)
    room = "" if free is None else f"{free / 1e6:.0f} MB free; "
    return (
        f"out_dir: {target}: could not be saved ({failure}; {room}{kept}): make room and run again with "
        "--checkpoint.resume auto"
    )


def _write_pieces(path: Path, pieces: Mapping[str, Piece]) -> None:
    written: dict[str, Tensor] = {}
    stored: set[int] = set()
    layout: dict[str, dict[str, Any]] = {}
    for name, piece in pieces.items():
        values = piece.values.contiguous()
        if values.data_ptr() in stored:  # 8-bit optimizers share their code tables; the format shares nothing
            values = values.clone()
        stored.add(values.data_ptr())
        written[name] = values
        layout[name] = {"offset": list(piece.offset), "shape": list(piece.shape)}
    save_file(written, path, metadata={"layout": json.dumps(layout)})
    sync(path)


def local_piece(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What this rank holds of a tensor, and where in it that begins along each dimension."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)


def local_pieces(tensor: Tensor) -> list[tuple[Tensor, tuple[int, ...]]]:
    """The same of a tensor that may be a rank's part of a split one (`model.tensor_plan`), whose ranges lie apart: a
    piece of each. What is sharded is the part."""
    piece, offset = local_piece(tensor)
    what = held_of(tensor)
    if not what.is_split:
        return [(piece, offset)]
    dim, found, begin = what.dim, [], 0
    first, last = offset[dim], offset[dim] + piece.shape[dim]
    for start, stop in what.ranges:
        low, high = max(first, begin), min(last, begin + stop - start)
        if low < high:
            where = (*offset[:dim], start + low - begin, *offset[dim + 1 :])
            found.append((piece.narrow(dim, low - first, high - low), where))
        begin += stop - start
    return found or [(piece, offset)]


def is_written_by(rank: int, tensor: Tensor) -> bool:
    """Whether a rank is the first of those that hold the same of a tensor."""
    what = held_of(tensor)
    if what.is_copy:
        return False
    if not isinstance(tensor, DTensor):
        return rank == 0 or what.is_split
    where: Sequence[int] = tensor.device_mesh.get_coordinate() or ()
    return not any(isinstance(kind, Replicate) and at for kind, at in zip(tensor.placements, where, strict=True))


class Saved:
    """A complete checkpoint. Raises InputError naming the file when one is missing, torn or altered.

    `verified` says that the files have been held against the manifest already, which reads them all.
    """

    def __init__(self, folder: Path, *, verified: bool = False) -> None:
        self.folder = folder
        if not verified and (mistakes := mistakes_of(folder, CURE)):
            raise InputError(*mistakes)
        self.state: dict[str, Any] = json.loads((folder / "state.json").read_text())
        if self.state["checkpoint_schema"] > SCHEMA_VERSION:
            raise InputError(
                f"{folder}/state.json: checkpoint_schema {self.state['checkpoint_schema']}: written by a newer "
                f"litrecipe than this one, which knows {SCHEMA_VERSION}: upgrade litrecipe"
            )

    def tensors(self, kind: str) -> Pieces:
        """The saved `weights` or `optimizer` tensors."""
        return Pieces(sorted(self.folder.glob(f"{kind}-*.safetensors")))


class Pieces:
    """Tensors that lie in pieces in several files, read piece by piece."""

    def __init__(self, files: list[Path]) -> None:
        self.paths = files
        self.files = [safe_open(str(path), framework="pt") for path in files]
        self.where: dict[str, dict[tuple[int, ...], tuple[int, str]]] = {}
        """Where the pieces of a tensor begin → number of the file, and the piece's name there."""
        self.shapes: dict[str, torch.Size] = {}
        for index, file in enumerate(self.files):
            for key, entry in json.loads(file.metadata()["layout"]).items():
                name = key.partition(PART)[0]
                self.shapes[name] = shape = torch.Size(entry["shape"])
                offset = entry["offset"]
                if isinstance(offset, int):  # of schema 1
                    offset = [offset, *[0] * (len(shape) - 1)] if shape else []
                self.where.setdefault(name, {}).setdefault(tuple(offset), (index, key))

    def names(self) -> set[str]:
        """All tensors' names."""
        return set(self.where)

    def read(self, name: str, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """A tensor, or the part of this shape that begins at an offset, whoever wrote it.

        Raises InputError where some of it lies in no file.
        """
        whole = self.shapes[name]
        if not whole:
            index, key = next(iter(self.where[name].values()))
            return self.files[index].get_tensor(key)
        begin = [0] * len(whole) if offset is None else offset
        size = torch.Size(whole if shape is None else shape)
        end = [at + length for at, length in zip(begin, size, strict=True)]
        result: Tensor | None = None
        left = size.numel()
        for at, (index, key) in self.where[name].items():
            piece = self.files[index].get_slice(key)
            low = [max(a, b) for a, b in zip(begin, at, strict=True)]
            high = [min(a, b + length) for a, b, length in zip(end, at, piece.get_shape(), strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            found: Tensor = piece[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, at, strict=True))]
            left -= found.numel()
            if found.shape == size:  # columns of a file are a view of it, and fused optimizers go by the memory
                return found.contiguous()
            result = torch.empty(size, dtype=found.dtype) if result is None else result
            result[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, begin, strict=True))] = found
        if left:
            raise InputError(f"{self.paths[0].parent}: {name}: {left} of {size.numel()} values are missing: {CURE}")
        if result is None:  # a rank may hold nothing of a small tensor
            index, key = next(iter(self.where[name].values()))
            slices = self.files[index].get_slice(key)
            result = slices[:0].new_empty(size)
        return result

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a saved tensor that this rank holds of `tensor`."""
        parts = [self.read(name, offset, piece.shape) for piece, offset in local_pieces(tensor)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, held_of(tensor).dim)


def all_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, complete or not."""
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=step_of, reverse=True)


def states(folder: Path) -> list[dict[str, Any]]:
    """What `state.json` says in all checkpoints, those that are being written among them."""
    while True:
        try:
            return [json.loads(path.read_text()) for path in folder.glob("step-*/state.json")]
        except FileNotFoundError:  # one has got its name meanwhile, or was deleted as too old
            continue


def newest_complete(folder: Path, warn: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint whose files are as they were written; damaged ones are named to `warn` and passed over."""
    checkpoints = all_checkpoints(folder)
    for path, older in zip_longest(checkpoints, checkpoints[1:]):
        mistakes = mistakes_of(path, CURE)
        if not mistakes:
            return path
        if warn:
            warn(f"{mistakes[0]}; " + (f"falling back to {older.name}" if older else "there is no older one"))
    return None


def prune(written: Path, keep: int) -> None:
    """Delete the oldest checkpoints, so that `written` and the `keep` - 1 before it are left, and later ones.

    Call it only once `written` is complete.
    """
    older = [path for path in all_checkpoints(written.parent) if step_of(path) < step_of(written)]
    for path in older[max(0, keep - 1) :]:
        shutil.rmtree(path, ignore_errors=True)
    clear_leftovers(written.parent)


def clear_leftovers(folder: Path) -> None:
    """Delete what kills left behind of saves, while nothing is being saved."""
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
