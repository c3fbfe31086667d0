"""What a built-in task is, and two that need no lm-eval: `perplexity:FILE` and `exact_match:FILE`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from statistics import stdev
from typing import Any, ClassVar, Protocol
from urllib.parse import parse_qsl, urlencode

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data, Generate
from litrecipe.data.formats import Conversation, Message, RowError, parse_rows
from litrecipe.data.readers import Mistakes, check_sources, find_files, read_rows, read_text
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.evaluation.sampling import complete, plain_prompt
from litrecipe.evaluation.scoring import loglikelihoods
from litrecipe.model.decoder import Decoder

LONGEST_WINDOW = 2048
"""Window of `perplexity` when none is given and the model could read more."""


SPLIT = "test"
"""What is measured of a folder or data set with splits, unless its `?split=` says another."""


@dataclass(frozen=True)
class Settings:
    """What a task needs to know besides the model."""

    limit: int | None = None
    """At most this many samples (windows of `perplexity`)."""
    batch_tokens: int = 8192
    """Tokens of one forward pass; when sampling, of the cache."""
    generate: Generate = field(default_factory=Generate)
    """How answers are sampled."""
    chatty: bool = True
    """Show a progress line."""
    reference: Decoder | None = None
    """What a policy's implicit reward is measured against."""
    beta: float = 0.1
    """The β of implicit rewards."""
    pictures: Path | None = None
    """The results file beside which pictures are drawn; none without it."""


@dataclass(frozen=True)
class Outcome:
    """What a task found."""

    metrics: dict[str, float]
    """Metric → value."""
    stderrs: dict[str, float | None]
    """Metric → standard error, None where it is not defined."""
    available: int
    """Samples the task has; `samples` are those that were used."""
    samples: list[dict[str, Any]]
    """One record a sample, in lm-eval's words where it has them."""


class Task(Protocol):
    """A built-in task: where its data is, and how it is run."""

    higher_is_better: ClassVar[dict[str, bool]]

    @property
    def spec(self) -> str:
        """As the user wrote it."""

    def config(self) -> dict[str, Any]:
        """What was asked for, for the results file."""

    def run(self, model: Any, tokenizer: Tokenizer, settings: Settings) -> Outcome:
        """Measure."""


@dataclass(frozen=True)
class Perplexity:
    """`perplexity:FILE?window=1024&windows=8`: how well raw text is predicted.

    A `.txt` file (plain, .gz, .zst) is one text, taken as it stands; of any other file each row's `text` is one. A text
    is tokenised whole, without special tokens, and cut into windows of `window` tokens that do not overlap (the last
    may be shorter). A window is scored by itself: its first token is context, all others are predicted. So eight
    windows of 1,024 tokens are 8,184 predictions.

    - `perplexity`: exp of the mean negative log-likelihood over all predicted tokens.
    - `bits_per_byte`: the summed negative log-likelihood in bits over the UTF-8 bytes the predicted tokens stand for.

    Standard errors treat the windows as the sample: of the ratio of sums over windows, to first order.
    """

    spec: str
    source: str
    window: int | None = None
    windows: int | None = None

    higher_is_better: ClassVar[dict[str, bool]] = {"perplexity": False, "bits_per_byte": False}

    @classmethod
    def parse(cls, spec: str) -> Perplexity:
        """Read the part after the name; raises InputError with every mistake in it."""
        source, _, query = spec.partition(":")[2].partition("?")
        mistakes, options, choice = [], {}, {}
        for key, value in parse_qsl(query, keep_blank_values=True):
            smallest = {"window": 2, "windows": 1}.get(key)
            if key in ("split", "files"):
                choice[key] = value
            elif smallest is None:
                known = "window, windows, split and files"
                mistakes.append(f"tasks: {spec}: {key}: no such option: there are {known}")
            elif not value.isdecimal() or int(value) < smallest:
                mistakes.append(f"tasks: {spec}: {key}={value}: give a whole number, at least {smallest}")
            else:
                options[key] = int(value)
        source += "?" + urlencode(choice, safe="*/") if choice else ""
        mistakes += _source_mistakes(spec, source)
        if mistakes:
            raise InputError(*mistakes)
        return cls(spec, source, **options)

    def config(self) -> dict[str, Any]:
        return {"task": self.spec, "output_type": "loglikelihood_rolling", "window": self.window}

    def run(self, model: Decoder, tokenizer: Tokenizer, settings: Settings) -> Outcome:
        longest = model.architecture.max_positions
        if self.window is not None and self.window > longest:
            raise InputError(f"tasks: {self.spec}: window={self.window}: the model reads at most {longest} tokens")
        window = self.window or min(longest, LONGEST_WINDOW)
        windows = [piece for text in _texts(self.source) for piece in _windows(tokenizer.encode(text), window)]
        used = windows[: min((n for n in (self.windows, settings.limit) if n is not None), default=None)]
        if not used:
            raise InputError(f"tasks: {self.spec}: no text of two tokens or more: give a file with text")
        scores = loglikelihoods(
            model,
            [(piece[:1], piece[1:]) for piece in used],
            batch_tokens=settings.batch_tokens,
            max_length=longest,
            progress="perplexity" if settings.chatty else None,
        )
        nats = [-logp for logp, _ in scores]
        tokens = [len(piece) - 1 for piece in used]
        sizes = [_byte_length(tokenizer, piece) for piece in used]
        mean, mean_error = _ratio(nats, tokens)
        per_byte, per_byte_error = _ratio([nat / math.log(2) for nat in nats], sizes)
        perplexity = math.exp(mean)
        return Outcome(
            metrics={"perplexity": perplexity, "bits_per_byte": per_byte},
            stderrs={
                "perplexity": None if mean_error is None else perplexity * mean_error,
                "bits_per_byte": per_byte_error,
            },
            available=len(windows),
            samples=[
                {"doc_id": index, "doc": tokenizer.decode(piece), "nll": nat, "tokens": token, "bytes": size}
                for index, (piece, nat, token, size) in enumerate(zip(used, nats, tokens, sizes, strict=True))
            ],
        )


