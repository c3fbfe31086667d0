"""A row of a preference file → a prompt and its answers, best first. Says what is wrong with a row. Imports no torch.

A row is made into whole conversations, one an answer; what they share is the prompt, and each must go on with one turn
of the assistant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.data.formats import (
    Conversation,
    Layout,
    Message,
    RowError,
    check_columns,
    check_messages,
    from_messages,
    from_sharegpt,
    parse_rows,
    system_message,
)
from litrecipe.data.readers import Mistakes, read_rows

QUESTIONS = ("prompt", "question", "instruction")
"""Columns that hold what is answered, likeliest first; `conversations` may too."""
LISTS = ("completions", "responses", "answers", "generations")
"""Columns that hold several answers."""
TEXTS = ("content", "text", "response", "answer", "completion", "output")
"""What an answer of a list may call its text."""
SCORES = ("score", "overall_score", "rating", "reward")
"""What an answer of a list may call its score."""
TURN = re.compile(r"(?:\A|\n)\n*(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Preference:
    """What one row says."""

    prompt: list[Message]
    """Ends with the user, or a tool."""
    answers: tuple[Message, ...]
    """The assistant's next turn, best first: two or more, or one that has a `label`."""
    where: str
    """`file:line`."""
    scores: tuple[float, ...] | None = None
    """One an answer, where the row tells them; higher is better. The bare margin m of a pair stands as (m, 0)."""
    label: bool | None = None
    """Of a single answer: whether it is a good one."""

    def conversation(self, answer: int) -> Conversation:
        """The prompt with one of its answers."""
        # Like prompt and completion of supervised data, text needs no chat template.
        layout: Layout = "prompt_completion" if [m["role"] for m in self.prompt] == ["user"] else "messages"
        return Conversation([*self.prompt, self.answers[answer]], self.where, layout)


class MismatchError(RowError):
    """The answers of a row belong to different prompts."""


@dataclass(frozen=True)
class Mismatch:
    """Stands for a row whose answers belong to different prompts. Public sets have some; they are dropped, counted."""

    where: str


class _Answer(NamedTuple):
    value: Any
    """Text, a message, or messages."""
    score: float | None = None


def read_preferences(
    source: str, data: Data, mistakes: Mistakes | None = None, split: str = "train"
) -> Iterator[Preference | Mismatch]:
    """The preferences of a source in order; wrong rows are noted in `mistakes`, or raised together at the end."""
    gathered = Mistakes() if mistakes is None else mistakes
    check_columns(data.columns, COLUMNS)
    for row, where in read_rows(source, gathered, split):
        try:
            yield parse_preference(row, where, data.columns)
        except MismatchError:
            yield Mismatch(where)
        except RowError as error:
            gathered.add(f"{where}: {error}")
    if mistakes is None:
        gathered.raise_if_any()


def parse_preference(row: dict[str, Any], where: str, columns: dict[str, str] | None = None) -> Preference:
    """The preference in a row whose columns may have other names (`columns`: ours → theirs).

    Raises RowError, or MismatchError when the answers belong to different prompts.
    """
    fields = _named(row, columns or {})
    read = _reader(fields)
    if read is None:
        raise RowError(
            f"columns {', '.join(row) or 'none'}: known are chosen + rejected (and prompt), "
            f"{' or '.join(LISTS)}, output_1 + output_2 + preference, completion + label: name yours with data.columns"
        )
    answers = read(fields)
    if len(answers) > 1 and all(answer.score is not None for answer in answers):
        answers = sorted(answers, key=lambda answer: -(answer.score or 0.0))  # stable: ties stay as they stand
    prompt, turns = _split([_conversation(fields, answer.value) for answer in answers])
    scores = tuple(answer.score for answer in answers if answer.score is not None)
    return Preference(
        prompt,
        tuple(turns),
        where,
        scores if len(scores) == len(answers) > 1 else None,
        _label(fields["label"]) if len(answers) == 1 else None,
    )


