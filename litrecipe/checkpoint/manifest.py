"""What a file ought to be: `manifest.json` in the folders we write, blob names in a hub cache. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from litrecipe.config.errors import InputError

MANIFEST = "manifest.json"


def user_cache() -> Path:
    """`$LITRECIPE_CACHE`, or `litrecipe` in the user's cache folder."""
    if chosen := os.environ.get("LITRECIPE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "litrecipe"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError naming the file when there is none in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file: fetch it again") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{path}: {error}: not valid JSON; fetch it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}: not a JSON object; fetch it again")
    return value


def sha256_of(path: Path) -> str:
    """Digest of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def expected_sha256(path: Path) -> str | None:
    """The digest a file must have, where its folder or the hub cache says so."""
    manifest = path.parent / MANIFEST
    if manifest.is_file():
        entry = _entries(manifest).get(path.name)
        return entry["sha256"] if entry else None
    blob = path.resolve()
    # The hub names large files by their sha256 and small ones by a git hash of 40 digits.
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    return None


def check_digest(path: Path, digest: str, expected: str) -> None:
    """Raise InputError when a file is not the one that was written or published."""
    if digest != expected:
        raise InputError(f"{path}: its sha256 is not {expected[:12]}… as it was written: fetch or save it again")


def verify(folder: Path, *, skip_suffix: str = ".safetensors") -> None:
    """Check what `manifest.json` lists: sizes of all files, digests of those not ending in `skip_suffix`.

    (Weights are digested while they are read.) Does nothing without a manifest. Raises InputError with all mistakes.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return
    mistakes = []
    for name, entry in _entries(manifest).items():
        path = folder / name
        if not path.is_file():
            mistakes.append(f"{path}: missing, though {MANIFEST} lists it: fetch or save it again")
        elif path.stat().st_size != entry["bytes"]:
            size = path.stat().st_size
            mistakes.append(f"{path}: {size} bytes, not {entry['bytes']}: the file is torn; fetch or save it again")
        elif not name.endswith(skip_suffix) and sha256_of(path) != entry["sha256"]:
            cure = f"fetch or save it again, or delete {MANIFEST} if you meant to change it"
            mistakes.append(f"{path}: its sha256 is not the one in {MANIFEST}: {cure}")
    if mistakes:
        raise InputError(*mistakes)


def _entries(manifest: Path) -> dict[str, dict[str, Any]]:
    files = read_json(manifest).get("files")
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and {"bytes", "sha256"} <= e.keys() for e in files.values()
    ):
        raise InputError(f"{manifest}: not a list of files with bytes and sha256: fetch or save the folder again")
    return files


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which gets its manifest and its name only when the body is done.

    It replaces one that was written here before, never another. Raises InputError when it cannot be written; what was
    at `target` is then untouched.
    """
    refuse_foreign(target)
    draft = target.with_name(target.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        yield draft
        _finish(draft)
        shutil.rmtree(target, ignore_errors=True)
        draft.replace(target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target}: {error}: make room, or name a folder that can be written") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def refuse_foreign(target: Path) -> None:
    """Raise InputError when something is at `target` that a `new_folder` must not replace."""
    if target.exists() and not (target / MANIFEST).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists, and was not written by litrecipe: name another folder, or remove it")


def _finish(draft: Path) -> None:
    entries = {}
    for path in sorted(path for path in draft.rglob("*") if path.is_file()):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        entries[str(path.relative_to(draft))] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    with (draft / MANIFEST).open("w", encoding="utf-8") as handle:
        json.dump({"files": entries}, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())
