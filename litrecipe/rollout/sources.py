"""What scores completions: reward models, Python functions and rules behind one interface.

Shapes: A completions of a rollout, or of a rank's share of it.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from litrecipe.config import groups, stop
from litrecipe.config.errors import InputError
from litrecipe.config.online import Rewards
from litrecipe.config.progress import counted
from litrecipe.data.comparisons import common_prefix
from litrecipe.data.formats import Conversation, RowError
from litrecipe.data.packing import pack
from litrecipe.data.prompts import Prompt, encode_prompt
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fabric import Ranks
from litrecipe.evaluation.session import open_any
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.rollout.verifiable import RULES, Answer, Rule, did_you_mean, list_of, parse_rule

T = TypeVar("T")

KEY = "rewards.sources"
MODEL, FUNCTION, HYDRA = "model:", "function:", "hydra"


@dataclass(frozen=True)
class Completions:
    """What was sampled. The lists are parallel; completions of one prompt hold the same Prompt."""

    prompts: list[Prompt]
    texts: list[str]
    """Without special tokens, cut before a stop string."""
    tokens: list[list[int]]
    """As sampled, with the end token."""
    ended: list[str]
    """`eos`, `stop` (a stop string) or `length` (cut)."""
    logps: list[list[float]] | None = None
    """Log-probabilities of the tokens, as they were drawn, where another engine than the policy drew them."""

    def __len__(self) -> int:
        return len(self.texts)

    def at(self, places: Sequence[int]) -> Completions:
        """Some of them, in the order of `places`."""

        def some(values: list[T]) -> list[T]:
            return [values[place] for place in places]

        logps = None if self.logps is None else some(self.logps)
        return Completions(some(self.prompts), some(self.texts), some(self.tokens), some(self.ended), logps)


class RewardSource(Protocol):
    """Scores completions."""

    @property
    def name(self) -> str:
        """As `rewards.sources` has it."""

    def __call__(self, completions: Completions) -> list[float | None]:
        """One score a completion, higher is better; None where the source does not apply."""


@dataclass(frozen=True)
class Weighted:
    """A source and how much it counts."""

    source: RewardSource
    weight: float


@dataclass(frozen=True)
class RuleSource:
    """A rule of `verifiable.py`."""

    name: str
    rule: Rule

    def __call__(self, completions: Completions) -> list[float | None]:
        """Raises InputError naming the row that is wrong."""
        scores = []
        for prompt, text, tokens in zip(completions.prompts, completions.texts, completions.tokens, strict=True):
            try:
                scores.append(self.rule.score(Answer(text, len(tokens), prompt.row)))
            except RowError as error:
                raise InputError(f"{KEY}: {self.name}: {prompt.where}: {error}") from error
        return scores


@dataclass(frozen=True)
class FunctionSource:
    """A Python function, called with `prompts` (texts, or lists of messages), `completions` (texts) and `rows`."""

    name: str
    function: Callable[..., Any]

    def __call__(self, completions: Completions) -> list[float | None]:
        """Raises InputError naming the function, and the prompt, for what is no score."""
        prompts = completions.prompts
        given: dict[str, list[Any]] = {
            "prompts": [prompt.said for prompt in prompts],
            "completions": list(completions.texts),
            "rows": [dict(prompt.row) for prompt in prompts],
        }
        values = called(f"{KEY}: {self.name}", self.function, given, prompts)
        return [
            None if value is None else self._number(value, prompt)
            for value, prompt in zip(values, prompts, strict=True)
        ]

    def _number(self, value: Any, prompt: Prompt) -> float:
        return finite(value, f"{KEY}: {self.name}: {prompt.where}")


class ModelSource:
    """A reward model, read at the end of the assistant's turn; its 0 is the mean of good answers, where known.

    It is given the ids that it learnt from: the prompt's, those of the completion as they were sampled, and what its
    chat template prints at the end of a turn, also where the completion was cut. One with another tokenizer than the
    policy's reads the same conversation in its own. Completions of a prompt share it.
    """

    def __init__(
        self,
        name: str,
        model: RewardModel,
        tokenizer: Tokenizer,
        policy_tokenizer: Tokenizer,
        *,
        budget: int = 8192,
        ranks: Ranks | None = None,
    ) -> None:
        """`model` is in evaluation mode and stays as it is; rows hold up to `budget` tokens. Where `ranks` share
        the model, each call must be one of all of them."""
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self._speaks_alike = _speak_alike(tokenizer, policy_tokenizer)
        self._budget = budget
        self._ranks = ranks if ranks is not None and ranks.share_models else None
        self._endings: dict[str, list[int]] = {}

    @torch.no_grad()
    def __call__(self, completions: Completions) -> list[float | None]:
        """Raises InputError naming a completion that the model cannot read."""
        shared = self._groups(completions)
        samples = [self._sample(completions, places) for places in shared]
        lengths = [sample.length for sample in samples]
        device = self.model.device
        scores: dict[int, float] = {}
        rows = pack(lengths, max(self._budget, *lengths)).rows if samples else []
        if self._ranks is not None:  # who has fewer rows makes passes of nothing for the others' sake
            rows += [[]] * (self._ranks.most(len(rows)) - len(rows))
        for row in rows:
            stop.poll()
            rewards = self.model(make_row([samples[place] for place in row]).to(device))
            places = [place for group in row for place in shared[group]]
            scores |= dict(zip(places, self.model.normalised(rewards).tolist(), strict=True))
        return [scores[place] for place in range(len(completions))]

    def _groups(self, completions: Completions) -> list[list[int]]:
        """Places of the completions of each prompt, as many together as fit into a row."""
        found: list[list[int]] = []
        current: dict[int, list[int]] = {}
        room: dict[int, int] = {}
        for place, (prompt, tokens) in enumerate(zip(completions.prompts, completions.tokens, strict=True)):
            if id(prompt) not in current or room[id(prompt)] < len(tokens):
                current[id(prompt)] = []
                found.append(current[id(prompt)])
                room[id(prompt)] = self._budget - len(prompt.tokens)
            current[id(prompt)].append(place)
            room[id(prompt)] -= len(tokens)
        return found

    def _sample(self, completions: Completions, places: list[int]) -> Sample:
        """A prompt as the root and its completions as branches."""
        prompt = completions.prompts[places[0]]
        try:
            asked, whole = self._ids(prompt, completions, places)
        except InputError as error:
            raise InputError(f"{KEY}: {self.name}: {prompt.where}: {error}") from error
        reads = self.model.architecture.max_positions
        if max(map(len, whole)) > reads:
            raise InputError(
                f"{KEY}: {self.name}: {prompt.where}: {counted(max(map(len, whole)), 'token')} with its completion, "
                "and the model "
                f"reads {reads}: lower max_new_tokens or data.max_length"
            )
        start = min(common_prefix([asked, *whole]), min(map(len, whole)) - 1)
        branches = [_segment(ids[start:], learnt=True, parent=0 if start else -1) for ids in whole]
        return Sample(prompt.where, (*([_segment(asked[:start])] if start else []), *branches))

    def _ids(self, prompt: Prompt, completions: Completions, places: list[int]) -> tuple[list[int], list[list[int]]]:
        """The ids of the prompt, and of the prompt with each completion up to the end of the turn."""
        if self._speaks_alike:
            asked: list[int] = prompt.tokens.tolist()
            ending = self._ending(prompt)
            bodies = [_without_end(completions, place) for place in places]
            return asked, [[*asked, *body, *ending] for body in bodies]
        whole = self._learnt([prompt.conversation(completions.texts[place]) for place in places])
        return encode_prompt(prompt, self.tokenizer), whole

    def _ending(self, prompt: Prompt) -> list[int]:
        """What ends a turn in the ids that are learnt, the same after two answers: the end token, and what templates
        print after it (ChatML a line end)."""
        if prompt.layout not in self._endings:
            one, other = self._learnt([prompt.conversation(answer) for answer in ("a", "b")])
            same = common_prefix([one[::-1], other[::-1]])
            self._endings[prompt.layout] = one[len(one) - same :]
        return self._endings[prompt.layout]

    def _learnt(self, conversations: list[Conversation]) -> list[list[int]]:
        """The ids of conversations up to the last that is learnt, as preferences are cut; raises RowError."""
        found = []
        for encoded in self.tokenizer.encode_batch(conversations):
            if isinstance(encoded, RowError):
                raise encoded
            ids, learnt = encoded
            found.append(ids[: int(np.flatnonzero(learnt)[-1]) + 1].tolist() if learnt.any() else ids.tolist())
        return found


def make_sources(
    config: Rewards,
    tokenizer: Tokenizer,
    fabric: groups.Fabric,
    device: torch.device | str,
    *,
    budget: int = 8192,
    longest: int | None = None,
    own: RewardSource | None = None,
    ranks: Ranks | None = None,
) -> list[Weighted]:
    """The sources of a recipe; reward models are loaded once, frozen, onto `device`.

    `tokenizer` is the policy's, `longest` are the tokens of the run's longest sequence; `own` is what `hydra` stands
    for. `ranks` share models where they share that which is trained. Raises InputError with all that is wrong with the
    specs before any model is loaded.
    """
    light = light_sources(config)
    if own is not None:
        light[HYDRA] = own
    return [
        Weighted(
            light.get(spec)
            or load_source(spec, tokenizer, fabric, device, budget=budget, longest=longest, ranks=ranks),
            weight,
        )
        for spec, weight in config.sources.items()
    ]


def light_sources(config: Rewards) -> dict[str, RewardSource]:
    """Those of a recipe's sources that are no models; raises InputError with all that is wrong with them."""
    if not config.sources:
        raise InputError(f"{KEY}: missing: give what scores a completion, e.g. {{exact?column=answer: 1.0}}")
    mistakes: list[str] = []
    light: dict[str, RewardSource] = {}
    for spec in config.sources:
        try:
            if not spec.startswith(MODEL) and spec != HYDRA:
                light[spec] = _light_source(spec)
        except InputError as error:
            mistakes += [f"{KEY}: {mistake}" for mistake in error.mistakes]
    if mistakes:
        raise InputError(*mistakes)
    return light


