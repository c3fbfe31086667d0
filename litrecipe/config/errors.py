"""The one exception for wrong input."""

from __future__ import annotations

WRONG_INPUT = 2
"""The exit code of a program that was given what it cannot work with."""


class InputError(Exception):
    """Something the user gave us is wrong; ends the program with exit code 2 and no traceback.

    `mistakes` holds one line a mistake, each `<key or file:line>: <value>: <cure>`; all mistakes that can be found
    are gathered before this is raised.
    """

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = list(mistakes)