@dataclass(frozen=True)
class ExactMatch:
    """`exact_match:FILE`: whether the model's answer is the reference.

    FILE is anything that can be trained on, `toy:…` included. The reference is the row's `answer`, else what its
    last assistant turn says; all before that turn is the prompt, rendered with the model's chat template (a model
    without one gets the prompt as plain text, which only `prompt`/`completion` rows allow). Answers are sampled as
    the recipe's `generate` group says, greedily by default.

    `exact_match` is the share of answers that equal their reference: as JSON values when both are JSON (key order and
    spacing do not count, `1` equals `1.0`), else as text without white space at both ends. Its standard error is that
    of a mean over samples.
    """

    spec: str
    source: str

    higher_is_better: ClassVar[dict[str, bool]] = {"exact_match": True}

    @classmethod
    def parse(cls, spec: str) -> ExactMatch:
        """Read the part after the name; raises InputError when there is no such data."""
        source = spec.partition(":")[2]
        mistakes = _source_mistakes(spec, source)
        if mistakes:
            raise InputError(*mistakes)
        return cls(spec, source)

    def config(self) -> dict[str, Any]:
        return {"task": self.spec, "output_type": "generate_until"}

    def run(self, model: Decoder, tokenizer: Tokenizer, settings: Settings) -> Outcome:
        questions = _questions(self.source)
        used = questions[: settings.limit]
        if not used:
            raise InputError(f"tasks: {self.spec}: no rows: give a file with questions and answers")
        completions = complete(
            model,
            tokenizer,
            [question.ids(tokenizer) for question in used],
            settings.generate,
            batch_tokens=settings.batch_tokens,
            progress="exact_match" if settings.chatty else None,
        )
        answers = [completion.text for completion in completions]
        hits = [float(same_answer(answer, question.reference)) for answer, question in zip(answers, used, strict=True)]
        mean, error = _ratio(hits, [1] * len(hits))
        return Outcome(
            metrics={"exact_match": mean},
            stderrs={"exact_match": error},
            available=len(questions),
            samples=[
                {
                    "doc_id": index,
                    "doc": {"prompt": question.prompt, "where": question.conversation.where},
                    "target": question.reference,
                    "resps": [[answer]],
                    "filtered_resps": [answer],
                    "exact_match": hit,
                }
                for index, (question, answer, hit) in enumerate(zip(used, answers, hits, strict=True))
            ],
        )


