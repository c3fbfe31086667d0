"""A child process is told to stop when its parent is, once, and does not outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from litrecipe.config import stop
from litrecipe.engine.child import FAILED, run_child

PARENT = """
import sys
from litrecipe.config import stop
from litrecipe.engine.child import run_child
stop.install()
with stop.deferred():
    code = run_child([sys.executable, "-c", open(sys.argv[1]).read(), sys.argv[2]])
sys.exit(code)
"""
CHILD = """
import os, signal, sys, time
folder = sys.argv[1]
heard = []
def hear(number, _):
    heard.append(number)
    open(f"{folder}/heard", "a").write(f"{number}\\n")
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, hear)
open(f"{folder}/pid.new", "w").write(str(os.getpid()))
os.rename(f"{folder}/pid.new", f"{folder}/pid")
end = time.monotonic() + 60
while not heard and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.7)  # were a second signal to come, it would come now
sys.exit(42 if heard else 43)
"""


def start(tmp_path: Path, child: str = CHILD) -> tuple[subprocess.Popen[str], int]:
    """A parent with a group of its own, as a shell starts one, and the pid of its child."""
    (tmp_path / "child.py").write_text(child)
    command = [sys.executable, "-c", PARENT, str(tmp_path / "child.py"), str(tmp_path)]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)
    end = time.monotonic() + 60
    while not (tmp_path / "pid").exists():
        assert parent.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    return parent, int((tmp_path / "pid").read_text())


def is_alive(pid: int) -> bool:
    """Whether it runs: not gone, nor dead and unburied (nobody in a container may bury what was left behind)."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("code", [0, 1, 2, 85, 130])
def test_the_exit_code_comes_back_as_it_is(code: int) -> None:
    with stop.deferred():
        assert run_child([sys.executable, "-c", f"raise SystemExit({code})"]) == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_group_reaches_the_child_once_and_is_waited_for(tmp_path: Path, number: int) -> None:
    """As Ctrl-C at a terminal does, which all processes of the foreground's group get."""
    parent, _ = start(tmp_path)
    os.killpg(parent.pid, number)
    assert parent.wait(60) == 42
    assert (tmp_path / "heard").read_text() == f"{number}\n"
    assert parent.stderr is not None and parent.stderr.read() == "", "the child says what becomes of it"


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_child_of_ours_is_asked_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_ours: bool) -> None:
    """srun would end its tasks."""
    monkeypatch.setattr(
        sys.modules[__name__], "PARENT", PARENT.replace("sys.argv[2]]", f"sys.argv[2]], is_ours={is_ours}")
    )
    parent, pid = start(tmp_path, CHILD.replace("signal.SIGINT)", "signal.SIGQUIT)"))
    parent.send_signal(stop.WHERE)
    if not is_ours:
        assert parent.stderr is not None and "most recent call first" in parent.stderr.readline()
        os.kill(pid, stop.WHERE)
    assert parent.wait(60) == 42


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGUSR1, 85), (signal.SIGINT, 130)])
def test_a_child_that_cannot_answer_yet_counts_as_stopped(tmp_path: Path, number: int, code: int) -> None:
    deaf = CHILD.replace("signal.signal(number, hear)", "signal.signal(number, signal.SIG_DFL)")
    parent, pid = start(tmp_path, deaf)
    parent.send_signal(number)
    assert parent.wait(60) == code
    assert not is_alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends what a dead process has started")
@pytest.mark.parametrize("twice", [False, True])
def test_nothing_outlives_a_parent_that_is_killed(tmp_path: Path, twice: bool) -> None:
    """By kill -9, or by a second Ctrl-C, which ends at once."""
    parent, pid = start(tmp_path, CHILD.replace("0.7", "60"))
    assert is_alive(pid)
    if twice:
        for _ in range(2):
            parent.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert parent.wait(10) == 130
    else:
        parent.kill()
        parent.wait(10)
    end = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_alive(pid)


def test_a_child_that_was_killed_is_a_failure_that_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with stop.deferred():
        assert run_child([sys.executable, "-c", program]) == FAILED
    assert "killed by SIGKILL: was there enough memory?" in capfd.readouterr().err
