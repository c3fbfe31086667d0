"""Documents of texts, in a fixed order that can be taken up anywhere, each with where it stands. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from litrecipe.config.prepare import PrepareRecipe
from litrecipe.data.formats import RESERVED, is_unicode
from litrecipe.data.readers import Mistakes, file_hash, find_files, read_file, read_rows


@dataclass(frozen=True)
class Document:
    """A text."""

    text: str
    where: str
    """`file:line`."""


@dataclass(frozen=True)
class Unread:
    """A row, or what is left of a file, that is no document."""

    where: str
    why: str
    """`<what>: <cure>`, or "" for a row with an empty text."""


Event = Document | Unread


@dataclass(frozen=True)
class Input:
    """A file of a source, or a generated source."""

    source: str
    """As the user wrote it."""
    path: Path | None
    """None for a generated source."""

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size if self.path else 0

    def describe(self) -> dict[str, Any]:
        """What it is and what it holds, for a manifest."""
        if self.path is None:
            return {"source": self.source, "file": self.source, "bytes": 0, "sha256": ""}
        return {
            "source": self.source,
            "file": str(self.path),
            "bytes": self.size,
            "sha256": file_hash(self.path),
        }


@dataclass(frozen=True)
class Cursor:
    """How far the documents are read: inputs that are done, and events of the one after them."""

    input: int = 0
    events: int = 0


@dataclass(frozen=True)
class Read:
    """What was read, where reading stands after it, and how many bytes of the files are then read."""

    event: Event
    input: int
    after: Cursor
    bytes: int


class _Noted(Mistakes):
    """Mistakes, to be taken away one by one."""

    def take(self) -> Iterator[Unread]:
        for mistake in self.noted:
            where, _, why = mistake.partition(": ")
            yield Unread(where, why)
        self.noted.clear()

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def add(self, mistake: str) -> None:
        super().add(mistake)
        self.noted.append(mistake)


class Documents:
    """The documents of several sources, one after the other."""

    def __init__(
        self, sources: list[str], column: str = "text", txt: Literal["file", "line"] = "file", split: str = "train"
    ) -> None:
        """Raises InputError for sources that cannot be found."""
        self.column, self.txt = column, txt
        self.inputs: list[Input] = []
        for source in sources:
            is_made = source.startswith("toy:")
            paths: list[Path | None] = [None] if is_made else [*find_files(source, split)]
            self.inputs += [Input(source, path) for path in paths]
        self.bytes = sum(one.size for one in self.inputs)
        """Of all files."""

    @classmethod
    def of(cls, recipe: PrepareRecipe, split: str) -> Documents:
        """Those of a recipe, one split of folders that have several."""
        return cls(recipe.sources, recipe.columns.get("text", "text"), recipe.txt, split)

    def read(self, start: Cursor = Cursor()) -> Iterator[Read]:
        """What comes after a cursor; the files before it are not opened."""
        done = sum(one.size for one in self.inputs[: start.input])
        for number in range(start.input, len(self.inputs)):
            files: list[BinaryIO] = []
            skip = start.events if number == start.input else 0
            for count, event in enumerate(self._events(self.inputs[number], files), start=1):
                if count > skip:
                    here = files[0].tell() if files and not files[0].closed else 0
                    yield Read(event, number, Cursor(number, count), done + here)
            done += self.inputs[number].size

    def _events(self, one: Input, files: list[BinaryIO]) -> Iterator[Event]:
        noted = _Noted()
        if one.path is None:
            rows = read_rows(one.source, noted)
        else:
            rows = read_file(one.path, noted, whole_text=self.txt == "file", watch=files.append)
        for row, where in rows:
            yield from noted.take()
            yield self._document(row, where)
        yield from noted.take()

    def _document(self, row: dict[str, Any], where: str) -> Event:
        text = row.get(self.column)
        if text is None:
            cure = "name the column of text as columns: {text: <name>}"
            return Unread(
                where, f"column {self.column!r} is missing or null (it has {', '.join(row) or 'none'}): {cure}"
            )
        if not isinstance(text, str):
            return Unread(where, f"column {self.column!r} is {type(text).__name__}: give text")
        if any(mark in text for mark in RESERVED) or not is_unicode(text):
            return Unread(
                where, "holds a code point that is not text (a lone surrogate or U+FDD0 to U+FDD2): remove it"
            )
        if not text.strip():
            return Unread(where, "")
        return Document(text, where)
