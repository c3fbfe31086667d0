"""A row of a data file → what a model is asked. Says what is wrong with a row. Imports no torch.

A row is closed with a stand-in for the answer and read as the conversation, or preference, it then is: what may stand
before an answer is said in one place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from litrecipe.config.groups import Data
from litrecipe.data.formats import COLUMNS as CONVERSATION_COLUMNS
from litrecipe.data.formats import (
    SHAREGPT_ROLES,
    Conversation,
    Layout,
    Message,
    RowError,
    check_columns,
    is_empty,
    parse_row,
    system_message,
)
from litrecipe.data.preferences import COLUMNS as PREFERENCE_COLUMNS
from litrecipe.data.preferences import LISTS, Mismatch, MismatchError, parse_preference
from litrecipe.data.readers import Mistakes, read_rows

STAND_IN = "."
"""Said by nobody: closes a conversation so that it can be checked."""
ASKED: dict[str, Layout] = {
    "prompt": "prompt_completion",
    "messages": "messages",
    "conversations": "sharegpt",
    "question": "prompt_completion",
    "instruction": "alpaca",
    "text": "text",
}
"""Columns that hold what is asked, likeliest first, and the `data.format` that means them."""
MAY_BE_CLOSED = ("messages", "conversations")
"""Those that may end with an answer, which is left out."""
COLUMNS = tuple(
    dict.fromkeys([*(name for names in CONVERSATION_COLUMNS.values() for name in names), *PREFERENCE_COLUMNS])
)
"""All names that `data.columns` may give to a file's own."""


@dataclass(frozen=True, eq=False)
class Opening:
    """What one row asks."""

    where: str
    """`file:line`."""
    messages: list[Message]
    """End with the user, or a tool; empty where a text is continued."""
    text: str | None
    """What is continued as it stands: the column `text`."""
    row: dict[str, Any]
    """The whole row under its own names, for whoever judges the answer."""
    tools: list[Message] | None

    @property
    def said(self) -> list[Message] | str:
        """The messages, or the text."""
        return self.messages if self.text is None else self.text

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked, or a turn is without a word."""
        return any(map(is_empty, self.messages)) if self.text is None else not self.text.strip()

    @property
    def layout(self) -> Layout:
        """Like prompt and completion of supervised data, a single question needs no chat template."""
        if self.text is not None:
            return "text"
        return "prompt_completion" if [m["role"] for m in self.messages] == ["user"] else "messages"

    def conversation(self, answer: str) -> Conversation:
        """What it becomes with an answer."""
        extra = {"tools": self.tools} if self.tools else {}
        before = [] if self.text is None else [self.text]
        said = {"role": "assistant", "content": "".join([*before, answer])}
        return Conversation([*self.messages, said], self.where, self.layout, extra)


def read_prompts(source: str, data: Data, mistakes: Mistakes | None = None) -> Iterator[Opening | Mismatch]:
    """What the rows of a source ask, in order; wrong rows are noted in `mistakes`, or raised together at the end."""
    gathered = Mistakes() if mistakes is None else mistakes
    check_columns(data.columns, COLUMNS)
    for row, where in read_rows(source, gathered):
        try:
            yield parse_prompt(row, where, data)
        except MismatchError:
            yield Mismatch(where)
        except RowError as error:
            gathered.add(f"{where}: {error}")
    if mistakes is None:
        gathered.raise_if_any()


def parse_prompt(row: dict[str, Any], where: str, data: Data) -> Opening:
    """What a row asks: its `prompt`, or what comes before the last turn of a conversation or the answers of a
    preference.

    Columns may have other names (`data.columns`), and `data.format` may name the layout. Raises RowError, or
    MismatchError when the answers of a preference belong to different prompts.
    """
    ours = {theirs: name for name, theirs in data.columns.items()}
    fields = {ours.get(name, name): value for name, value in row.items() if value is not None}
    asked = next((name for name, layout in ASKED.items() if name in fields and data.format in ("auto", layout)), None)
    if data.format != "auto" and asked is None:
        wanted = " or ".join(name for name, layout in ASKED.items() if layout == data.format)
        raise RowError(f"columns {', '.join(row) or 'none'}: {wanted} is missing or null: set data.columns")
    if data.format == "auto" and "chosen" in fields and "rejected" in fields:  # may be whole conversations
        return Opening(where, parse_preference(fields, where).prompt, None, row, None)
    if asked is not None:
        closed, layout = _closed(fields, asked)
        return _open_again(parse_row(closed, where, Data(format=layout)), row)
    if any(name in fields for name in LISTS):
        return Opening(where, parse_preference(fields, where).prompt, None, row, None)
    raise RowError(
        f"columns {', '.join(row) or 'none'}: known are {', '.join(ASKED)}, chosen + rejected: name yours with "
        "data.columns"
    )


def _open_again(conversation: Conversation, row: dict[str, Any]) -> Opening:
    *messages, last = conversation.messages
    text = last["content"] if conversation.layout == "text" else None
    return Opening(conversation.where, messages, text, row, conversation.tools)


def _closed(fields: dict[str, Any], asked: str) -> tuple[dict[str, Any], Layout]:
    """The columns of a conversation whose last turn is the stand-in's; what cannot be read stays as it is."""
    value = fields[asked]
    beside = {name: fields[name] for name in ("system", "tools", "input") if name in fields}
    if asked == "text":
        return {"text": value}, "text"
    if asked in ("question", "instruction") and not isinstance(value, list):
        return beside | {"instruction": value, "output": STAND_IN}, "alpaca"
    if asked == "prompt" and not isinstance(value, list):
        value = [*system_message(fields), {"role": "user", "content": value}]
    name = "conversations" if asked == "conversations" else "messages"
    layout: Layout = "sharegpt" if asked == "conversations" else "messages"
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        is_answered = asked in MAY_BE_CLOSED and value and _speaker(value[-1]) == "assistant"
        in_sharegpt = value and "from" in value[0]
        last = {"from": "gpt", "value": STAND_IN} if in_sharegpt else {"role": "assistant", "content": STAND_IN}
        value = [*(value[:-1] if is_answered else value), last]
    return beside | {name: value}, layout


def _speaker(turn: dict[str, Any]) -> str | None:
    said_by = turn.get("role", turn.get("from"))
    return SHAREGPT_ROLES.get(said_by) if isinstance(said_by, str) else None
