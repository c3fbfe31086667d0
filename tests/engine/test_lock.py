"""Who trains in a folder: the living are told by name, the dead keep nobody."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from litrecipe.config import files
from litrecipe.config.errors import InputError
from litrecipe.engine import lock

FAR = replace(lock.Holder.this(), host="n7", kernel="another", pid=42, job="17")
"""A process on another machine, of which the kernel here knows nothing."""


@pytest.fixture(autouse=True)
def _soon_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "DEAD", 0.6)
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "LOOKS", 0.3)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def left_by(folder: Path, holder: lock.Holder, seconds_ago: float = 0.0) -> Path:
    path = folder / ".lock"
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


@contextmanager
def beating(path: Path) -> Iterator[None]:
    """The other machine's process lives."""
    over = threading.Event()
    thread = threading.Thread(target=lock._beat, args=(path, lock.Holder(**json.loads(path.read_text())), over))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_who_holds_it_is_written_while_it_does_and_touched(tmp_path: Path) -> None:
    with lock.held(tmp_path):
        path = tmp_path / ".lock"
        assert lock.Holder(**json.loads(path.read_text())) == lock.Holder.this()
        first = path.stat().st_mtime_ns
        time.sleep(lock.LOOKS + 0.3)
        assert path.stat().st_mtime_ns > first
        refused = pytest.raises(InputError, match=rf"trains here \(process {os.getpid()} on .*\): wait for it")
        with refused, lock.held(tmp_path):
            pytest.fail("both hold it")
    assert path.read_text() == ""


def test_a_process_that_was_killed_on_this_machine_keeps_nobody(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    child = os.fork()
    if child == 0:
        with lock.held(tmp_path):
            os._exit(0)
    os.waitpid(child, 0)
    began = time.monotonic()
    with lock.held(tmp_path):
        assert time.monotonic() - began < lock.DEAD / 2
    said = f"{tmp_path}: process {child} on {lock.Holder.this().host} is gone without a word: its lock is taken over"
    assert capfd.readouterr().err.splitlines() == [said]


def test_one_that_lives_on_another_machine_is_told_by_its_touch(tmp_path: Path) -> None:
    refused = pytest.raises(InputError, match=r"trains here \(process 42 on n7, Slurm job 17\): wait for it")
    with beating(left_by(tmp_path, FAR)), refused, lock.held(tmp_path):
        pytest.fail("both hold it")


@pytest.mark.parametrize(("seconds_ago", "waits"), [(0.0, True), (99.0, False)])
def test_one_that_is_dead_on_another_machine_is_waited_for_only_so_long(
    tmp_path: Path, seconds_ago: float, waits: bool
) -> None:
    left_by(tmp_path, FAR, seconds_ago)
    began = time.monotonic()
    with lock.held(tmp_path):
        assert (time.monotonic() - began > lock.DEAD * 0.8) is waits


def test_a_job_that_was_requeued_to_another_machine_goes_on_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the second of two tasks of the job that do not know one another."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with beating(left_by(tmp_path, FAR)), pytest.raises(InputError, match="on n7, Slurm job 17"), lock.held(tmp_path):
        pytest.fail("both hold it")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    path = left_by(tmp_path, FAR)
    known = json.loads(path.read_text())
    del known["restart"]  # as before there was such a thing
    path.write_text(json.dumps(known))
    began = time.monotonic()
    with lock.held(tmp_path):
        assert time.monotonic() - began < lock.DEAD / 2


def test_who_finds_another_in_the_file_gives_way_and_leaves_it_as_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of machines that share no locks, started at once; or one that was suspended and taken for dead."""
    monkeypatch.setattr(lock, "BEAT", 10.0)
    child = os.fork()
    if child == 0:
        with lock.held(tmp_path):
            left_by(tmp_path, FAR, seconds_ago=99)
            time.sleep(5)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    said = f"out_dir: {tmp_path}: process 42 on n7, Slurm job 17 trains here, too: this run ends unsaved"
    assert capfd.readouterr().err == f"litrecipe: error: {said}\n"
    assert time.time() - (tmp_path / ".lock").stat().st_mtime > 90
    with lock.held(tmp_path):
        path = left_by(tmp_path, FAR)
    assert lock.Holder(**json.loads(path.read_text())) == FAR


def test_who_looks_for_a_moment_who_trains_here_keeps_nobody(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        timer = threading.Timer(lock.LOOKS / 2, fcntl.flock, (file, fcntl.LOCK_UN))
        timer.start()
        with lock.held(tmp_path):
            assert not timer.is_alive()


def test_without_locks_the_file_alone_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(files.ABSENT[0], "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", no_lock)
    with files.locked(tmp_path / "other", "waits"):
        assert lock.holder_of(tmp_path) is None
    neighbour = replace(lock.Holder.this(), pid=1)
    with beating(left_by(tmp_path, neighbour)), pytest.raises(InputError, match="process 1 on"), lock.held(tmp_path):
        pytest.fail("both hold it")
    assert "its file system has no locks" in capfd.readouterr().err


def test_who_holds_it_can_be_asked_without_waiting(tmp_path: Path) -> None:
    """Nobody at first and afterwards; of this machine whoever the kernel knows, of another whoever was heard lately."""
    assert lock.holder_of(tmp_path) is None
    with lock.held(tmp_path):
        assert lock.holder_of(tmp_path) == lock.Holder.this()
    assert lock.holder_of(tmp_path) is None
    left_by(tmp_path, lock.Holder.this())
    assert lock.holder_of(tmp_path) is None, "it would hold the kernel's lock"
    left_by(tmp_path, FAR)
    assert lock.holder_of(tmp_path) == FAR
    left_by(tmp_path, FAR, seconds_ago=99.0)
    assert lock.holder_of(tmp_path) is None