def holds_preferences(source: str, data: Data, split: str = "train") -> bool:
    """Whether the first row of a source has the columns of a preference."""
    row, _ = next(read_rows(source, Mistakes(), split), ({}, ""))
    return _reader(_named(row, data.columns)) is not None


def misplaced(data: Data, *, wants_preferences: bool) -> InputError | None:
    """What to say, once, of rows that cannot be read because they are for another verb; None where they are not."""
    source = f"data.train: {data.train}"
    try:
        if holds_preferences(data.train, data):
            cure = "learn from them with `litrecipe align dpo` or `litrecipe align reward`"
            return None if wants_preferences else InputError(f"{source}: holds preferences: {cure}")
        if wants_preferences and next(parse_rows(read_rows(data.train, Mistakes()), data, Mistakes()), None):
            return InputError(
                f"{source}: holds conversations: learn from them with `litrecipe finetune`, or give pairs"
            )
    except InputError:  # there are no rows to be read: whoever asks knows why
        return None
    return None


def _named(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """What a row holds under our names."""
    ours = {theirs: name for name, theirs in columns.items()}
    return {ours.get(name, name): value for name, value in row.items() if value is not None}


def _reader(fields: dict[str, Any]) -> Callable[[dict[str, Any]], list[_Answer]] | None:
    return next((read for needed, read in _READERS if all(name in fields for name in needed)), None)


def _conversation(fields: dict[str, Any], answer: Any) -> list[Message]:
    """A whole conversation that ends with this answer, checked."""
    question = next((fields[name] for name in QUESTIONS if name in fields), None)
    if isinstance(answer, dict):
        answer = [answer]
    if isinstance(answer, str):
        has_question = question is not None or "conversations" in fields
        turns = [{"role": "assistant", "content": answer}] if has_question else _from_transcript(answer)
    else:
        turns = from_sharegpt({"conversations": answer})
    if turns and turns[0]["role"] == "assistant":
        turns = _opening(fields, question) + turns
    check_messages(turns)
    return turns


def _opening(fields: dict[str, Any], question: Any) -> list[Message]:
    if "conversations" in fields:
        return from_sharegpt(fields)
    if isinstance(question, list):
        return from_messages({"messages": question})
    if fields.get("input") and "prompt" not in fields and isinstance(question, str):
        question = f"{question}\n{fields['input']}"
    return [*system_message(fields), {"role": "user", "content": question}]


def _from_transcript(text: str) -> list[Message]:
    """Turns after `Human:` and `Assistant:`, as in Anthropic's HH, where some speak twice in a row."""
    _, *parts = TURN.split(text)
    if not parts:
        raise RowError(
            "no prompt: give one, or answers that are whole conversations (messages, or Human: … Assistant:)"
        )
    turns: list[Message] = []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        if turns and turns[-1]["role"] == SPEAKERS[speaker]:
            turns[-1]["content"] += f"\n\n{said.strip()}"
        else:
            turns.append({"role": SPEAKERS[speaker], "content": said.strip()})
    return turns


def _split(conversations: list[list[Message]]) -> tuple[list[Message], list[Message]]:
    """What all conversations share before their last turn, and these turns; raises MismatchError where they differ."""
    first = conversations[0][:-1]
    for conversation in conversations[1:]:
        if conversation[:-1] != first:
            raise MismatchError(
                "chosen and rejected answer different prompts: give answers to one prompt, or drop the row"
            )
    return first, [conversation[-1] for conversation in conversations]


def _from_pair(fields: dict[str, Any]) -> list[_Answer]:
    scores = [_number(fields[name], name) for name in ("score_chosen", "score_rejected") if name in fields]
    if len(scores) == 2 and scores[0] == scores[1]:  # the columns tell which is better; how much is not known
        scores = []
    if "margin" in fields:
        scores = [_number(fields["margin"], "margin"), 0.0]
    if len(scores) < 2:
        return [_Answer(fields["chosen"]), _Answer(fields["rejected"])]
    if scores[0] < scores[1]:
        raise RowError(f"the rejected answer is the better one, {scores[1]:g} against {scores[0]:g}: swap them")
    return [_Answer(fields["chosen"], scores[0]), _Answer(fields["rejected"], scores[1])]


def _from_list(name: str) -> Callable[[dict[str, Any]], list[_Answer]]:
    def read(fields: dict[str, Any]) -> list[_Answer]:
        items = fields[name]
        if not isinstance(items, list) or len(items) < 2:
            raise RowError(f"{name}: a ranked list needs two answers or more: drop the row")
        answers = [_listed(item, name) for item in items]
        if "scores" in fields:
            return _with_scores(answers, fields["scores"], "scores", 1)
        if "ranks" in fields or "rank" in fields:
            return _with_scores(answers, fields.get("ranks", fields.get("rank")), "ranks", -1)
        return answers

    return read


def _listed(item: Any, name: str) -> _Answer:
    """An answer of a list: text, a message, or an object with a text and perhaps a score or a rank."""
    if not isinstance(item, dict) or "role" in item or "from" in item:
        return _Answer(item)
    text = next((item[key] for key in TEXTS if key in item), None)
    if text is None:
        raise RowError(f"{name}: an answer has {', '.join(item)}, none of {', '.join(TEXTS)}: name its text so")
    score = next((_number(item[key], key) for key in SCORES if item.get(key) is not None), None)
    if score is None and item.get("rank") is not None:
        score = -_number(item["rank"], "rank")
    return _Answer(text, score)


def _with_scores(answers: list[_Answer], values: Any, name: str, sign: int) -> list[_Answer]:
    if not isinstance(values, list) or len(values) != len(answers):
        raise RowError(f"{name}: not one for each of the {len(answers)} answers: give as many")
    return [_Answer(answer.value, sign * _number(value, name)) for answer, value in zip(answers, values, strict=True)]


def _from_annotation(fields: dict[str, Any]) -> list[_Answer]:
    """AlpacaEval: `preference` 1 for the first output, 2 for the second, or between them for how sure that is."""
    preference = _number(fields["preference"], "preference")
    if not 1 <= preference <= 2 or preference == 1.5:
        raise RowError(f"preference: {preference:g}: 1 is the first output, 2 the second; drop what is undecided")
    sure = abs(2 * preference - 3)
    answers = [_Answer(fields["output_1"], sure), _Answer(fields["output_2"], 0.0)]
    return answers if preference < 1.5 else [_Answer(fields["output_2"], sure), _Answer(fields["output_1"], 0.0)]


def _from_labelled(fields: dict[str, Any]) -> list[_Answer]:
    return [_Answer(fields["completion"])]


def _label(value: Any) -> bool:
    if value not in (0, 1):  # True and False too
        raise RowError(f"label: {value!r}: give true for a good answer, false for a bad one")
    return bool(value)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise RowError(f"{name}: {value!r}: not a number")
    return float(value)


_READERS: list[tuple[tuple[str, ...], Callable[[dict[str, Any]], list[_Answer]]]] = [
    (("chosen", "rejected"), _from_pair),
    (("output_1", "output_2", "preference"), _from_annotation),
    *(((name,), _from_list(name)) for name in LISTS),
    (("completion", "label"), _from_labelled),
]
"""The columns by which a row is recognised, in this order, and who reads it."""
COLUMNS = (
    *(name for needed, _ in _READERS for name in needed),
    *QUESTIONS,
    *(
        "conversations",
        "input",
        "system",
        "tools",
        "score_chosen",
        "score_rejected",
        "margin",
        "scores",
        "ranks",
        "rank",
    ),
)
"""All names that `data.columns` may give to a file's own."""
