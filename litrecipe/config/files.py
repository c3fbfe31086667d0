"""Small files: JSON read and written, names told apart from mistyped ones, one process at a time."""

from __future__ import annotations

import difflib
import errno
import fcntl
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from litrecipe.config.errors import InputError
from litrecipe.config.progress import say

WORTH_TELLING = 2.0
"""Seconds after which waiting is told of."""
ABSENT = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What file systems without locks answer."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError naming the file when there is none in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file: give one that is there") from error
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise InputError(f"{path}: {error}: not valid JSON: mend it, or fetch it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}: not a JSON object: mend it, or fetch it again")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """An object as a person reads it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def refuse_links_out(folder: Path, names: Iterable[str]) -> None:
    """Raise InputError for files of a folder that lie, through a link or by their names, outside of it.

    A folder from somebody else could so take files of this machine along. The hub's cache links into its `blobs`.
    """
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    cure = "put the file itself there, or name where it is"
    mistakes = []
    for name in names:
        target = (folder / name).resolve()
        if not any(target.is_relative_to(one) for one in homes):
            mistakes.append(f"{folder / name}: {target}: a link out of its folder: {cure}")
    if mistakes:
        raise InputError(*mistakes)


def refuse_linked_files(folder: Path) -> None:
    """The same of all files in a folder."""
    refuse_links_out(folder, [path.name for path in folder.iterdir() if path.is_symlink() and path.is_file()])


def nearest(path: Path) -> Path | None:
    """What a mistyped path may have meant: the likeliest other name in the deepest of its folders that exists."""
    folder, wanted = path.parent, path.name
    while not folder.is_dir() and folder != folder.parent:
        folder, wanted = folder.parent, folder.name
    names = [entry.name for entry in folder.iterdir() if entry.name != wanted] if folder.is_dir() else []
    close = difflib.get_close_matches(wanted, names, n=1)
    return folder / close[0] if close else None


def try_writing(folder: Path) -> None:
    """Raise OSError unless a file can be made in the folder and filled: permissions do not tell of full or read-only
    disks, or of /proc."""
    with TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))


def take_lock(file: IO[str], how: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> bool:
    """Take the kernel's lock of a file, which a dead process does not hold; False where the file system has none.

    Raises BlockingIOError when another process holds it, and it is not to be waited for.
    """
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in ABSENT:
            raise
        return False
    return True


def take_lock_within(file: IO[str], seconds: float) -> bool:
    """`take_lock`, tried for so long."""
    until = time.monotonic() + seconds
    while True:
        try:
            return take_lock(file)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
        time.sleep(seconds / 100)


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file while the body runs; waits, and says for `what`, while another process holds it.

    Where the file system has no locks it holds nobody.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            take_lock_within(file, WORTH_TELLING)
        except BlockingIOError:
            say(f"waiting for another process that {what}")
            take_lock(file, fcntl.LOCK_EX)
        yield
