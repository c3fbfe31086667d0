"""A command line taken apart, with one line for each mistake in it."""

from __future__ import annotations

import json
from copy import copy
from difflib import get_close_matches
from typing import Any

Option = tuple[type, Any, str]
"""Type (bool, int, or list: a text each time that it is given), default, meaning."""


class Line:
    """A command line taken apart: recipes, flags, and options that are no keys."""

    def __init__(self, keys: dict[str, Any], options: dict[str, Option], words: str = "") -> None:
        """`words` is the key of words that belong to no flag, if they have one."""
        self.keys = keys
        self.words = words
        self.kinds = {option: kind for option, (kind, _, _) in options.items()}
        self.options = {option: copy(default) for option, (_, default, _) in options.items()}
        self.configs: list[str] = []
        self.flags: list[tuple[str, str]] = []
        self.help: str | None = None
        self.mistakes: list[str] = []

    def read(self, argv: list[str]) -> None:
        """Go through the line once; what is wrong is added to `mistakes`."""
        rest = list(reversed(argv))
        words = []
        while rest:
            word = rest.pop()
            if word in ("-h", "--help"):
                self.help = rest.pop() if rest and not rest[-1].startswith("-") else ""
                return
            if not word.startswith("--") and self.words:
                words.append(word)
                continue
            if not word.startswith("--"):
                self.mistakes.append(f"{word}: belongs to no flag: a recipe is given as `--config {word}`")
                continue
            name, equals, value = word[2:].partition("=")
            if not name:
                self.mistakes.append(f"{word}: names no key: write `--KEY VALUE`")
                continue
            has_value = bool(equals) or (bool(rest) and not rest[-1].startswith("--") and rest[-1] != "-h")
            if near := self._misspelt(name):
                self.mistakes.append(f"--{name}: no such flag: did you mean `--{near}`?")
                if has_value and not equals:
                    rest.pop()
                continue
            if not has_value and not self._is_switch(name):
                cure = f"write `--{name} VALUE`, or where that begins with two dashes `--{name}=--VALUE`"
                self.mistakes.append(f"--{name}: has no value: {cure}")
                continue
            if not equals:
                value = rest.pop() if has_value else "true"
            self._take(name, value)
        if words:
            self.flags.append((self.words, json.dumps(words)))

    def _misspelt(self, name: str) -> str | None:
        """The flag that a word is likely to stand for, if it is neither a flag nor a key."""
        flags = ["config", "model", "help", *self.kinds]
        if name in self.keys or name.replace("-", "_") in flags or any(key.startswith(f"{name}.") for key in self.keys):
            return None
        return next(iter(get_close_matches(name.replace("-", "_"), flags, n=1, cutoff=0.75)), None)

    def _is_switch(self, name: str) -> bool:
        return bool in (self.keys.get(name), self.kinds.get(name.replace("-", "_")))

    def _take(self, name: str, value: str) -> None:
        option = name.replace("-", "_")
        if name == "config":
            self.configs.append(value)
        elif option == "sweep" and option not in self.kinds:
            self.mistakes.append(f"--sweep: {value}: only jobs are swept: `litrecipe submit VERB … --sweep KEY=A,B`")
        elif option not in self.kinds:
            self.flags.append(("model.source" if name == "model" else name, value))
        elif self.kinds[option] is list:
            self.options[option].append(value)
        elif self.kinds[option] is bool and value in ("true", "false"):
            self.options[option] = value == "true"
        elif self.kinds[option] is int and value.isdecimal() and int(value) > 0:
            self.options[option] = int(value)
        else:
            wanted = "true or false" if self.kinds[option] is bool else "a whole number above 0"
            self.mistakes.append(f"--{option}: {value}: give {wanted}")
