"""Small generated tasks with checkable answers, so that a wheel without a checkout has something to train on.

A source reads `toy:<task>?n=512&seed=0&split=train`; `toy:<task>-pairs?…` gives each question a right and a wrong
answer instead of the right one. `toy:addition` asks for sums of two numbers of three digits, or of as many as
`digits=` says, as text to be continued. The rows are a function of all this alone. What is asked about (a quantity and
its unit, a person, two summands in either order) decides by a hash whether a question belongs to `train` or to `test`,
so the two never share a prompt, whatever their seeds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import blake2b
from typing import Any
from urllib.parse import parse_qsl

from litrecipe.config.errors import InputError

TEST_SHARE = 5
"""One subject in this many is kept for `test`."""

WHOLE = re.compile(r"[0-9]{1,18}")
MOST_DIGITS = 9
"""Of a summand: there must be fewer sums than hashes."""


@dataclass(frozen=True)
class Question:
    """One generated question. `subject` is what it is about, without the wording."""

    subject: str
    prompt: str
    answer: str
    wrong: list[str]
    """What one might answer by mistake."""


class Draw:
    """A number that is taken apart into choices, so that every question of a task has an index."""

    def __init__(self, number: int) -> None:
        self.rest = number

    def of(self, choices: Sequence[Any]) -> Any:
        """One of `choices`."""
        self.rest, index = divmod(self.rest, len(choices))
        return choices[index]


def _words(text: str) -> list[str]:
    return text.split()


CONVERSIONS = [
    ("km", "m", 1000),
    ("m", "cm", 100),
    ("cm", "mm", 10),
    ("kg", "g", 1000),
    ("g", "mg", 1000),
    ("L", "mL", 1000),
    ("t", "kg", 1000),
    ("dm", "cm", 10),
    ("euros", "cents", 100),
    ("decades", "years", 10),
    ("centuries", "years", 100),
]
VALUES = list(range(2, 100))
UNITS_WORDINGS = [
    "Convert {quantity} to {unit}.",
    "How many {unit} are {quantity}?",
    "Express {quantity} in {unit}.",
    "{quantity} = ? {unit}",
]


def _units(draw: Draw) -> Question:
    value = draw.of(VALUES)
    unit, wanted, factor = draw.of(CONVERSIONS)
    quantity = f"{value} {unit}"
    prompt = draw.of(UNITS_WORDINGS).format(quantity=quantity, unit=wanted) + " Answer with number and unit only."
    wrong = [f"{value * factor * 10} {wanted}", f"{value} {wanted}", f"{value * factor} {unit}"]
    return Question(quantity, prompt, f"{value * factor} {wanted}", wrong)


NAMES = _words("""
    Maria Ahmed Chloe Daniel Elena Farid Grace Hiro Ines Jonas Kavya Liam Mona Nadia Oscar Priya Quentin Rosa Samir
    Tara Ugo Vera Wei Ximena Yusuf Zoe Anton Bianca Carlos Dora Emil Fatima Goran Hanna Ivan Julia Kofi Laila Marco
    Nora Omar Paula Rafael Sofia Tomas Uma Viktor Wanda Yara Zoltan
""")
CITIES = _words("""
    Oslo Lima Cairo Paris Quito Delhi Tokyo Berlin Madrid Lisbon Nairobi Sydney Toronto Dublin Prague Vienna Athens
    Warsaw Zurich Boston Denver Seattle Havana Bogota Accra Lagos Tunis Amman Seoul Hanoi Manila Jakarta Mumbai
    Dhaka Riga Tallinn Helsinki Bergen Porto Seville Naples Milan Lyon Ghent Krakow Sofia Izmir Doha Perth Auckland
