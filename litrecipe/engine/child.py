"""A process that does a part of this one's work: it is told to stop when this one is, and does not outlive it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from litrecipe.config import stop
from litrecipe.config.progress import warn

PR_SET_PDEATHSIG = 1
"""`prctl`: the signal that the kernel sends to a process whose parent has died."""
EVERY = 0.1
"""Seconds between looks at whether we were asked to stop."""
FAILED = 1


def run_child(command: Sequence[str], *, is_ours: bool = True) -> int:
    """Run a command to its end, and return its exit code; call this within `stop.deferred()`.

    `is_ours`: it is litrecipe, and says where it is when it is asked; srun would end its tasks.

    What asks us to stop is passed on, once, and waited for: SIGTERM and SIGUSR1 end with 85, Ctrl-C with 130, also
    where the child was not yet so far that it could answer. It is a process group of its own, or Ctrl-C at a terminal
    would reach it twice, which ends a run without saving. On Linux the kernel kills it if this process is killed.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=dies_with(os.getpid()))
    if is_ours:
        ask_where(process)
    passed_on: int | None = None
    with stop.child_speaks():
        while True:
            try:
                code = process.wait(EVERY)
                break
            except subprocess.TimeoutExpired:
                number = stop.requested()
                if number is not None and passed_on is None:
                    passed_on = number
                    process.send_signal(number)
    if code >= 0:
        return code
    if passed_on is not None:
        return int(stop.Stopped(passed_on).code or 0)
    warn(f"{command[0]}: killed by {signal.Signals(-code).name}: was there enough memory?")
    return FAILED


def ask_where(*processes: subprocess.Popen[bytes]) -> None:
    """Pass on to these what asks us where we are: we wait for them."""

    def pass_on(*_: object) -> None:
        for process in processes:
            process.send_signal(stop.WHERE)

    signal.signal(stop.WHERE, pass_on)


def dies_with(parent: int) -> Callable[[], None] | None:
    """To be called in the new process: asks the kernel to kill it when its parent dies, and sees whether it has."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(FAILED)

    return ask
