"""Sweeps: keys with several values each, and a run for every combination of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from litrecipe.config.errors import InputError

LONGEST_NAME = 100
"""Characters of a folder's name."""
REFUSED = {
    "out_dir": "each point has a folder of its own in it",
    "schema_version": "it is the same for all",
    "checkpoint.resume": "each point goes on where it is",
}
GROUPS_REFUSED = {
    "slurm.": "all points are tasks of one job",
    "fabric.devices": "all points have the same machines",
    "fabric.num_nodes": "all points have the same machines",
}


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """Of its folder: `lr=1e-4,r=8` would be two words to a list, so it is `lr=1e-4_r=8`."""
    flags: list[tuple[str, str]]
    """Key and text, as on a command line."""


def points_of(sweeps: Sequence[str]) -> list[Point]:
    """The grid of `KEY=V1,V2,...`, the last key changing fastest; none for no sweeps.

    Raises InputError for what is no sweep; whether there are such keys and values, recipes say.
    """
    mistakes: list[str] = []
    values: dict[str, list[str]] = {}
    for text in sweeps:
        key, equals, written = text.partition("=")
        key = "model.source" if key == "model" else key.strip()
        found = [value.strip() for value in pieces(written)]
        refused = REFUSED.get(key) or next((why for at, why in GROUPS_REFUSED.items() if key.startswith(at)), None)
        if not equals or not key or not all(found) or not found:
            mistakes.append(f"--sweep: {text}: write a key and its values: --sweep optim.lr=1e-4,2e-4")
        elif key in values:
            mistakes.append(f"--sweep: {text}: {key} has values already: write them in one")
        elif refused:
            mistakes.append(f"--sweep: {key}: {refused}: sweep another key")
        elif len(set(found)) < len(found):
            mistakes.append(f"--sweep: {text}: has a value twice: remove one")
        else:
            values[key] = found
    if mistakes:
        raise InputError(*mistakes)
    if not values:
        return []
    grid = [list(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    return [Point(name, flags) for name, flags in zip(_names(grid), grid, strict=True)]


def pieces(text: str) -> Iterator[str]:
    """Text cut at commas that stand in no bracket and in no quotes."""
    begin = depth = 0
    quote = ""
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[begin:at]
            begin = at + 1
    yield text[begin:]


def _names(grid: list[list[tuple[str, str]]]) -> list[str]:
    """A folder's name for each point: last words of keys where these differ, and values in plain letters."""
    keys = [key for key, _ in grid[0]]
    last = [key.rpartition(".")[2] for key in keys]
    short = {key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)}
    names = ["_".join(f"{short[key]}={_plain(value)}" for key, value in point)[:LONGEST_NAME] for point in grid]
    # Values that differ only in what is no plain letter, or far behind, are told apart by their number.
    return [name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)]


def _plain(value: str) -> str:
    """A value as a part of a file's name; of a path the last piece."""
    last = value.rstrip("/").rpartition("/")[2] or value
    return re.sub(r"[^\w.+-]+", "-", last).strip("-") or "value"
