"""The chat template of a model, and which of the text it renders the model shall learn.

Templates are code from strangers: they run in a sandbox that holds them to a measure (sandbox.py).

Two kinds of marks are put into the text on its way, Unicode noncharacters that no data may hold (formats.RESERVED):
- A literal control token in what somebody wrote, `<|im_end|>` in a question about chat templates, gets a mark after its
  first character before rendering. The tokenizer drops the mark only after it has looked for control tokens, so those
  that the template prints are control tokens and those that were written are plain text.
- The body of `{% generation %}` is bracketed, and the brackets become character spans.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from litrecipe.config.errors import InputError
from litrecipe.data.formats import RESERVED, Message, RowError
from litrecipe.data.sandbox import LONGEST, LONGEST_FORMAT, Sandbox

WRITTEN, LEARN, LEARNT = RESERVED[0], RESERVED[1], RESERVED[2]
"""Marks: inside a control token that somebody wrote; before and after what shall be learnt."""

LONGEST_SOURCE = 1_000_000
"""Characters of a template."""
PYTHON_ERRORS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError)
"""What a template may run into besides Jinja's own errors."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. Positions count the characters of `text`."""

    text: str
    """With WRITTEN marks in it, which the tokenizer drops."""
    learnt: list[tuple[int, int]]
    """Spans (start, stop) of what the assistant says, the end of the turn included."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: prints its body between the marks LEARN and LEARNT."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own name and type)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_bracket"), [], [], body).set_lineno(line)

    def _bracket(self, caller: Any) -> str:
        return f"{LEARN}{caller()}{LEARNT}"


class Guard:
    """Puts a WRITTEN mark inside every control token of a text."""

    def __init__(self, control_tokens: Iterable[str]) -> None:
        tokens = "|".join(map(re.escape, sorted(control_tokens, key=len, reverse=True))) or "(?!)"
        self._token_start = re.compile(f"(?={tokens})(.)", re.DOTALL)

    def __call__(self, text: str) -> str:
        return self._token_start.sub(rf"\1{WRITTEN}", text)


class ChatTemplate:
    """Renders messages as `transformers` does for the same template and special tokens.

    `special_tokens` are the strings a template may print by name (`bos_token`, …); `control_tokens` those that only the
    template may write; `today` is what `strftime_now` sees. Raises InputError when the template does not parse.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: dict[str, str],
        control_tokens: Iterable[str],
        today: date | None = None,
        name: str = "chat template",
    ) -> None:
        self.source = source
        self.tells_time = "strftime_now" in source
        self.marks_generation = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source) is not None
        self._special_tokens = special_tokens
        self.guard = Guard(control_tokens)
        self._sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        moment = datetime.combine(today, time()) if today else datetime.now()
        self._sandbox.globals.update(raise_exception=_raise_exception, strftime_now=_telling(moment))
        self._name, cure = name, "mend it or give model.chat_template"
        if len(source) > LONGEST_SOURCE:
            raise InputError(f"{name}: {len(source):,} characters: too long for a chat template: {cure}")
        try:
            self._template = self._sandbox.from_string(source)
        except TemplateSyntaxError as error:
            raise InputError(f"{name}:{error.lineno}: {error.message}: {cure}") from error
        except (SyntaxError, *PYTHON_ERRORS) as error:  # nested too deeply, numbers too long
            raise InputError(f"{name}: cannot be compiled ({error or type(error).__name__}): {cure}") from error

    def render(
        self, messages: list[Message], tools: list[Message] | None = None, *, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation, with WRITTEN marks; raises RowError when the template refuses it."""
        text = self._print(self._guard(messages), self._guard(tools), add_generation_prompt)
        return text.replace(LEARN, "").replace(LEARNT, "")

    def render_learnt(self, messages: list[Message], tools: list[Message] | None = None) -> Rendered:
        """The text of a conversation and what of it is learnt; raises RowError where that cannot be told.

        A template with `{% generation %}` tags says it itself. Without, a turn of the assistant is learnt from where
        its opening ends (what a generation prompt prints) to where the next turn begins: its words, the control token
        that ends it, and the newline that ChatML prints after that.
        """
        messages, tools = self._guard(messages), self._guard(tools)
        whole = self._print(messages, tools)
        if self.marks_generation:
            return _bracketed(whole)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._print(messages[:index], tools, add_generation_prompt=True)
                after = whole if index == len(messages) - 1 else self._print(messages[: index + 1], tools)
                if not (after.startswith(before) and whole.startswith(after)):
                    raise RowError(
                        f"message {index + 1} (assistant): the chat template writes this turn otherwise when more "
                        "follows, so what to learn cannot be told: put {% generation %} tags into the template "
                        "(model.chat_template), or set data.mask: all"
                    )
                spans.append((len(before), len(after)))
        return Rendered(whole, spans)

    def _print(self, messages: list[Message], tools: Any, add_generation_prompt: bool = False) -> str:
        printed: list[str] = []
        size = 0
        self._sandbox.start()
        try:
            for piece in self._template.generate(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            ):
                printed.append(piece)
                size += len(piece)
                if size > LONGEST:
                    raise RowError(f"the chat template prints more than {LONGEST} characters: mend the template")
        except SecurityError as error:  # the template's fault, not the row's
            raise InputError(f"{self._name}: refused: {error}: mend it or give model.chat_template") from error
        except (TemplateError, *PYTHON_ERRORS) as error:
            raise RowError(f"the chat template refuses this conversation: {error}") from error
        return "".join(printed)

    def _guard(self, value: Any) -> Any:
        """The same messages with a WRITTEN mark inside every control token."""
        if isinstance(value, str):
            return self.guard(value)
        if isinstance(value, dict):
            return {self._guard(key): self._guard(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._guard(item) for item in value]
        return value


def _bracketed(text: str) -> Rendered:
    """Take the marks LEARN and LEARNT out of a text and say where they stood."""
    kept: list[str] = []
    spans = []
    start = place = 0
    for piece in re.split(f"([{LEARN}{LEARNT}])", text):
        if piece == LEARN:
            start = place
        elif piece == LEARNT:
            spans.append((start, place))
        else:
            kept.append(piece)
            place += len(piece)
    return Rendered("".join(kept), spans)


def _telling(moment: datetime) -> Callable[[str], str]:
    """`strftime` of a moment, for formats of any sensible length."""

    def strftime_now(format: str) -> str:
        if len(format) > LONGEST_FORMAT:
            raise SecurityError("a format too long for a chat template")
        return moment.strftime(format)

    return strftime_now


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
