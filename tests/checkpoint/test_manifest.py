"""A folder has its name only when it is complete, and nothing of the user's is lost on the way."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from litrecipe.checkpoint.manifest import mistakes_of, new_folder, replace_folder
from litrecipe.config.errors import InputError


def write(target: Path, text: str) -> None:
    with new_folder(target) as draft:
        (draft / "file").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_beside_it_is_not_touched(tmp_path: Path) -> None:
    """`out.tmp` may be somebody's."""
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "letter").write_text("dear")
    for text in ("old", "new"):
        write(tmp_path / "out", text)
        assert (tmp_path / "out" / "file").read_text() == text
    assert (tmp_path / "out.tmp" / "letter").read_text() == "dear"
    assert names(tmp_path) == ["out", "out.tmp"]
    assert mistakes_of(tmp_path / "out", "") == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_the_folder_has_the_permissions_the_user_wants(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "out", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == mode


def test_what_the_body_cannot_read_is_not_a_full_disk(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(FileNotFoundError, match="gone"), new_folder(tmp_path / "out") as draft:
        (draft / "file").write_text((tmp_path / "gone").read_text())
    with pytest.raises(InputError, match="make room"), new_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_where_no_folder_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(InputError, match=r"letter/out.*name a folder"):
        write(tmp_path / "letter" / "out", "text")


def test_when_the_last_renaming_fails_the_old_folder_is_back(tmp_path: Path) -> None:
    """A folder cannot be renamed into itself, though what it is to replace can be moved aside."""
    draft = tmp_path / "draft"
    write(draft / "out", "old")
    with pytest.raises(OSError, match="Invalid argument"):
        replace_folder(draft, draft / "out")
    assert (draft / "out" / "file").read_text() == "old"


KILLED = """
import os, signal, sys
from pathlib import Path
from litrecipe.checkpoint.manifest import new_folder

calls = 0
def watch(event, args):  # the kernel's own renames and removals, one after the other
    global calls
    if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

with new_folder(Path(sys.argv[1])) as draft:
    (draft / "file").write_text("new")
    sys.addaudithook(watch)
"""


def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path: Path) -> None:
    """Killed before its first renaming or removal, before its second, and so on until the program gets through."""
    for moment in range(1, 20):
        out = tmp_path / str(moment) / "out"
        write(out, "old")
        done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(moment)], timeout=60)
        whole = [path for path in out.parent.rglob("file") if mistakes_of(path.parent, "") == []]
        assert out / "file" in whole or "old" in [path.read_text() for path in whole], moment
        if done.returncode == 0:
            break
    assert done.returncode == 0
    assert moment > 3
    assert (out / "file").read_text() == "new"
    assert names(out.parent) == ["out"]