def make_source(
    spec: str,
    tokenizer: Tokenizer,
    fabric: groups.Fabric,
    device: torch.device | str,
    *,
    budget: int = 8192,
    longest: int | None = None,
    ranks: Ranks | None = None,
) -> RewardSource:
    """One source; see `make_sources`."""
    if spec.startswith(MODEL):
        return load_source(spec, tokenizer, fabric, device, budget=budget, longest=longest, ranks=ranks)
    return _light_source(spec)


def load_source(
    spec: str,
    tokenizer: Tokenizer,
    fabric: groups.Fabric,
    device: torch.device | str,
    *,
    budget: int = 8192,
    longest: int | None = None,
    ranks: Ranks | None = None,
) -> ModelSource:
    """The reward model of `model:SOURCE`, in the precision of `fabric`; raises InputError where there is none."""
    alone = replace(
        fabric,
        devices="auto",
        num_nodes=1,
        strategy="auto",
        precision="bf16-true" if fabric.precision == "bf16-true" else "32-true",
        compile=False,
    )
    try:
        model = groups.Model(source=spec.removeprefix(MODEL))
        shared = ranks is not None and ranks.share_models
        session = open_any(model, groups.Quantize(), alone, as_judge=True, longest=longest, shared=shared)
    except InputError as error:
        raise InputError(*(f"{KEY}: {line.removeprefix('model.source: ')}" for line in error.mistakes)) from error
    if not isinstance(session.model, RewardModel):
        raise InputError(
            f"{KEY}: {spec}: a language model, it has no score: train a reward model with `litrecipe align reward`"
        )
    if ranks is not None and shared:
        if fabric.tensor_parallel > 1 and session.quantize.method != "none":
            raise InputError(
                f"{KEY}: {spec}: its base is quantised, and cannot be split for fabric.tensor_parallel: give the "
                "folder final/ of its run, whose base is not"
            )
        return ModelSource(
            spec, ranks.place(session.model, fabric), session.tokenizer, tokenizer, budget=budget, ranks=ranks
        )
    return ModelSource(spec, session.model.to(device), session.tokenizer, tokenizer, budget=budget)


