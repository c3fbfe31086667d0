"""Signals: how a run is asked to stop, and how it answers.

SIGTERM and SIGUSR1 (pre-emption, a time limit that nears) end with exit code 85, Ctrl-C with 130. While there is
nothing to save, a signal ends the program at once. While there is (inside `deferred()`), it is only noted; whoever
holds the state looks at `requested()` between two pieces of work, saves, and raises `Stopped`. A second Ctrl-C ends
the program where it stands, with 130.

SIGQUIT (Ctrl-\\ at a terminal) stops nothing: every thread says where it is, whatever it waits for.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from litrecipe.config.progress import is_first_process, tell_past_buffers

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
WHERE = signal.SIGQUIT
"""Asks where a run is that stands still."""
ANSWERED_AT = "LITRECIPE_WHERE"
"""Environment of a rank that another process watches: the file descriptor at which that waits for the answer."""
PREEMPTED = 85
INTERRUPTED = 130
AFTER_THIS_STEP = "\nlitrecipe: stopping after this step; Ctrl-C again ends at once, without saving\n"
AT_ONCE = "\nlitrecipe: stopped at once, nothing saved; the newest checkpoint is as it was\n"

_answered_at = 2
_hooked = False
"""Whether forks are looked after; what is registered for them stays."""
_fork = threading.local()
"""Whether this thread is in the midst of a fork, and which signals it blocks otherwise."""
_received: int | None = None
_deferred = 0
_child_speaks = False
"""Whether a child, to which signals are passed on, says what becomes of them."""
_asked: Callable[[], int | None] | None = None
"""How `poll()` learns of a signal while signals are deferred; None where it must not."""


class Stopped(SystemExit):
    """Ends the program because a signal asked for it; `code` is 85 or 130."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(INTERRUPTED if signal_number == signal.SIGINT else PREEMPTED)


def install() -> None:
    """Take over SIGTERM, SIGUSR1, SIGINT and SIGQUIT. Call this before the first slow import.

    Forked children inherit only the last of these: a `multiprocessing.Pool` ends its workers by SIGTERM, and a worker
    that only noted the signal would never end. A signal that comes while a child is made waits until its handlers are
    its own.
    """
    global _hooked
    for number in SIGNALS:
        signal.signal(number, _on_signal)
    tell_where_asked()
    if not _hooked:
        os.register_at_fork(before=_hold_back, after_in_parent=_let_through, after_in_child=_leave_to_parent)
        _hooked = True


def tell_where_asked() -> None:
    """Let `WHERE` write the stacks of all threads to standard error, or to who watches, whatever they wait for."""
    global _answered_at
    _answered_at = int(os.environ.pop(ANSWERED_AT, _answered_at))  # what this process starts has a standard error only
    faulthandler.register(WHERE, file=_answered_at, all_threads=True)


def let_go() -> None:
    """On the way out, when the exit code is settled: no signal but Ctrl-C changes it any more.

    Who started this one may pass on a signal that comes a moment too late, or send it a second time.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _hold_back() -> None:
    _fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _fork.under_way = True


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _fork.mask)
    _fork.under_way = False


def _leave_to_parent() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _let_through()


def _on_signal(number: int, _frame: FrameType | None) -> None:
    global _received
    if _received == signal.SIGINT == number:
        # Whatever was interrupted may hold locks: nothing of it may run on, and nothing be printed the usual way.
        tell_past_buffers(AT_ONCE if _deferred else "\nlitrecipe: stopped at once\n")
        os._exit(INTERRUPTED)
    _received = number
    if not _deferred:
        stopped = Stopped(number)
        if is_first_process():
            tell_past_buffers(f"\nlitrecipe: stopped by {signal.Signals(number).name}; nothing had to be saved\n")
        if getattr(_fork, "under_way", False):  # Python drops what is raised in the midst of a fork
            os._exit(int(stopped.code or 0))
        raise stopped
    if number == signal.SIGINT and is_first_process() and not _child_speaks:
        tell_past_buffers(AFTER_THIS_STEP)


def requested() -> int | None:
    """The signal that asked us to stop, if one did."""
    return _received


def poll() -> None:
    """Stop here if asked to. For loops that hold no state worth saving."""
    if _deferred and _asked is None:
        return
    number = (_asked or requested)()
    if number is not None:
        raise Stopped(number)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal is noted and waits for whoever holds the state. A second Ctrl-C saves nothing."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1


@contextmanager
def child_speaks() -> Iterator[None]:
    """Inside, a child to which signals are passed on answers Ctrl-C at the terminal, and nobody else."""
    global _child_speaks
    _child_speaks = True
    try:
        yield
    finally:
        _child_speaks = False


@contextmanager
def interruptible(asked: Callable[[], int | None] = requested) -> Iterator[None]:
    """Within `deferred()`: a stretch of work (an evaluation) that `poll()` may cut short, because it can be redone.

    Ranks that work in lockstep, and so poll equally often, give as `asked` what they agree on: then all stop at the
    same place.
    """
    global _asked
    before, _asked = _asked, asked
    try:
        yield
    finally:
        _asked = before
