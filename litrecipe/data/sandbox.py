"""Jinja for templates from strangers: they reach only their values, and neither fill the memory nor run for ever.

Jinja's immutable sandbox keeps them inside. What it lacks is a measure: every loop, call, filter and operator here is
charged for what it handles, before it does, and a rendering that has spent its allowance ends with `RunAway`. A unit is
about a tenth of a microsecond. What makes much of little, such as `replace`, `join` or a product, is refused where its
result would be longer than `LONGEST`; and what was not thought of is found in the process's memory, which is looked at
now and then.
"""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable, Iterable, Sized
from functools import wraps
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateAssertionError
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

LONGEST = 10_000_000
"""Characters of a text, or items of a list, that a template makes; what is in a list counts where it is read."""
ALLOWANCE = 30_000_000
"""Units of a rendering."""
MOST_MEMORY = 1 << 30
"""Bytes by which the process may grow meanwhile."""
LOOK_EVERY = 100_000
"""Units between two looks at the memory."""
CHARACTERS_COPIED, CHARACTERS_READ = 100, 10
"""For one unit."""
AN_ITEM = 60
"""Characters that reading one is worth."""
A_CALL, A_MACRO = 10, 100
"""Units."""
LONGEST_FORMAT = 5000
"""Characters of a text with places to fill in."""
MOST_BITS = 10_000
"""Of a whole number."""
WIDEST = 1000
"""A field or indentation that is filled up, and decimals that are rounded to."""
WIDE_CONVERSION = re.compile(r"%(\(.*\))?[^%a-zA-Z]*?(\d{4}|\*)", re.DOTALL)
WIDE_FIELD = re.compile(r"\{[^{}]*:[^{}]*(\d{4}|\{)")
"""`%9999d` and `{:9999}`, and widths that are given with the values."""
SEQUENCES = (str, bytes, list, tuple)
CONTAINERS: tuple[Any, ...] = (list, tuple, set, frozenset, dict, type({}.keys()), type({}.values()), type({}.items()))
FILLING = {"center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"}
"""Methods that make something as long as they are told."""
NARROW = ("center", "indent", "batch", "slice", "tojson", "round")
"""Filters that are told widths."""
FOR_PAGES = ("urlize", "striptags", "wordwrap", "xmlattr", "pprint")
"""Filters of the web, slow on long texts, which no chat template needs."""
SHALLOW = {
    *("length", "count", "list", "first", "last", "items", "reverse", "batch", "slice", "random", "attr"),
    *("default", "d", "map", "select", "reject", "selectattr", "rejectattr"),
}
"""Filters that do not look into the items they handle."""
COMPARING = {
    *("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "ge", ">=", "<", "lt", "lessthan", "<=", "le", "in"),
}
"""Tests that do."""


class RunAway(SecurityError):
    """A template does more than any chat template has to."""


class _Generator(CodeGenerator):
    """Lets the sandbox do what `~` does."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class Sandbox(ImmutableSandboxedEnvironment):
    """One template's environment. Raises SecurityError for what is refused, RunAway when the allowance is spent.

    Jinja folds constants while it compiles: never operators that are intercepted, and no filter that raises.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _Generator

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.size = 0
        """Nodes of the template."""
        self.start()
        self.finalize = self.printed
        del self.globals["lipsum"]
        for name in FOR_PAGES:
            del self.filters[name]
        self.filters |= {"tojson": _tojson, "format": self._format, "replace": self._replace}
        for name in NARROW:
            self.filters[name] = _narrow(self.filters[name])
        looks: dict[str, Look] = {"join": self._join, "indent": self._indent, "sum": self._sum}
        for name, look in looks.items():
            self.filters[name] = wraps(self.filters[name])(_before(look, self.filters[name]))
        filters: dict[str, Callable[..., Any]] = dict(self.filters)
        self.filters = {name: self._charged(one, name not in SHALLOW) for name, one in filters.items()}
        self.filters |= {"gone_through": self._gone_through, "compared": self.printed}
        for name in list(self.tests):
            test: Any = self.tests[name]
            self.tests[name] = self._charged(test, name in COMPARING)

    def start(self) -> None:
        """A rendering begins, with its whole allowance."""
        self.spent, self.next_look = 0.0, LOOK_EVERY
        self.memory = resident()

    def spend(self, units: float) -> None:
        """Charge for what is about to be done."""
        self.spent += units
        if self.spent > ALLOWANCE:
            raise RunAway("does more than a chat template has to: it runs for ever, or nearly")
        if self.spent > self.next_look:
            self.next_look = int(self.spent) + LOOK_EVERY
            if resident() - self.memory > MOST_MEMORY:
                raise RunAway("fills the memory")

    def made(self, length: int) -> None:
        """The same for what will be so long. Raises SecurityError for what is too long."""
        if length > LONGEST:
            raise SecurityError("a text or list too long for a chat template")
        self.spend(length / CHARACTERS_COPIED)

    def read(self, *values: Any) -> int:
        """The same for reading values with all that is in them; returns how much that is."""
        size = sum(len(value) if type(value) is str else _weigh(value) for value in values)
        self.spend(size / CHARACTERS_READ)
        return size

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for reader in template.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            raise TemplateAssertionError("a chat template reads no other files", reader.lineno, name, filename)
        self.size = sum(1 for _ in template.find_all(nodes.Node))
        for loop in list(template.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, "gone_through", sum(1 for _ in loop.find_all(nodes.Node)))
        for one in list(template.find_all((nodes.Compare, nodes.Operand))):
            assert isinstance(one, nodes.Compare | nodes.Operand)
            one.expr = _filtered(one.expr, "compared")
        for item in list(template.find_all(nodes.Getitem)):
            if isinstance(item.arg, nodes.Slice):
                item.node = _filtered(item.node, "gone_through", 1)
        return template

    def _gone_through(self, items: Any, weight: int) -> Any:
        """The items of a loop whose body has so many nodes."""
        if isinstance(items, Sized):
            self.spend(1 + len(items) * weight)
            return items
        return self._each(items, weight)

    def _each(self, items: Iterable[Any], weight: int) -> Iterable[Any]:
        for item in items:
            self.spend(weight)
            yield item

    def printed(self, value: Any) -> Any:
        """What is printed, or compared."""
        self.read(value)
        return value

    def concat(self, parts: Iterable[str]) -> str:
        """What a macro or a block printed, as one text."""
        parts = list(parts)
        self.made(sum(map(len, parts)))
        return "".join(parts)

    def concatenated(self, parts: tuple[Any, ...]) -> str:
        """What `~` makes of its operands."""
        self.read(*parts)
        return self.concat(map(str, parts))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Refused at once, where Jinja would give something that prints nothing."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")

    def call(self, context: Any, function: Any, *arguments: Any, **named: Any) -> Any:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(function, (Macro, LoopContext, BlockReference)):
            self.spend(A_MACRO + self.size * (1 + sum(len(one) for one in arguments if isinstance(one, Sized))))
        else:
            self.spend(A_CALL + sum(len(one) for one in arguments if isinstance(one, Sized)) + len(named))
            if isinstance(owner, (str, bytes)) or name in ("count", "index"):
                self.read(owner)
        if isinstance(owner, (str, bytes, int)) and name in FILLING:
            checked = _narrow(getattr(type(owner), name))
            if name == "expandtabs" and isinstance(owner, (str, bytes)):
                self.made(len(owner) * max(8, *arguments, *named.values()))
            return super().call(context, checked, owner, *arguments, **named)
        if isinstance(owner, (str, bytes)):
            if name == "translate":
                raise SecurityError("translate is not for chat templates")
            if name == "join" and arguments:
                arguments = (list(arguments[0]), *arguments[1:])
                self._join(None, arguments[0], owner)
            if name == "replace" and len(arguments) >= 2:
                self._replaced(owner, *arguments[:2])
        return super().call(context, function, *arguments, **named)

    def wrap_str_format(self, value: Any) -> Any:
        format = super().wrap_str_format(value)
        if format is None:
            return None
        text = value.__self__
        if len(text) > LONGEST_FORMAT or WIDE_FIELD.search(text):
            raise SecurityError("a field too wide for a chat template, or too long a format")

        @wraps(format)
        def filled(*arguments: Any, **named: Any) -> str:
            self._filled(text, text.count("{"), *arguments, *named.values())
            return format(*arguments, **named)

        return filled

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, (str, bytes)):
            self._filled(left, str(left).count("%"), right)
            if WIDE_CONVERSION.search(str(left)):
                raise SecurityError("a field too wide for a chat template")
        if operator == "**" and _bits(left) * max(1, abs(right)) > MOST_BITS:
            raise SecurityError("a power too large for a chat template")
        if operator == "*" and _bits(left) + _bits(right) > MOST_BITS:
            raise SecurityError("a product too large for a chat template")
        if operator == "+" and isinstance(left, SEQUENCES) and isinstance(right, SEQUENCES):
            self.made(len(left) + len(right))
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, SEQUENCES) and isinstance(times, int):
                self.made(len(sequence) * times)
        return super().call_binop(context, operator, left, right)

    def _charged(self, function: Callable[..., Any], deep: bool) -> Callable[..., Any]:
        """A filter or test that is charged for its arguments, or for how many items they have."""

        @wraps(function)
        def charged(*arguments: Any, **named: Any) -> Any:
            if deep:
                self.read(*arguments, *named.values())
            else:
                self.spend(A_CALL + sum(len(one) for one in arguments if isinstance(one, CONTAINERS)))
            return function(*arguments, **named)

        return charged

    def _format(self, text: str, *values: Any, **named: Any) -> Any:
        return self.call_binop(None, "%", text, named or values)

    def _filled(self, text: str | bytes, places: int, *values: Any) -> None:
        if len(text) > LONGEST_FORMAT:
            raise SecurityError("a format too long for a chat template")
        self.made(len(text) + places * self.read(*values))

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = str(value), str(old), str(new)
        self._replaced(text, old, new)
        return text.replace(old, new, -1 if count is None else count)

    def _replaced(self, text: Any, old: Any, new: Any) -> None:
        self.made(len(text) + text.count(old) * len(new))

    def _join(self, _: Any, items: list[Any], between: Any = "", attribute: Any = None) -> None:
        self.made(self.read(*items) + len(items) * len(str(between)))

    def _indent(self, text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
        step = len(width) if isinstance(width, str) else width
        self.made(len(text) + str(text).count("\n") * step)

    def _sum(self, _: Any, items: list[Any], attribute: Any = None, start: Any = 0) -> None:
        if isinstance(start, SEQUENCES):
            self.made(self.read(*items) * len(items))


def resident() -> int:
    """Bytes of this process that lie in memory; where the system does not tell, the most that ever did."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _weigh(value: Any) -> int:
    """Characters of a value with all that is in it, counted as often as it is in it. Raises SecurityError where that is
    too much."""
    total, left = 0, [value]
    while left:
        one = left.pop()
        kind = type(one)
        total += AN_ITEM
        if kind is str or isinstance(one, (str, bytes)):
            total += len(one)
        elif isinstance(one, CONTAINERS):
            if total + len(one) * AN_ITEM > LONGEST:
                total = LONGEST + 1
            else:
                left += [*one, *one.values()] if isinstance(one, dict) else one
        elif kind is int:
            total += _bits(one) // 4
        elif kind is Namespace:
            raise SecurityError("a namespace is no text and cannot be compared")
        if total > LONGEST:
            raise SecurityError("a text or list too long for a chat template")
    return total


def _bits(number: Any) -> int:
    return number.bit_length() if isinstance(number, int) else 0


def _filtered(node: nodes.Node, name: str, *arguments: Any) -> nodes.Filter:
    """`node|name(arguments)`."""
    constants = [nodes.Const(one, lineno=node.lineno, environment=node.environment) for one in arguments]
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno, environment=node.environment)


Look = Callable[..., None]
"""At a filter's arguments, before it is called."""


def _before(look: Look, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter after a look at its arguments; what it goes through it goes through twice."""

    def checked(*arguments: Any, **named: Any) -> Any:
        arguments = tuple(
            one if isinstance(one, Sized) or not isinstance(one, Iterable) else list(one) for one in arguments
        )
        look(*arguments, **named)
        return function(*arguments, **named)

    return checked


def _narrow(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, refusing numbers after its first argument that would fill up too much."""

    @wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        if any(isinstance(value, int) and value > WIDEST for value in (*arguments[1:], *named.values())):
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
