"""Who trains in a folder: one process at a time, which is told by name to all others.

On one machine the kernel knows whether the holder of a lock is alive (`flock`). Of another machine it may not, as
network file systems do not always share locks, so the holder also touches its file every few seconds: one that has not
done so for a while is gone. Times are read off the file system, whose clock is the same for all. Two that start at once
there, or one that was suspended for longer than that, find another's name in the file: whose name it is not gives way.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

from litrecipe.config.errors import InputError
from litrecipe.config.files import take_lock, take_lock_within
from litrecipe.config.progress import say, warn

BEAT = 10.0
"""Seconds between touches of a lock that is held."""
DEAD = 60.0
"""Seconds without one after which its holder is gone."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
LOOKS = 1.0
"""Seconds for which a lock is tried, as others take it for a moment, to see who holds it; and in which another may take
one where locks do not reach."""


@dataclass(frozen=True)
class Holder:
    """A process that trains."""

    host: str
    kernel: str
    """Tells machines apart, which may have the same name; a machine has another each time it starts."""
    pid: int
    job: str | None
    """Slurm's number of its job, which stays the same when that is requeued."""
    restart: int = 0
    """How often that was requeued."""

    @classmethod
    def this(cls) -> Holder:
        """This process."""
        host = socket.gethostname()
        kernel = BOOT_ID.read_text().strip() if BOOT_ID.exists() else host
        restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        return cls(host, kernel, os.getpid(), os.environ.get("SLURM_JOB_ID"), restart)

    @classmethod
    def read(cls, file: IO[str]) -> Holder | None:
        """Who is written in a lock file; None where nobody is, or half of one."""
        file.seek(0)
        try:
            return cls(**json.loads(file.read()))
        except (ValueError, TypeError):
            return None

    def other_in(self, path: Path) -> Holder | None:
        """Who else is written in a lock file, which is opened anew: only then network file systems look."""
        try:
            with path.open(encoding="utf-8") as file:
                found = Holder.read(file)
        except FileNotFoundError:
            return None
        return None if found == self else found

    def is_before(self, other: Holder) -> bool:
        """Whether this was the same job, before it was requeued."""
        return self.job is not None and self.job == other.job and self.restart < other.restart

    def __str__(self) -> str:
        job = "" if self.job is None else f", Slurm job {self.job}"
        return f"process {self.pid} on {self.host}{job}"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep every other process from training in a folder while the body runs; a dead process keeps nobody.

    Raises InputError when another holds it. Waits up to `DEAD` seconds to see whether one on another machine lives.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    me = Holder.this()
    with path.open("a+", encoding="utf-8") as file:
        is_sure = _locked(file, folder)
        before = Holder.read(file)
        if before is not None and before != me:
            if not ((is_sure and before.kernel == me.kernel) or before.is_before(me)):
                _wait_until_dead(path, folder, before)
            say(f"{folder}: {before} is gone without a word: its lock is taken over")
        _write(file, json.dumps(asdict(me)))
        over = threading.Event()
        heart = threading.Thread(target=_beat, args=(path, me, over), daemon=True, name="lock")
        heart.start()
        try:
            yield
        finally:
            over.set()
            heart.join()
            if me.other_in(path) is None:
                _write(file, "")


def holder_of(folder: Path) -> Holder | None:
    """Who trains in a folder now, as far as can be told at once and without writing there."""
    path = folder / ".lock"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        if (holder := Holder.read(file)) is None:
            return None
        try:
            is_sure = take_lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return holder
        if is_sure and holder.kernel == Holder.this().kernel:  # it would hold the lock if it lived
            return None
        return holder if time.time() - path.stat().st_mtime < DEAD else None


def taken(folder: Path, by: Holder | None) -> InputError:
    """What is said to whoever would train where another does."""
    who = "" if by is None else f" ({by})"
    return InputError(f"out_dir: {folder}: another process trains here{who}: wait for it, or name another --out_dir")


def _locked(file: IO[str], folder: Path) -> bool:
    """Take the lock of this machine, and say whether there is such a thing. Raises InputError when it is taken."""
    try:
        is_sure = take_lock_within(file, LOOKS)
    except BlockingIOError:
        raise taken(folder, Holder.read(file)) from None
    if not is_sure:
        warn(f"out_dir: {folder}: its file system has no locks: a second run is told from its file alone")
    return is_sure


def _wait_until_dead(path: Path, folder: Path, holder: Holder) -> None:
    """Watch a holder that the kernel cannot see. Raises InputError when it shows that it lives."""
    seen = path.stat().st_mtime
    if (left := DEAD - (_now(folder) - seen)) > 0:
        say(f"{folder}: {holder} trained here a moment ago: looking for up to {left:.0f} s whether it still does")
    while _now(folder) - seen < DEAD:
        time.sleep(min(1.0, BEAT))
        if path.stat().st_mtime != seen:
            raise taken(folder, holder)


def _now(folder: Path) -> float:
    """The time on the file system's clock."""
    with NamedTemporaryFile(dir=folder, prefix=".clock.") as file:
        os.utime(file.name)
        return Path(file.name).stat().st_mtime


def _beat(path: Path, me: Holder, over: threading.Event) -> None:
    pauses = chain([LOOKS], repeat(BEAT))  # who began at the same moment is found soon
    while not over.wait(next(pauses)):
        try:
            if (other := me.other_in(path)) is not None:
                say(f"litrecipe: error: out_dir: {path.parent}: {other} trains here, too: this run ends unsaved")
                os._exit(1)
            os.utime(path)
        except OSError as error:
            if error.errno != errno.ENOENT:  # somebody took the folder away: told where something is written
                warn(f"{path}: {error.strerror}: other machines may take this run for dead")


def _write(file: IO[str], text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()
