"""The progress line goes away when what it tells of ends, however it ends."""

from __future__ import annotations

import os
import pty
import sys

import pytest

from litrecipe.config import progress


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[progress.Line]:
    """Every line made while the test runs; they are shown at once, as on a terminal."""
    made: list[progress.Line] = []

    class Noted(progress.Line):
        def __init__(self) -> None:
            super().__init__()
            self._last -= 60
            self._terminal = True
            made.append(self)

    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "Line", Noted)
    return made


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_loop_takes_the_line_away(lines: list[progress.Line], error: type[BaseException]) -> None:
    with pytest.raises(error):
        for item in progress.track(range(10), "counting"):
            if item == 5:
                assert lines[0]._live is not None
                raise error
    assert lines[0]._live is None


def test_an_exception_in_what_is_tracked_takes_the_line_away(lines: list[progress.Line]) -> None:
    def broken():
        yield from range(5)
        raise ValueError

    with pytest.raises(ValueError):
        list(progress.track(broken(), "counting", total=10))
    assert lines[0]._live is None


@pytest.mark.parametrize(
    ("seconds", "words"), [(4, "4 s"), (99, "99 s"), (100, "2 min"), (3580, "1 h 0 min"), (7380, "2 h 3 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert progress.duration(seconds) == words


def on_terminal(code: str) -> bytes:
    """What a program shows on a terminal."""
    said = bytearray()

    def read(terminal: int) -> bytes:
        data = os.read(terminal, 1024)
        said.extend(data)
        return data

    assert pty.spawn([sys.executable, "-c", code], read) == 0
    return bytes(said)


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_what_takes_long_is_named_on_a_terminal_and_taken_away(seconds: float) -> None:
    code = (
        "import time; from litrecipe.config import progress; progress.PATIENCE = 0.1\n"
        f"with progress.patience('waiting'): time.sleep({seconds})\n"
        "print('done')"
    )
    said = on_terminal(code)
    assert (b"waiting" in said) == (seconds > 0)
    assert said.decode().splitlines()[-1].endswith("\x1b[2Kdone")


def test_a_first_item_that_takes_long_is_told_of_too() -> None:
    code = (
        "import time; from litrecipe.config import progress; progress.PATIENCE = 0.1\n"
        "for item in progress.track([1, 2], 'row'): time.sleep(0.3)"
    )
    said = on_terminal(code)
    assert b"row 1/2 \xe2\x80\xa6" in said and b"row 1/2 (50 %)" in said


def test_one_is_no_plural() -> None:
    assert [progress.counted(count, "step", ",") for count in (0, 1, 2, 1234)] == [
        "0 steps",
        "1 step",
        "2 steps",
        "1,234 steps",
    ]
