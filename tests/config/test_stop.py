"""Signals and what becomes of them, each case in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

POOL = """
import multiprocessing as mp
from litrecipe.config import stop
stop.install()
with stop.deferred():
    for _ in range(12):
        with mp.get_context("fork").Pool(2) as pool:
            assert list(pool.imap(abs, [-1])) == [1]
"""
TO_THE_CHILD = """
import os, signal
from litrecipe.config import stop
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
stop.install()
with stop.deferred():
    child = os.fork()
    if not child:
        os._exit(3)  # it did not hear
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
TO_THE_PARENT = """
import contextlib, os, signal
from litrecipe.config import stop
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGUSR1))
stop.install()
with {}:
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    print(stop.requested() == signal.SIGUSR1)
"""
TWICE_INSTALLED = """
import os, signal
from litrecipe.config import stop
stop.install()
stop.install()
for _ in range(2):
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
signal.raise_signal(signal.SIGTERM)
print("never")
"""
POLL = """
import signal
from litrecipe.config import stop
stop.install()
asked = []
def agreed():
    asked.append(1)
    return signal.SIGUSR1 if len(asked) == 2 else None
with stop.deferred():
    signal.raise_signal(signal.SIGINT)
    stop.poll()
    with stop.interruptible(agreed):
        stop.poll()
        print("not yet agreed", flush=True)
        stop.poll()
    print("never")
"""

TWICE = """
import os, signal
from litrecipe.config import stop
stop.install()
os.dup2(1, 2)
try:
    with stop.deferred():
        signal.raise_signal(signal.SIGINT)
        print("goes on", flush=True)
        signal.raise_signal(signal.SIGINT)
        print("never", flush=True)
finally:
    print("never", flush=True)
"""

NOBODY_READS = """
import os, signal
from rich.table import Table
from litrecipe.config import progress, stop
reads, writes = os.pipe()
os.close(reads)
os.dup2(writes, 2)
stop.install()
with stop.deferred():
    signal.raise_signal(signal.SIGINT)
    os.dup2(writes, 2)
    progress.show_table(Table("a"))
    os.dup2(writes, 2)
    progress.Line().show("saved", last=True)
    print("saved", flush=True)
os.dup2(writes, 2)
progress.tell_mistakes(["a: b: c"])
stop.poll()
"""
LET_GO = """
import atexit, os, signal, sys
from litrecipe.config import stop
os.dup2(1, 2)
stop.install()
atexit.register(signal.raise_signal, signal.SIG{})
stop.let_go()
sys.exit({})
"""


def run(program: str) -> tuple[int, str]:
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        out, _ = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("hangs")
    return process.returncode, out


def test_a_pool_ends_while_signals_are_deferred() -> None:
    assert run(POOL) == (0, "")


def test_a_signal_in_the_midst_of_a_fork_is_not_lost() -> None:
    assert run(TO_THE_CHILD) == (0, "-15\n")
    assert run(TO_THE_PARENT.format("stop.deferred()")) == (0, "True\n")
    assert run(TO_THE_PARENT.format("contextlib.nullcontext()")) == (85, "")


def test_signals_come_through_after_a_fork_however_often_it_was_installed() -> None:
    assert run(TWICE_INSTALLED) == (85, "")


def test_ranks_stop_where_they_agree_to() -> None:
    assert run(POLL) == (85, "not yet agreed\n")


def test_a_second_ctrl_c_ends_the_program_where_it_stands() -> None:
    code, said = run(TWICE)
    assert code == 130
    assert [line for line in said.splitlines() if line] == [
        "litrecipe: stopping after this step; Ctrl-C again ends at once, without saving",
        "goes on",
        "litrecipe: stopped at once, nothing saved; the newest checkpoint is as it was",
    ]


def test_where_nobody_reads_what_is_said_a_run_goes_on_and_ends_as_it_should() -> None:
    """`2>&1 | tee log`, and Ctrl-C, of which tee dies, too."""
    assert run(NOBODY_READS) == (130, "saved\n")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 85), ("SIGUSR1", 85), ("SIGINT", 130)])
def test_with_nothing_to_save_a_signal_ends_the_program(name, code) -> None:
    program = f"import signal; from litrecipe.config import stop; stop.install(); signal.raise_signal(signal.{name})"
    assert run(program) == (code, "")


@pytest.mark.parametrize(
    ("name", "settled", "code"), [("TERM", 0, 0), ("TERM", 85, 85), ("USR1", 0, 0), ("INT", 0, -2)]
)
def test_a_signal_on_the_way_out_changes_no_exit_code_but_for_ctrl_c(name, settled, code) -> None:
    assert run(LET_GO.format(name, settled)) == (code, "")
