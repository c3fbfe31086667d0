"""Rules that score an answer without a model: what is right, what has the right form, what is too long.

A spec reads `<rule>?<option>=<value>&…`, percent-encoded where a value holds `&` or `%`; a plus stays a plus, so that
patterns stand as they are. A rule that compares an answer with a column of its row says nothing (None) of rows without
that column.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from decimal import Decimal
from difflib import get_close_matches
from functools import cached_property
from typing import Any, Protocol, Self, get_type_hints
from urllib.parse import unquote

from litrecipe.config.errors import InputError
from litrecipe.config.files import read_json
from litrecipe.config.merge import path_of
from litrecipe.data.formats import RowError
from litrecipe.evaluation.tasks import same_answer


@dataclass(frozen=True)
class Answer:
    """What a rule sees of a completion."""

    text: str
    length: int
    """In tokens, with that which ended it."""
    row: Mapping[str, Any]
    """The row its prompt came from."""


class Rule(Protocol):
    """Scores one answer after the other."""

    def score(self, answer: Answer) -> float | None:
        """Higher is better; None where the rule does not apply. Raises RowError for a row that is wrong."""
        ...


class Checked:
    """A rule whose options are its dataclass's fields."""

    @classmethod
    def parse(cls, spec: str, options: dict[str, str]) -> Self:
        """A rule with these options; raises InputError with every mistake in them."""
        kinds = get_type_hints(cls)
        options_of = [one for one in fields(cls) if one.init]  # type: ignore[arg-type]
        known = [one.name for one in options_of]
        mistakes, values = [], {}
        for key, text in options.items():
            if key not in known:
                mistakes.append(f"{spec}: {key}: no such option{did_you_mean(key, known)}; there are {list_of(known)}")
                continue
            values[key] = _value(text, kinds[key])
            if values[key] is None:
                mistakes.append(f"{spec}: {key}={text}: give a {'whole ' if _is_int(kinds[key]) else ''}number")
        for one in options_of:
            if one.name not in options and one.default is MISSING:
                mistakes.append(f"{spec}: {one.name}: missing: give {one.name}=…")
        if mistakes:
            raise InputError(*mistakes)
        try:
            return cls(**values)
        except ValueError as error:
            raise InputError(f"{spec}: {error}") from error


@dataclass(frozen=True)
class Exact(Checked):
    """1 for the answer of a column, 0 for another: equal but for outer white space, or as JSON values."""

    column: str = "answer"

    def score(self, answer: Answer) -> float | None:
        wanted = answer.row.get(self.column)
        return None if wanted is None else float(same_answer(answer.text, _as_text(wanted)))


@dataclass(frozen=True)
class Regex(Checked):
    """1 where a pattern is found in the answer, else 0; the pattern is given or stands in a column. `.` takes line
    ends too."""

    pattern: str | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        if (self.pattern is None) == (self.column is None):
            raise ValueError("pattern: give pattern=… or column=…, one of them")
        if self.pattern is not None:
            try:
                _compiled(self.pattern)
            except RowError as error:
                raise ValueError(f"pattern: {error}") from error

    def score(self, answer: Answer) -> float | None:
        pattern = self.pattern if self.column is None else answer.row.get(self.column)
        return None if pattern is None else float(_compiled(pattern).search(answer.text) is not None)


NUMBER = re.compile(
    r"""(?: (?<![\w.)]) [-−] )? [$€£¥]?
    (?: (?: \d{1,3} (?:,\d{3})+ (?!\d) | \d+ ) (?:\.\d+)? | (?<![\d.]) \.\d+ )
    (?: e [-+]? \d{1,3} (?!\d) )?""",
    re.IGNORECASE | re.VERBOSE,
)
"""A sign counts where nothing stands before it that it could be subtracted from."""
MARK = "####"
"""Stands before the final number in GSM8K (2110.14168)."""


@dataclass(frozen=True)
class Numeric(Checked):
    """1 where the final number of the answer is that of a column, else 0.

    Final is the first number after the last `####`, or else the last one. Commas between thousands and signs of
    currencies do not count.
    """

    column: str = "answer"
    tolerance: float = 0.0
    """Largest difference."""

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance={self.tolerance:g}: give 0 or more")

    def score(self, answer: Answer) -> float | None:
        value = answer.row.get(self.column)
        if value is None:
            return None
        wanted = final_number(_as_text(value))
        if wanted is None:
            raise RowError(f"{self.column}: {_as_text(value)[:40]!r}: no number in it: name the column that has it")
        given = final_number(answer.text)
        return float(given is not None and abs(given - wanted) <= Decimal(str(self.tolerance)))


def final_number(text: str) -> Decimal | None:
    """The number a text ends in, see `Numeric`; None without one."""
    _, mark, after = text.rpartition(MARK)
    found = NUMBER.findall(after)
    if not found:
        return None
    return Decimal(re.sub(r"[,$€£¥]", "", found[0] if mark else found[-1]).replace("−", "-"))


