"""Training state on disk: complete or absent, verified when read.

A checkpoint is a folder `step-00000100` with
- `weights-00000.safetensors`, one a rank that holds something of its own: the trained weights;
- `optimizer-00000.safetensors`, likewise: optimizer tensors, named `<parameter>::<key>`;
- `state.json`: counters, random number generators, where the data stood, versions, optimizer kind;
- `manifest.json`: size and sha256 of every file, written last.

It is written under another name and renamed once it is complete, so a folder with its final name that fails its
manifest was damaged later. A sharded tensor is stored as the piece its rank holds; each file's header says where along
dimension 0 its pieces belong, so any number of ranks can read what any number wrote.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from litrecipe.config.errors import InputError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lives; names sort as the steps do."""
    return folder / f"step-{step:08d}"


@dataclass(frozen=True)
class Writer:
    """Who writes what: the ranks of a sharded run all do, of a replicated one only the first."""

    rank: int
    sharded: bool
    gather: Callable[[Any], list[Any]]
    """All ranks' objects, on every rank."""
    barrier: Callable[[], None]

    @property
    def writes_tensors(self) -> bool:
        """Whether this rank has tensors to write."""
        return self.sharded or self.rank == 0


ALONE = Writer(rank=0, sharded=False, gather=lambda value: [value], barrier=lambda: None)


def save(
    target: Path,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: dict[str, Any],
    writer: Writer = ALONE,
) -> None:
    """Write one checkpoint; it has its name only once it is complete.

    `state` is rank 0's JSON; a key `ranks` in it is filled with every rank's `state["rank"]`. Raises InputError on
    every rank when the disk is full on any; what was there before is untouched.
    """
    draft = target.with_name(target.name + ".tmp")
    if writer.rank == 0:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    writer.barrier()
    digests: dict[str, dict[str, Any]] = {}
    failure: str | None = None
    try:
        if writer.writes_tensors:
            for kind, tensors in (("weights", weights), ("optimizer", optimizer)):
                path = draft / f"{kind}-{writer.rank:05d}.safetensors"
                _write_pieces(path, tensors)
                digests[path.name] = describe_file(path)
    except (OSError, SafetensorError) as error:
        failure = str(error)
    reports = writer.gather((digests, failure, state.get("rank")))
    failures = [report[1] for report in reports if report[1]]
    if writer.rank == 0 and not failures:
        try:
            for report in reports:
                digests.update(report[0])
            whole = {**state, "ranks": [report[2] for report in reports], "checkpoint_schema": SCHEMA_VERSION}
            whole.pop("rank", None)
            write_text(draft / "state.json", json.dumps(whole, indent=1))
            digests["state.json"] = describe_file(draft / "state.json")
            write_text(draft / MANIFEST, json.dumps({"files": digests}, indent=1))
            shutil.rmtree(target, ignore_errors=True)
            draft.replace(target)
            _sync_folder(target.parent)
        except OSError as error:
            failures = [str(error)]
    failures = writer.gather(failures)[0] or failures
    if failures:
        if writer.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise InputError(_disk_mistake(target, failures[0]))


def _disk_mistake(target: Path, failure: str) -> str:
    older = newest_complete(target.parent)
    kept = f"the checkpoint {older.name} is intact" if older else "there is no older checkpoint"
    free = shutil.disk_usage(target.parent if target.parent.exists() else target.parent.parent).free
    return (
        f"out_dir: {target}: could not be saved ({failure}; {free / 1e6:.0f} MB free; {kept}): make room and run again "
        "with --checkpoint.resume auto"
    )


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that the disk or the quota is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _write_pieces(path: Path, tensors: Mapping[str, Tensor]) -> None:
    pieces: dict[str, Tensor] = {}
    stored: set[int] = set()
    layout: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        piece, offset = local_piece(tensor)
        pieces[name] = piece.detach().to("cpu").contiguous()
        if pieces[name].data_ptr() in stored:  # 8-bit optimizers share their code tables; the format shares nothing
            pieces[name] = pieces[name].clone()
        stored.add(pieces[name].data_ptr())
        layout[name] = {"offset": offset, "shape": list(tensor.shape)}
    save_file(pieces, path, metadata={"layout": json.dumps(layout)})
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def local_piece(tensor: Tensor) -> tuple[Tensor, int]:
    """What this rank holds of a tensor, and where along dimension 0 it begins."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), (offset[0] if offset else 0)


class Saved:
    """A complete checkpoint. Raises InputError naming the file when one is missing, torn or altered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        mistakes = list(verify(folder))
        if mistakes:
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
    """Tensors spread over files along dimension 0, read piece by piece."""

    def __init__(self, files: list[Path]) -> None:
        self.files = [safe_open(str(path), framework="pt") for path in files]
        self.where: dict[str, list[tuple[int, int]]] = {}
        self.shapes: dict[str, torch.Size] = {}
        for index, file in enumerate(self.files):
            for name, entry in json.loads(file.metadata()["layout"]).items():
                self.where.setdefault(name, []).append((entry["offset"], index))
                self.shapes[name] = torch.Size(entry["shape"])

    def names(self) -> set[str]:
        """All tensors' names."""
        return set(self.where)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start to stop of a tensor, whoever wrote them."""
        shape = self.shapes[name]
        if not shape:
            return self.files[self.where[name][0][1]].get_tensor(name)
        stop = shape[0] if stop is None else stop
        parts = []
        for offset, index in sorted(self.where[name]):
            piece = self.files[index].get_slice(name)
            low, high = max(start, offset), min(stop, offset + piece.get_shape()[0])
            if low < high:
                parts.append(piece[low - offset : high - offset])
        if not parts:
            return self.files[self.where[name][0][1]].get_slice(name)[0:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def like(self, name: str, tensor: Tensor) -> Tensor:
        """The part of a saved tensor that this rank holds of `tensor`."""
        piece, offset = local_piece(tensor)
        return self.read(name) if piece.dim() == 0 else self.read(name, offset, offset + piece.shape[0])


def verify(folder: Path) -> Iterator[str]:
    """One line for everything that is wrong with a checkpoint's files."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        yield f"{manifest}: missing: the checkpoint is incomplete; use another"
        return
    try:
        files = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError, TypeError):
        yield f"{manifest}: unreadable: the checkpoint is damaged; use another"
        return
    for name, entry in files.items():
        path = folder / name
        if not path.exists():
            yield f"{path}: missing: the checkpoint is damaged; use another"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{path}: {path.stat().st_size} bytes, not {entry['bytes']}: the file is torn; use another checkpoint"
        elif describe_file(path)["sha256"] != entry["sha256"]:
            yield f"{path}: sha256 differs from {MANIFEST}: the file was altered; use another checkpoint"


def describe_file(path: Path) -> dict[str, Any]:
    """Size and sha256, as the manifest keeps them."""
    with path.open("rb") as handle:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def write_text(path: Path, text: str) -> None:
    """Write a small file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def all_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, complete or not."""
    return sorted((path for path in folder.glob("step-*") if path.suffix != ".tmp"), reverse=True)


def newest_complete(folder: Path, warn: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint whose files are as they were written; damaged ones are named to `warn` and passed over."""
    for path in all_checkpoints(folder):
        mistakes = list(verify(path))
        if not mistakes:
            return path
        if warn:
            warn(f"{mistakes[0]}; falling back to the one before")
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints. Call it only after a new one is complete."""
    for path in all_checkpoints(folder)[max(1, keep) :]:
        shutil.rmtree(path, ignore_errors=True)
    for draft in folder.glob("step-*.tmp"):
        shutil.rmtree(draft, ignore_errors=True)
