"""A row of a data file → a conversation. Says what is wrong with a row, and where. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, Protocol

from litrecipe import __version__
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.config.progress import track
from litrecipe.data.cache import alone, cache_folder, key_of
from litrecipe.data.readers import Located, Mistakes, check_sources, read_rows, source_hash

Message = dict[str, Any]
Layout = Literal["messages", "prompt_completion", "alpaca", "sharegpt", "text"]

RESERVED = "\ufdd0\ufdd1\ufdd2"
"""Unicode noncharacters, set aside for use inside a program; template.py marks places in a text with them."""

CHECK_VERSION = 2
"""Raise it when other rows are refused than before."""

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
MAY_FOLLOW = {
    "system": ("start",),
    "developer": ("start", "system"),
    "user": ("start", "system", "developer", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Role → the roles it may come after."""

COLUMNS: dict[Layout, tuple[str, ...]] = {
    "messages": ("messages", "tools"),
    "prompt_completion": ("prompt", "completion", "system"),
    "alpaca": ("instruction", "input", "output", "system"),
    "sharegpt": ("conversations", "system", "tools"),
    "text": ("text",),
}
"""Layout → the names of its columns; `data.columns` maps them to a file's own names."""

NEEDED: dict[Layout, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""Layout → the columns by which a row is recognised, in this order."""


@dataclass(frozen=True)
class Conversation:
    """What one row says."""

    messages: list[Message]
    """Each with `role` and `content`, and what else the row gave (`tool_calls`, …). A text is one assistant turn."""
    where: str
    """`file:line`."""
    layout: Layout = "messages"
    """`prompt_completion` and `text` can do without a chat template; `text` never meets one."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The row's other columns; `tools` is given to the chat template."""

    @property
    def empty_turn(self) -> Message | None:
        """The first turn without a word, if any. Public data sets have some; nothing can be learnt from such a row."""
        return next(filter(is_empty, self.messages), None)

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """Descriptions of the tools the conversation may call."""
        return self.extra.get("tools")


def is_empty(message: Message) -> bool:
    """Whether a turn says and does nothing."""
    return message["role"] != "tool" and not message.get("tool_calls") and not message["content"].strip()


class RowError(InputError):
    """What is wrong with one row, as `<what>: <cure>`; whoever knows the row puts `file:line` before it."""


def read_conversations(source: str, data: Data, mistakes: Mistakes | None = None) -> Iterator[Conversation]:
    """The conversations of a source in order; wrong rows are noted in `mistakes`, or raised together at the end."""
    gathered = Mistakes() if mistakes is None else mistakes
    yield from parse_rows(read_rows(source, gathered), data, gathered)
    if mistakes is None:
        gathered.raise_if_any()


def parse_rows(rows: Iterable[Located], data: Data, mistakes: Mistakes) -> Iterator[Conversation]:
    """Conversations of rows, in the layout and with the column names that `data` gives."""
    layouts = list(COLUMNS) if data.format == "auto" else [data.format]
    check_columns(data.columns, list(dict.fromkeys(name for layout in layouts for name in COLUMNS[layout])))
    for row, where in rows:
        try:
            yield parse_row(row, where, data)
        except RowError as error:
            mistakes.add(f"{where}: {error}")


class Reader(Protocol):
    """The rows of a source, parsed, in order; wrong ones are noted in `mistakes`, or raised together at the end."""

    __name__: str

    def __call__(self, source: str, data: Data, mistakes: Mistakes | None = None) -> Iterator[Any]: ...


def check_rows(data: Data, read: Reader = read_conversations) -> int:
    """Check every row of `data.train` and `data.val`; returns how many there are.

    Raises InputError with all mistakes of both. Needs no torch, so that a bad file is found in the first second.
    """
    sources = {key: source for key, source in (("data.train", data.train), ("data.val", data.val)) if source}
    check_sources(sources)
    mistakes = Mistakes()
    count = sum(count_rows(source, data, mistakes, read) for source in sources.values())
    mistakes.raise_if_any()
    return count


def check_columns(columns: dict[str, str], known: Sequence[str]) -> None:
    """Raise InputError for keys of `data.columns` that are not `known`."""
    mistakes = []
    for ours, theirs in columns.items():
        if ours not in known:
            near = get_close_matches(ours, known, n=1)
            meant = f"{{{theirs}: {ours}}}" if theirs in known else f"{{{near[0]}: {theirs}}}" if near else ""
            hint = f"did you mean {meant}? " if meant else ""
            mistakes.append(f"data.columns: {ours}: {hint}our names come first, and are {', '.join(known)}")
    if mistakes:
        raise InputError(*mistakes)


def count_rows(source: str, data: Data, mistakes: Mistakes, read: Reader = read_conversations) -> int:
    """How many rows a source has. A source without mistakes is read once and its count remembered."""
    key = key_of(CHECK_VERSION, __version__, read.__name__, source_hash(source), data.format, data.columns)
    remembered = cache_folder(data) / "checked" / key
    if remembered.is_file():
        return int(remembered.read_text())
    before = mistakes.count
    count = sum(1 for _ in track(read(source, data, mistakes), f"checking {source}"))
    if mistakes.count == before:
        with alone(remembered):
            part = remembered.with_suffix(".part")
            part.write_text(str(count))
            part.replace(remembered)
    return count


def parse_row(row: dict[str, Any], where: str, data: Data) -> Conversation:
    """The conversation in a row; raises RowError."""
    layout: Layout = recognise(row, data.columns) if data.format == "auto" else data.format
    mapped = {name: data.columns.get(name, name) for name in COLUMNS[layout]}
    missing = [mapped[name] for name in NEEDED[layout] if row.get(mapped[name]) is None]
    if missing:
        names, have = ", ".join(map(repr, missing)), ", ".join(row) or "none"
        raise RowError(f"column {names} is missing or null (it has {have}): set data.columns or data.format")
    fields = {name: row[column] for name, column in mapped.items() if row.get(column) is not None}
    messages = _READERS[layout](fields)
    if layout == "prompt_completion" and isinstance(fields["prompt"], list):
        layout = "messages"
    extra = {name: value for name, value in row.items() if name not in mapped.values()}
    if "tools" in fields:
        extra["tools"] = _tools(fields["tools"])
    check_messages(messages, starts_anyhow=layout == "text")
    return Conversation(messages, where, layout, extra)


def recognise(row: dict[str, Any], columns: dict[str, str]) -> Layout:
    """The layout whose columns a row has, if need be as nulls; raises RowError when none fits."""
    filled = {name for name, value in row.items() if value is not None}
    for present in (filled, set(row)):
        for layout, names in NEEDED.items():
            if present.issuperset(columns.get(name, name) for name in names):
                return layout
    raise RowError(
        f"columns {', '.join(row) or 'none'}: known are messages, prompt + completion, instruction + output, "
        "conversations, text: name yours with data.columns"
    )


def from_messages(fields: dict[str, Any]) -> list[Message]:
    """Messages of the column `messages`; raises RowError."""
    given = _list_of_objects(fields, "messages")
    messages = [{key: value for key, value in message.items() if value is not None} for message in given]
    for number, message in enumerate(messages, start=1):
        for key in ("role", "content"):
            if key not in message and not (key == "content" and message.get("tool_calls")):
                raise RowError(f"message {number} has no {key!r}: every message needs role and content")
    return messages


def _from_prompt_completion(fields: dict[str, Any]) -> list[Message]:
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):  # both as messages
        return from_messages({"messages": prompt + completion})
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return system_message(fields) + messages