""")
FIELDS_WORDINGS = [
    "{name}, {age}, is from {city}.",
    "{name} is {age} years old and lives in {city}.",
    "In {city} we met {name}, aged {age}.",
    "At {age}, {name} moved to {city}.",
    "{name} works in {city} and has just turned {age}.",
    "Our guest from {city} is {name} ({age}).",
]
AGES = list(range(19, 80))


def _fields(draw: Draw) -> Question:
    name, city, age = draw.of(NAMES), draw.of(CITIES), draw.of(AGES)
    sentence = draw.of(FIELDS_WORDINGS).format(name=name, city=city, age=age)
    answer = {"name": name, "age": age, "city": city}
    mistakes = [{"name": city, "age": age, "city": name}, answer | {"age": age + 10}, {"name": name, "city": city}]
    prompt = f"Extract name, age and city as JSON: {sentence}"
    return Question(f"{name}, {city}", prompt, json.dumps(answer), [json.dumps(mistake) for mistake in mistakes])


@dataclass(frozen=True)
class Task:
    """What is asked."""

    make: Callable[[Draw], Question]
    size: int
    """Questions there are."""
    is_plain: bool = False
    """Whether an answer continues the text of its question; otherwise somebody gives it who was asked."""


def _addition(digits: int) -> Task:
    numbers = range(10 ** (digits - 1), 10**digits)

    def make(draw: Draw) -> Question:
        a, b = draw.of(numbers), draw.of(numbers)
        carried_wrong = [str(a + b + by) for by in (-10, 10, 1)]
        return Question(f"{min(a, b)}+{max(a, b)}", f"{a}+{b}=", str(a + b), carried_wrong)

    return Task(make, len(numbers) ** 2, is_plain=True)


ADDITION = "addition"
TASKS: dict[str, Task] = {
    "units": Task(_units, len(VALUES) * len(CONVERSIONS) * len(UNITS_WORDINGS)),
    "fields": Task(_fields, len(NAMES) * len(CITIES) * len(AGES) * len(FIELDS_WORDINGS)),
    ADDITION: _addition(3),
}


@dataclass(frozen=True)
class ToySource:
    """A parsed `toy:` source."""

    name: str
    task: Task
    n: int = 512
    seed: int = 0
    split: str = "train"
    pairs: bool = False

    @classmethod
    def parse(cls, source: str) -> ToySource:
        """Read `toy:<task>?n=..&seed=..&split=..&digits=..`; raises InputError with every mistake in it."""
        asked, _, query = source.removeprefix("toy:").partition("?")
        name, mistakes = asked.removesuffix("-pairs"), []
        if name not in TASKS:
            hint = _did_you_mean(name, TASKS)
            mistakes.append(f"{source}: {name!r}: no such toy task{hint}; there are {_list(TASKS)}, also as …-pairs")
        task = TASKS.get(name)
        options: dict[str, Any] = {}
        known = ["n", "seed", "split", *(["digits"] if name == ADDITION else [])]
        for key, value in parse_qsl(query, keep_blank_values=True):
            if key not in known:
                mistakes.append(f"{source}: {key}: no such option{_did_you_mean(key, known)}; there are {_list(known)}")
            elif key in ("n", "seed"):
                if WHOLE.fullmatch(value) and (key == "seed" or int(value) > 0):
                    options[key] = int(value)
                else:
                    least = " above 0" if key == "n" else ""
                    mistakes.append(f"{source}: {key}={value}: give a whole number{least} of at most 18 digits")
            elif key == "digits":
                if WHOLE.fullmatch(value) and 1 <= int(value) <= MOST_DIGITS:
                    task = _addition(int(value))
                else:
                    mistakes.append(f"{source}: digits={value}: give a whole number from 1 to {MOST_DIGITS}")
            else:
                if value not in ("train", "test"):
                    mistakes.append(f"{source}: split={value}: give train or test")
                options[key] = value
        if mistakes or task is None:
            raise InputError(*mistakes)
        toy = cls(name, task, **options, pairs=asked != name)
        # Not the last fifth of a split's questions: drawing at random finds those slowly.
        most = task.size * (4 if toy.split == "test" else 4 * (TEST_SHARE - 1)) // (5 * TEST_SHARE)
        if toy.n > most:
            raise InputError(f"{source}: n={toy.n}: toy:{name} gives at most {most} rows of a split")
        return toy

    def questions(self) -> Iterator[Question]:
        """`n` different questions of the split."""
        seen: set[int] = set()
        attempt = 0
        while len(seen) < self.n:
            index = _hash(f"{self.name}/{self.split}/{self.seed}/{attempt}") % self.task.size
            attempt += 1
            question = self.task.make(Draw(index))
            for_test = _hash(f"{self.name}/{question.subject}") % TEST_SHARE == 0
            if index not in seen and for_test == (self.split == "test"):
                seen.add(index)
                yield question


def toy_rows(source: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a `toy:` source and where they come from: conversations in the messages format, or plain prompts with
    their completions, each with its `answer`; or pairs."""
    toy = ToySource.parse(source)
    kind = f"{toy.name}-pairs" if toy.pairs else toy.name
    for number, question in enumerate(toy.questions(), start=1):
        prompt, answer = question.prompt, question.answer
        if toy.pairs:
            wrong = question.wrong[_hash(prompt) % len(question.wrong)]
            row: dict[str, Any] = {"prompt": prompt, "chosen": answer, "rejected": wrong}
        elif toy.task.is_plain:
            row = {"prompt": prompt, "completion": answer, "answer": answer}
        else:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            row = {"messages": messages, "answer": answer}
        yield row, f"toy:{kind}-{toy.split}:{number}"


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _list(names: Any) -> str:
    return ", ".join(names)


def _did_you_mean(name: str, known: Any) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
