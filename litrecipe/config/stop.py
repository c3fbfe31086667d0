"""Signals: how a run is asked to stop, and how it answers.

SIGTERM and SIGUSR1 (pre-emption, a time limit that nears) end with exit code 85, Ctrl-C with 130. While there is
nothing to save, a signal ends the program at once. While there is (inside `deferred()`), it is only noted; whoever
holds the state looks at `requested()` between two pieces of work, saves, and raises `Stopped`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTED = 85
INTERRUPTED = 130

_received: int | None = None
_deferred = 0
_interruptible = False


class Stopped(SystemExit):
    """Ends the program because a signal asked for it; `code` is 85 or 130."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(INTERRUPTED if signal_number == signal.SIGINT else PREEMPTED)


def install() -> None:
    """Take over SIGTERM, SIGUSR1 and SIGINT. Call this before the first slow import."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _on_signal)


def _on_signal(number: int, _frame: FrameType | None) -> None:
    global _received
    impatient = _received == signal.SIGINT == number
    _received = number
    if not _deferred or impatient:
        raise Stopped(number)


def requested() -> int | None:
    """The signal that asked us to stop, if one did."""
    return _received


def poll() -> None:
    """Stop here if asked to. For loops that hold no state worth saving."""
    if _received is not None and (_interruptible or not _deferred):
        raise Stopped(_received)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal is noted and waits for whoever holds the state. A second Ctrl-C does not wait."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1


@contextmanager
def interruptible(allowed: bool = True) -> Iterator[None]:
    """Within `deferred()`: a stretch of work (an evaluation) that `poll()` may cut short, because it can be redone."""
    global _interruptible
    before, _interruptible = _interruptible, allowed
    try:
        yield
    finally:
        _interruptible = before
