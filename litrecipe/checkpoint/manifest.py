"""Folders that appear complete or not at all, and tell by their `manifest.json` what is in them. Imports no torch."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from litrecipe.config.errors import InputError
from litrecipe.config.files import read_json

MANIFEST = "manifest.json"
FORMAT = "litrecipe/1"
"""Tells our manifests from other files of that name."""


def user_cache() -> Path:
    """`$LITRECIPE_CACHE`, or `litrecipe` in the user's cache folder."""
    if chosen := os.environ.get("LITRECIPE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "litrecipe"


@contextmanager
def keeping_in_cache() -> Iterator[None]:
    """Raise InputError where the body cannot write into the user's cache. Other errors stay what they are."""
    try:
        yield
    except OSError as error:
        ours = isinstance(error.filename, str | Path) and Path(error.filename).is_relative_to(user_cache())
        if not ours and not is_disk_full(error):
            raise
        why, cure = error.strerror or error, "make room, or name another folder by $LITRECIPE_CACHE"
        raise InputError(f"{user_cache()}: {why}: {cure}") from error


def sha256_of(path: Path) -> str:
    """Digest of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def expected_sha256(path: Path) -> str | None:
    """The digest a file must have, where its folder's manifest says so."""
    entry = (entries_of(path.parent) or {}).get(path.name)
    return entry["sha256"] if entry else None


def check_digest(path: Path, digest: str, expected: str) -> None:
    """Raise InputError when a file is not the one that was written or published."""
    if digest != expected:
        raise InputError(f"{path}: its sha256 is not {expected[:12]}… as it was written: fetch or save it again")


def verify(folder: Path) -> None:
    """Check what `manifest.json` lists, but for the digests of weights, which are taken while they are read.

    Does nothing without a manifest of ours. Raises InputError with all mistakes.
    """
    if entries_of(folder) is None:
        return
    cure = f"fetch or save it again, or delete {MANIFEST} if you meant to change it"
    if mistakes := mistakes_of(folder, cure, digest_weights=False):
        raise InputError(*mistakes)


def mistakes_of(folder: Path, cure: str, *, digest_weights: bool = True) -> list[str]:
    """One line, ending in `cure`, for everything that is not as the folder's `manifest.json` says."""
    try:
        entries = entries_of(folder)
    except InputError:
        return [f"{folder / MANIFEST}: unreadable: {cure}"]
    if entries is None:
        return [f"{folder / MANIFEST}: missing: {cure}"]
    mistakes = []
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            mistakes.append(f"{path}: missing: {cure}")
        elif path.stat().st_size != entry["bytes"]:
            mistakes.append(f"{path}: torn: {path.stat().st_size} bytes, not {entry['bytes']}: {cure}")
        elif (digest_weights or path.suffix != ".safetensors") and sha256_of(path) != entry["sha256"]:
            mistakes.append(f"{path}: altered: its sha256 is not the one in {MANIFEST}: {cure}")
    return mistakes


def entries_of(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Bytes and sha256 of the files that were written, by name; None where litrecipe wrote no manifest.

    Others keep other things in a `manifest.json`. Raises InputError when the file is damaged.
    """
    manifest = folder / MANIFEST
    content = read_json(manifest) if manifest.is_file() else {}
    if content.get("format") != FORMAT:
        return None
    files = content.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and {"bytes", "sha256"} <= e.keys() for e in files.values()
    ):
        raise InputError(f"{manifest}: not a list of files with bytes and sha256: fetch or save the folder again")
    return files


def describe_file(path: Path) -> dict[str, Any]:
    """Size and sha256, as the manifest keeps them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_text(path: Path, text: str) -> None:
    """Write a small file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def write_manifest(folder: Path, entries: dict[str, dict[str, Any]], about: dict[str, Any] | None = None) -> None:
    """The last file of a folder: what `describe_file` says of the others, by name, after what it is `about`."""
    write_text(folder / MANIFEST, json.dumps({"format": FORMAT, **(about or {}), "files": entries}, indent=1))


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that the disk, the quota or the size allowed for a file is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_folder(target: Path, written: dict[str, dict[str, Any]] | None = None) -> Iterator[Path]:
    """A folder to fill, which gets its manifest and its name only when the body is done. Of files that the body puts
    into `written`, as `describe_file` does, no digest is made again.

    It replaces one that was written here before, never another. Raises InputError when it cannot be written; what was
    at `target` is then untouched. Other errors of the body, such as those of reading, stay what they are.
    """
    refuse_foreign(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        draft = workshop / target.name
        draft.mkdir()  # the user's umask decides who may read it; mkdtemp lets nobody
        yield draft
        _finish(draft, written or {})
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and not is_disk_full(error):
            raise
        raise _unwritable(target, error) from error
    else:
        try:
            replace_folder(draft, target)
        except OSError as error:
            raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _unwritable(target: Path, error: Exception) -> InputError:
    return InputError(f"{target}: {error}: make room, or name a folder that can be written")


def replace_folder(draft: Path, target: Path) -> None:
    """Give a complete folder its name; what had that name is deleted last.

    Raises OSError with the old folder in its place. A kill leaves the old one at `target` or beside it.
    """
    sync(draft)
    if not target.exists():
        draft.replace(target)
        sync(target.parent)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    target.replace(aside)
    try:
        draft.replace(target)
    except OSError:
        aside.replace(target)
        raise
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_foreign(target: Path) -> None:
    """Raise InputError when something is at `target` that a `new_folder` must not replace."""
    if target.exists() and entries_of(target) is None and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists, and was not written by litrecipe: name another folder, or remove it")


def _finish(draft: Path, written: dict[str, dict[str, Any]]) -> None:
    entries = {}
    for path in sorted(path for path in draft.rglob("*") if path.is_file()):
        name = str(path.relative_to(draft))
        if name not in written:
            sync(path)
        entries[name] = written.get(name) or describe_file(path)
    write_manifest(draft, entries)