def _light_source(spec: str) -> RewardSource:
    """A source that is no model; raises InputError with every mistake in its spec."""
    if spec.startswith(FUNCTION):
        return FunctionSource(spec, find_function(spec))
    name = spec.partition("?")[0]
    if name in RULES:
        return RuleSource(spec, parse_rule(spec))
    known = [*RULES, "model", "function"]
    hint = did_you_mean(name.partition(":")[0], known)
    cure = f"there are {', '.join(RULES)}, {MODEL}FOLDER and {FUNCTION}MODULE:NAME"
    raise InputError(f"{spec}: no such source{hint}; {cure}")


def find_function(spec: str) -> Callable[..., Any]:
    """The function of `function:module:name`, from what is installed or the current folder; InputError without one."""
    module_name, _, name = spec.removeprefix(FUNCTION).partition(":")
    if not module_name or not name:
        raise InputError(
            f"{spec}: give {FUNCTION}MODULE:NAME, e.g. {FUNCTION}rewards:brevity for brevity in rewards.py"
        )
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last: a file beside the recipe must not stand in for a package
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        raise InputError(f"{spec}: {module_name} cannot be imported: {_told(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"{spec}: {name}: not in {module_name}{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{spec}: {name}: a {type(found).__name__}: give a function")
    function: Callable[..., Any] = found
    return function


def check_light(config: Rewards, prompts: Sequence[Prompt]) -> None:
    """Raise InputError with what is wrong with sources that are no models, before any model is loaded."""
    check_columns_of(light_sources(config).values(), prompts)


def column_of(source: RewardSource) -> str | None:
    """The column of a prompt's row that a rule reads."""
    column: str | None = getattr(getattr(source, "rule", None), "column", None)
    return column


def check_columns_of(sources: Iterable[RewardSource], prompts: Sequence[Prompt]) -> None:
    """Raise InputError for rules whose column no prompt's row has: they would never apply."""
    names = {name for prompt in prompts for name in prompt.row}
    mistakes = []
    for source in sources:
        column = column_of(source)
        if column is not None and column not in names:
            hint = did_you_mean(column, names) or f": rows have {list_of(sorted(names))}"
            mistakes.append(f"{KEY}: {source.name}: {column}: no row has this column{hint}")
    if mistakes:
        raise InputError(*mistakes)


def called(
    name: str, function: Callable[..., Any], given: dict[str, list[Any]], prompts: Sequence[Prompt]
) -> list[Any]:
    """What a user's function returns for lists that are parallel to `prompts`, as such a list.

    Raises InputError for all else that it does. Where it raises something itself, it is asked again for one after the
    other, to name the prompt of the first at which it does. Of several ranks one may have no prompts: it is not called.
    """
    if not prompts:
        return []
    try:
        values = _listed(function(**given))
    except InputError:
        raise
    except Exception as error:  # it may raise anything
        _one_by_one(name, function, given, prompts)
        raise InputError(f"{name}: {_told(error)}{_place(error)}") from error
    if len(values) != len(prompts):
        raise InputError(
            f"{name}: returned {counted(len(values), 'value')} for {counted(len(prompts), 'completion')}: give one for "
            "each"
        )
    return values


def _one_by_one(
    name: str, function: Callable[..., Any], given: dict[str, list[Any]], prompts: Sequence[Prompt]
) -> None:
    """Raise InputError naming the first prompt at which a function raises something, if it does at one by itself."""
    for place, prompt in enumerate(prompts):
        try:
            _listed(function(**{key: values[place : place + 1] for key, values in given.items()}))
        except Exception as error:  # it may raise anything
            raise InputError(f"{name}: {prompt.where}: {_told(error)}{_place(error)}") from error


def _listed(result: Any) -> list[Any]:
    return list(result.tolist() if hasattr(result, "tolist") else result)


def _told(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _place(error: Exception) -> str:
    """` (file:line)` where it was raised."""
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if len(frames) > 1 else ""


def finite(value: Any, where: str) -> float:
    value = value.item() if hasattr(value, "item") else value  # of numpy or torch
    if not isinstance(value, Real) or not math.isfinite(value):
        raise InputError(f"{where}: {value!r}: not a finite number: give one, or None where there is none")
    return float(value)


def _speak_alike(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether both make the same ids of a conversation: reward models differ from their base in the pad token only."""
    told = [{name: text for name, text in one.special_tokens.items() if name != "pad_token"} for one in (a, b)]
    same = a.template.source == b.template.source and told[0] == told[1] and a.backend.to_str() == b.backend.to_str()
    return same and (not a.template.tells_time or a.fingerprint == b.fingerprint)


def _without_end(completions: Completions, place: int) -> list[int]:
    """A completion as it was sampled, but for the token that ended it."""
    tokens = completions.tokens[place]
    return tokens[:-1] if completions.ended[place] == "eos" else tokens


def _segment(ids: Sequence[int], learnt: bool = False, parent: int = -1) -> Segment:
    weights = np.full(len(ids), float(learnt), dtype=np.float32)
    if parent < 0:
        weights[0] = 0
    return Segment(np.array(ids, dtype=np.int32), weights, parent)