@dataclass(frozen=True)
class Json(Checked):
    """The mean of what is asked for: the answer parses as JSON, fits a schema, has the right fields.

    `schema` is a JSON Schema file, or `hub:…`. With `column` the share of the fields of that column's object that are
    right counts as a third part (of another value: 1 when it is equal). What does not parse gets 0.
    """

    schema: str | None = None
    column: str | None = None

    def __post_init__(self) -> None:
        if self.schema is not None:
            _ = self._checker

    @cached_property
    def _checker(self) -> Any:
        assert self.schema is not None
        try:
            from jsonschema.exceptions import SchemaError
            from jsonschema.validators import validator_for
        except ImportError as error:
            raise ValueError("schema: needs a package: pip install 'litrecipe[rewards]'") from error
        rules = read_json(path_of(self.schema))
        kind = validator_for(rules)
        try:
            kind.check_schema(rules)
        except SchemaError as error:
            raise InputError(f"{self.schema}: {error.json_path}: {error.message}: no JSON Schema: mend it") from error
        return kind(rules)

    def score(self, answer: Answer) -> float | None:
        wanted = answer.row.get(self.column) if self.column is not None else None
        if self.column is not None and wanted is None:
            return None
        parts = [1.0]
        try:
            value = json.loads(answer.text, parse_constant=_refuse)
            if self.schema is not None:
                parts.append(float(self._checker.is_valid(value)))
            if wanted is not None:
                parts.append(_share_right(value, _as_json(wanted)))
        except (ValueError, RecursionError):  # a model may well open ten thousand brackets
            return 0.0
        return sum(parts) / len(parts)


def _equal(a: Any, b: Any) -> bool:
    """As JSON values: Python takes `true` for 1."""
    return same_answer(json.dumps(a), json.dumps(b))


def _share_right(value: Any, wanted: Any) -> float:
    if not isinstance(wanted, dict) or not wanted:
        return float(_equal(value, wanted))
    if not isinstance(value, dict):
        return 0.0
    return sum(name in value and _equal(value[name], right) for name, right in wanted.items()) / len(wanted)


@dataclass(frozen=True)
class Length(Checked):
    """`target`: 1 at that length, falling evenly to 0 at none and at twice of it. `max`: 1 up to that length, falling
    evenly to 0 at twice of it. Counted in `unit`: tokens, words or characters."""

    target: int | None = None
    max: int | None = None
    unit: str = "tokens"

    def __post_init__(self) -> None:
        if (self.target is None) == (self.max is None):
            raise ValueError("target: give target=… or max=…, one of them")
        if (self.target or self.max or 0) < 1:
            raise ValueError("target: give at least 1")
        if self.unit not in ("tokens", "words", "characters"):
            raise ValueError(f"unit={self.unit}: give tokens, words or characters")

    def score(self, answer: Answer) -> float | None:
        n = {"tokens": answer.length, "words": len(answer.text.split()), "characters": len(answer.text)}[self.unit]
        off = abs(n - self.target) / self.target if self.target else max(0, n - (self.max or 0)) / (self.max or 1)
        return max(0.0, 1.0 - off)


@dataclass(frozen=True)
class Repetition(Checked):
    """Minus the share of runs of `n` words that were said before in the answer; 0 for one too short to repeat any."""

    n: int = 3

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n={self.n}: give at least 1")

    def score(self, answer: Answer) -> float | None:
        words = answer.text.split()
        runs = [tuple(words[start : start + self.n]) for start in range(len(words) - self.n + 1)]
        return len(set(runs)) / len(runs) - 1.0 if runs else 0.0


@dataclass(frozen=True)
class Sentiment(Checked):
    """How glad an answer sounds, from -1 to 1: VADER's compound score (Hutto and Gilbert, 2014)."""

    analyzer: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise ValueError("needs a package: pip install 'litrecipe[rewards]'") from error
        object.__setattr__(self, "analyzer", SentimentIntensityAnalyzer())

    def score(self, answer: Answer) -> float | None:
        return float(self.analyzer.polarity_scores(answer.text)["compound"])


RULES: dict[str, type[Any]] = {
    "exact": Exact,
    "regex": Regex,
    "json": Json,
    "numeric": Numeric,
    "length": Length,
    "repetition": Repetition,
    "sentiment": Sentiment,
}


def parse_rule(spec: str) -> Rule:
    """The rule of a spec whose name is one of RULES; raises InputError with every mistake in it."""
    name, _, query = spec.partition("?")
    pairs = [part.partition("=") for part in query.split("&") if part]
    rule: Rule = RULES[name].parse(spec, {unquote(key): unquote(value) for key, _, value in pairs})
    return rule


def did_you_mean(name: str, known: Any) -> str:
    """` (did you mean …?)`, or nothing."""
    near = get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def list_of(names: Any) -> str:
    """Names for people to read."""
    return ", ".join(names) or "none"


def _value(text: str, kind: Any) -> Any:
    """An option's text as its field wants it; None when it is no such number."""
    if kind in (str, str | None):
        return text
    try:
        value = int(text) if _is_int(kind) else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _is_int(kind: Any) -> bool:
    return kind in (int, int | None)


def _compiled(pattern: Any) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)  # re keeps those it compiled
    except (re.error, TypeError) as error:
        raise RowError(f"{pattern!r}: not a pattern ({error}): mend it") from error


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _as_json(value: Any) -> Any:
    """What a column holds, parsed where it is JSON as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
