"""The chat template of a model, and which of the text it renders the model shall learn.

Templates are code from strangers: they run in Jinja's immutable sandbox, with a cap on what they may print.

Two kinds of marks are put into the text on its way, Unicode noncharacters that no data may hold (formats.RESERVED):
- A literal control token in what somebody wrote, `<|im_end|>` in a question about chat templates, gets a mark after its
  first character before rendering. The tokenizer drops the mark only after it has looked for control tokens, so those
  that the template prints are control tokens and those that were written are plain text.
- The body of `{% generation %}` is bracketed, and the brackets become character spans.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import wraps
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from litrecipe.config.errors import InputError
from litrecipe.data.formats import RESERVED, Message, RowError

WRITTEN, LEARN, LEARNT = RESERVED[0], RESERVED[1], RESERVED[2]
"""Marks: inside a control token that somebody wrote; before and after what shall be learnt."""

MAX_PRINTED = 10_000_000
"""Characters a template may print, and the longest string or list that its operators may make."""
MAX_WIDTH = 1000
"""The widest field or indentation it may fill up."""
WIDE_CONVERSION = re.compile(r"%(\(.*\))?[^%a-zA-Z]*?(\d{4}|\*)", re.DOTALL)
WIDE_FIELD = re.compile(r"\{[^{}]*:[^{}]*(\d{4}|\{)")
"""`%9999d` and `{:9999}`, and widths that are given with the values."""
SEQUENCES = (str, bytes, list, tuple)
FILLING = {"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"}
"""Methods that make something as long as they are told."""

PYTHON_ERRORS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
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


class _Generator(CodeGenerator):
    """Lets the sandbox do what `~` does."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses `"x" * 10**9`, a loop of `x + x` and their like, which would fill the memory before anything is printed.

    Jinja folds constants while it compiles: never operators that are intercepted, and no filter that raises.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _Generator

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters |= {"tojson": _tojson, "format": self._format}
        for name in ("center", "indent", "batch", "slice", "tojson"):
            self.filters[name] = _narrow(self.filters[name])
        del self.globals["lipsum"]

    def _format(self, text: str, *values: Any, **named: Any) -> Any:
        return self.call_binop(None, "%", text, named or values)

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        owner = getattr(function, "__self__", None)
        if isinstance(owner, (str, bytes, int)) and function.__name__ in FILLING:
            return super().call(context, _narrow(getattr(type(owner), function.__name__)), owner, *arguments, **named)
        return super().call(context, function, *arguments, **named)

    def wrap_str_format(self, value: Any) -> Any:
        format = super().wrap_str_format(value)
        if format and WIDE_FIELD.search(value.__self__):
            raise SecurityError("a field too wide for a chat template")
        return format

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, (str, bytes)) and WIDE_CONVERSION.search(str(left)):
            raise SecurityError("a field too wide for a chat template")
        if operator == "**" and abs(left) > 1 and abs(right) > 1000:
            raise SecurityError("a power too large for a chat template")
        if operator == "+" and isinstance(left, SEQUENCES) and isinstance(right, SEQUENCES):
            _check_length(len(left) + len(right))
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, SEQUENCES) and isinstance(times, int):
                _check_length(len(sequence) * times)
        return super().call_binop(context, operator, left, right)

    def concatenated(self, parts: tuple[Any, ...]) -> str:
        """What `~` makes of its operands."""
        texts = [str(part) for part in parts]
        _check_length(sum(map(len, texts)))
        return "".join(texts)


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
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        moment = datetime.combine(today, time()) if today else datetime.now()
        environment.globals.update(raise_exception=_raise_exception, strftime_now=moment.strftime)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise InputError(f"{name}:{error.lineno}: {error.message}: mend it or give model.chat_template") from error

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
                if size > MAX_PRINTED:
                    raise RowError(f"the chat template prints more than {MAX_PRINTED} characters: mend the template")
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


def _check_length(length: int) -> None:
    if length > MAX_PRINTED:
        raise SecurityError("a text or list too long for a chat template")


def _narrow(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, refusing numbers after its first argument that would fill up too much."""

    @wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        if any(isinstance(value, int) and value > MAX_WIDTH for value in (*arguments[1:], *named.values())):
            raise SecurityError("a field too wide for a chat template")
        return function(*arguments, **named)

    return checked


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