def _from_alpaca(fields: dict[str, Any]) -> list[Message]:
    instruction, given = fields.get("instruction"), fields.get("input")
    asked = f"{instruction}\n{given}" if isinstance(instruction, str) and given else instruction
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": fields.get("output")}]
    return system_message(fields) + messages


def from_sharegpt(fields: dict[str, Any]) -> list[Message]:
    """Messages of the column `conversations`, after one of `system`; raises RowError."""
    turns = _list_of_objects(fields, "conversations")
    if turns and "role" in turns[0]:  # the messages format under this name
        return from_messages({"messages": turns})
    messages = system_message(fields)
    for number, turn in enumerate(turns, start=1):
        if "from" not in turn or "value" not in turn:
            raise RowError(f"turn {number} has {', '.join(turn) or 'nothing'}: a ShareGPT turn needs from and value")
        if turn["from"] not in list(SHAREGPT_ROLES):
            raise RowError(f"turn {number}: from={turn['from']!r}: known are {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return messages


def _from_text(fields: dict[str, Any]) -> list[Message]:
    return [{"role": "assistant", "content": fields.get("text")}]


_READERS: dict[Layout, Callable[[dict[str, Any]], list[Message]]] = {
    "messages": from_messages,
    "prompt_completion": _from_prompt_completion,
    "alpaca": _from_alpaca,
    "sharegpt": from_sharegpt,
    "text": _from_text,
}


def system_message(fields: dict[str, Any]) -> list[Message]:
    """The column `system` as a message, if there is one."""
    return [{"role": "system", "content": fields["system"]}] if fields.get("system") else []


def _tools(tools: Any) -> list[dict[str, Any]]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowError(f"tools are not valid JSON ({error.msg}): give a list of function descriptions") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools are no list of objects: give a list of function descriptions")
    return tools


def _list_of_objects(fields: dict[str, Any], name: str) -> list[Message]:
    items = fields.get(name)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RowError(f"{name} is no list of objects: give [{{…}}, …]")
    return items


def check_messages(messages: list[Message], *, starts_anyhow: bool = False) -> None:
    """Raise RowError unless the roles alternate, end with the assistant, and everything said is usable text."""
    if not messages:
        raise RowError("no messages: drop the row")
    before = "start"
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in list(MAY_FOLLOW):  # a list, because a role may be anything, unhashable too
            raise RowError(f"message {number}: role {role!r}: known are {', '.join(MAY_FOLLOW)}")
        if before not in MAY_FOLLOW[role] and not starts_anyhow:
            raise RowError(f"message {number}: {role} after {before}: turns go system, user, assistant, user, …")
        _check_content(message, number)
        before = role
    if before != "assistant":
        raise RowError(f"the last turn is the {before}'s: a conversation to learn from ends with the assistant")


def _check_content(message: Message, number: int) -> None:
    content = message.get("content")
    if isinstance(content, list):  # parts, as for models that also see images
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise RowError(f"message {number}: content has parts that are not text: only text can be trained on")
        content = message["content"] = "".join(part["text"] for part in content)
    if content is None and message.get("tool_calls"):
        return
    if not isinstance(content, str):
        raise RowError(f"message {number} ({message['role']}): content is {type(content).__name__}: give text")
    if any(mark in content for mark in RESERVED) or not is_unicode(content):
        raise RowError(
            f"message {number} ({message['role']}): holds a code point that is not text (a lone surrogate or U+FDD0 to "
            "U+FDD2): remove it"
        )


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; one with lone surrogates cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
