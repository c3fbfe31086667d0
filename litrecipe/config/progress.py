"""What a person sees while waiting: one progress line with an ETA, or plain lines where there is no terminal."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from threading import Timer
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

T = TypeVar("T")
PATIENCE = 2.0
"""Seconds of silence before progress is shown."""
PLAIN_EVERY = 10.0
"""Seconds between lines where there is no terminal."""
WIDE = 200
"""Columns where there is no terminal."""
WATCHED = "LITRECIPE_WATCHED"
"""Environment of a rank that another process watches: `heard` where that reads its standard error, else `seen`."""
WHISPER = "\x1f"
"""Begins a line that is only for who watches."""
GONE = (errno.EPIPE, errno.EIO)
"""What a pipe answers of which nobody reads any more (`2>&1 | tee log`, and Ctrl-C, of which tee dies, too), and a
terminal that was closed."""


def is_first_process() -> bool:
    """Whether this process speaks for all (others stay silent)."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0"))) or 0) == 0


@contextmanager
def heedless() -> Iterator[None]:
    """Inside, what is said on standard error may be lost, for whatever reason (also a log on a full disk): work that
    can be saved does not end as nobody listens."""
    try:
        yield
    except OSError as error:
        if error.errno in GONE:  # what is left in Python's buffer would spoil the exit code
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)


def tell_past_buffers(text: str) -> None:
    """Text on standard error, from where others may be in the midst of writing there: a signal's handler, a thread."""
    with heedless():
        os.write(2, text.encode(errors="replace"))


def say(message: str) -> None:
    """One line to the user, on standard error; of ranks but the first only who watches them hears it."""
    if is_first_process():
        with heedless():
            print(message, file=sys.stderr, flush=True)
    else:
        whisper(message)


def whisper(message: str) -> None:
    """Words for the process that watches this rank alone: its last, should it die."""
    if os.environ.get(WATCHED) == "heard":
        with heedless():
            print(*(WHISPER + line for line in message.splitlines()), sep="\n", file=sys.stderr, flush=True)


def tell_mistakes(mistakes: Iterable[str]) -> None:
    """What is wrong with the input, a line each. One process of a machine says so: the others see the same files and
    find the same, and are heard by who watches them."""
    is_first_of_machine = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0
    for mistake in mistakes:
        line = f"litrecipe: error: {' '.join(mistake.splitlines())}"
        if is_first_of_machine:
            with heedless():
                print(line, file=sys.stderr, flush=True)
        else:
            whisper(line)


def warn(message: str) -> None:
    """One line of warning."""
    say(f"litrecipe: warning: {message}")


def console() -> Console:
    """Standard output; in a pipe or a log file wide enough that no table is folded, unless $COLUMNS says otherwise."""
    from rich.console import Console

    folds = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if folds else WIDE)


def show_table(table: Table) -> None:
    """A table to the user while work goes on, on standard error."""
    if is_first_process():
        from rich.console import Console

        folds = sys.stderr.isatty() or "COLUMNS" in os.environ
        console = Console(stderr=True, width=None if folds else WIDE)
        with console.capture() as shown:  # rich itself would end the program where nobody reads
            console.print(table)
        say(shown.get().removesuffix("\n"))


def counted(count: int, noun: str, spec: str = "") -> str:
    """1 step, 2 steps; `spec` formats the number."""
    return f"{count:{spec}} {noun}" + ("" if count == 1 else "s")


def duration(seconds: float) -> str:
    """4 s, 5 min, 2 h 3 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class Line:
    """One line that is rewritten on a terminal (by rich), and printed now and then elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._speaks = is_first_process()
        self._start = time.monotonic()
        self._last = self._start
        self._live: Live | None = None

    def show(self, text: str, last: bool = False) -> None:
        """Show a state; `last` leaves it standing."""
        if not self._speaks:
            return
        now = time.monotonic()
        pause = 0.1 if self._terminal else PLAIN_EVERY
        if not last and now - self._last < pause:
            return
        self._last = now
        if last or not self._terminal:
            self.clear()
            say(text)
        else:
            with heedless():
                self._rewrite(text)

    def _rewrite(self, text: str) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        if self._live is None:
            console = Console(stderr=True)
            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()
            console.show_cursor()  # a killed run could not bring it back
        self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def clear(self) -> None:
        """Leave no half line behind."""
        if self._live is not None:
            live, self._live = self._live, None
            with heedless():
                live.stop()

    @property
    def seconds(self) -> float:
        """Since this line was made."""
        return time.monotonic() - self._start


@contextmanager
def patience(label: str) -> Iterator[None]:
    """Show `label` on a terminal while the body takes longer than two seconds; for what cannot be counted."""
    if not (sys.stderr.isatty() and is_first_process()):
        yield
        return
    timer = Timer(PATIENCE, print, [f"{label} …"], {"end": "\r", "file": sys.stderr, "flush": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        with heedless():
            print("\x1b[2K", end="", file=sys.stderr, flush=True)  # takes the line away


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield the items; after two seconds say how far it is and how long it will take."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    line = Line()
    first = ExitStack()
    first.enter_context(patience(f"{label} 1/{total}" if total else label))
    try:
        for done, item in enumerate(items):
            if done:
                first.close()
            if done and line.seconds > PATIENCE:
                rate = done / line.seconds
                if total:
                    left = duration((total - done) / rate)
                    line.show(f"{label} {done}/{total} ({100 * done // total} %) · {left} left")
                else:
                    line.show(f"{label} {done} · {rate:.0f}/s")
            yield item
    finally:
        first.close()
        line.clear()