def same_answer(answer: str, reference: str) -> bool:
    """Equal as text stripped of outer white space, or as JSON values when both are JSON."""
    if answer.strip() == reference.strip():
        return True
    try:
        values = [json.loads(text, parse_int=_number, parse_float=_number) for text in (answer, reference)]
    except (ValueError, RecursionError):
        return False
    return bool(values[0] == values[1])


def _number(digits: str) -> tuple[str, Decimal]:
    """Exact, and unlike `true`, which Python takes for 1."""
    return "number", Decimal(digits)


@dataclass(frozen=True)
class _Question:
    conversation: Conversation

    @property
    def prompt(self) -> list[Message]:
        return self.conversation.messages[:-1]

    @property
    def reference(self) -> str:
        return _as_text(self.conversation.extra.get("answer", self.conversation.messages[-1]["content"]))

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """The prompt's tokens; raises InputError where the chat template refuses it."""
        if self.conversation.layout == "prompt_completion" and not tokenizer.has_template:
            return plain_prompt(tokenizer, "\n".join(message["content"] for message in self.prompt))
        try:
            return tokenizer.encode_prompt(self.prompt, self.conversation.tools)
        except RowError as error:
            raise InputError(f"{self.conversation.where}: {error}") from error


def _questions(source: str) -> list[_Question]:
    mistakes = Mistakes()
    rows = ((_with_answer(row), where) for row, where in read_rows(source, mistakes, SPLIT))
    questions = []
    for conversation in parse_rows(rows, Data(), mistakes):
        if len(conversation.messages) > 1:
            questions.append(_Question(conversation))
        else:
            mistakes.add(f"{conversation.where}: a text without a question: exact_match needs a prompt and an answer")
    mistakes.raise_if_any()
    return questions


def _with_answer(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose answer stands beside an open conversation, closed with it."""
    if "answer" not in row:
        return row
    answer = {"role": "assistant", "content": _as_text(row["answer"])}
    if "prompt" in row and "completion" not in row:
        return {**row, "completion": [answer] if isinstance(row["prompt"], list) else answer["content"]}
    messages = row.get("messages")
    if isinstance(messages, list) and messages and messages[-1] == {**messages[-1], "role": "user"}:
        return {**row, "messages": [*messages, answer]}
    return row


def _as_text(answer: Any) -> str:
    return answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def _source_mistakes(spec: str, source: str) -> list[str]:
    try:
        check_sources({f"tasks: {spec}": source}, SPLIT)
    except InputError as error:
        return error.mistakes
    return []


def _texts(source: str) -> Iterator[str]:
    """A text file as it stands, or the `text` of each row."""
    names = [source] if source.startswith("toy:") else [str(path) for path in find_files(source, SPLIT)]
    for name in names:
        if Path(name).name.removesuffix(".gz").removesuffix(".zst").endswith(".txt"):
            mistakes = Mistakes()
            text = read_text(Path(name), mistakes)
            mistakes.raise_if_any()
            yield text or ""
            continue
        for row, where in read_rows(name):
            if not isinstance(row.get("text"), str):
                raise InputError(f"{where}: columns {', '.join(row)}: perplexity needs a column `text`, or a .txt file")
            yield row["text"]


def _windows(tokens: list[int], size: int) -> list[list[int]]:
    """Consecutive pieces of `size` tokens; a last one of a single token predicts nothing and is left out."""
    pieces = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    return [piece for piece in pieces if len(piece) > 1]


def _byte_length(tokenizer: Tokenizer, piece: list[int]) -> int:
    """UTF-8 bytes of all tokens but the first. A character cut by a window's edge counts as three."""
    return len(tokenizer.decode(piece).encode()) - len(tokenizer.decode(piece[:1]).encode())


def _ratio(sums: list[float], counts: list[int]) -> tuple[float, float | None]:
    """Σ sums / Σ counts, and its standard error over samples of unlike size, to first order (the delta method)."""
    total = sum(counts)
    ratio = sum(sums) / total
    if len(sums) < 2:
        return ratio, None
    residuals = [part - ratio * count for part, count in zip(sums, counts, strict=True)]
    return ratio, math.sqrt(len(sums)) * stdev(residuals) / total
