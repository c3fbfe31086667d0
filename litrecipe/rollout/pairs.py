"""Rounds of preference learning: completions in, pairs of a better and a worse one out.

Shapes: A completions of a round; P predictions of its pairs, pair after pair.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litrecipe.config.errors import InputError
from litrecipe.config.progress import counted, say, warn
from litrecipe.config.rounds import IterativeDpo
from litrecipe.data.formats import RowError
from litrecipe.data.prompts import Prompt
from litrecipe.data.samples import SampleSet
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.model.row import Row, Sample, Segment
from litrecipe.objectives.answers import REF_LOGPS
from litrecipe.objectives.dpo import DOUBT
from litrecipe.rollout.experience import Rollout, Scored, measure
from litrecipe.rollout.lessons import Lesson, group_lesson
from litrecipe.rollout.practice import Practice
from litrecipe.rollout.rewards import Judge
from litrecipe.rollout.source import about
from litrecipe.rollout.sources import Completions
from litrecipe.rollout.verifiable import Answer, Repetition, did_you_mean

TIED, IDENTICAL, LOW, CLOSE, LONG = "tied", "identical", "below min_chosen", "within the margin", "too long for a row"
REPEATING = "all repeating themselves"
"""Why a prompt has no pair."""


@dataclass(frozen=True)
class Paired:
    """Which completions are held against each other."""

    pairs: list[tuple[int, int]]
    """Places of the better and the worse one, at most one pair a prompt."""
    dropped: dict[str, int]
    """Why → how many prompts have none."""
    prompts: int
    """How many were answered."""

    def __str__(self) -> str:
        dropped = ", ".join(f"{count} {why}" for why, count in self.dropped.items())
        said = f"{counted(len(self.pairs), 'pair')} from {counted(self.prompts, 'prompt')}"
        return f"{said} ({dropped})" if dropped else said


def pair_up(scored: Scored, config: IterativeDpo, budget: int) -> Paired:
    """The best completion of each prompt against the worst, the first of several; see `IterativeDpo` for what is left
    out, and so is what is longer than `budget` tokens."""
    of_prompts: dict[int, list[int]] = {}
    for place, group in enumerate(scored.groups.tolist()):
        of_prompts.setdefault(group, []).append(place)
    pairs: list[tuple[int, int]] = []
    dropped: Counter[str] = Counter()
    for places in of_prompts.values():
        found = _pair(places, scored, config, budget)
        if isinstance(found, str):
            dropped[found] += 1
        else:
            pairs.append(found)
    return Paired(pairs, dict(sorted(dropped.items())), len(of_prompts))


def _pair(places: list[int], scored: Scored, config: IterativeDpo, budget: int) -> tuple[int, int] | str:
    """Better and worse of the completions of one prompt, or why there is no pair."""
    completions, scores = scored.completions, scored.scores.total.tolist()
    distinct = {completions.texts[place]: place for place in reversed(places)}.values()
    if len(distinct) < 2:
        return IDENTICAL
    repeating = {place for place in distinct if _repeats_itself(completions, place, config)}
    if len(repeating) == len(distinct):
        return REPEATING
    better = max(set(distinct) - repeating, key=lambda place: (scores[place], -place))
    worse = min(distinct, key=lambda place: (place not in repeating, scores[place], place))
    if worse not in repeating and scores[better] == scores[worse]:
        return TIED
    if config.min_chosen is not None and scores[better] < config.min_chosen:
        return LOW
    is_gold = config.gold_margin is not None and better == places[-1]
    margin = config.gold_margin if is_gold and config.gold_margin is not None else config.margin
    if worse not in repeating and scores[better] - scores[worse] < margin:
        return CLOSE
    if len(completions.prompts[better].tokens) + sum(len(completions.tokens[one]) for one in (better, worse)) > budget:
        return LONG
    return better, worse


def _repeats_itself(completions: Completions, place: int, config: IterativeDpo) -> bool:
    if config.max_repetition is None:
        return False
    answer = Answer(completions.texts[place], len(completions.tokens[place]), {})
    return -(Repetition().score(answer) or 0.0) > config.max_repetition


def pair_samples(scored: Scored, paired: Paired, number: int, config: IterativeDpo) -> list[Sample]:
    """Each prompt with its better and its worse completion as branches, as preferences are learnt; with `soft_labels`
    beside how likely the worse is to be the better one, which one that repeats itself is not."""
    completions, totals = scored.completions, scored.scores.total.double()
    samples = []
    for pair in paired.pairs:
        prompt = completions.prompts[pair[0]]
        asked = np.asarray(prompt.tokens)
        branches = [np.asarray(completions.tokens[place]) for place in pair]
        said = (Segment(tokens, np.ones(len(tokens), dtype=np.float32), parent=0) for tokens in branches)
        root = Segment(asked, np.zeros(len(asked), dtype=np.float32))
        extra = {}
        if config.soft_labels:
            better, worse = pair
            doubt = float(torch.sigmoid(totals[worse] - totals[better]))
            extra[DOUBT] = np.array([0.0 if _repeats_itself(completions, worse, config) else doubt])
        samples.append(Sample(f"{prompt.where}@{number}:{pair[0]}", (root, *said), extra))
    return samples


@dataclass(kw_only=True)
class Pairing(Practice):
    """Practice whose lessons are pairs, beside what their reference says of them.

    All pairs lie in `folder` as rows of preference files, and as samples where they may be learnt again.
    """

    rounds: IterativeDpo
    golds: dict[str, list[int]]
    """`Prompt.where` → tokens of the data's own answer; empty where it is no candidate."""
    folder: Path
    needs_reference: bool
    draw: Callable[..., Lesson] = field(default=group_lesson, init=False, repr=False)  # nobody asks it

    def sample(self, prompts: Sequence[Prompt], streams: Sequence[int]) -> Completions:
        """The candidates of each prompt: what is sampled, and behind it the data's own answer."""
        n, column = self.rounds.completions_per_prompt, self.rounds.gold
        every = self.rounds.candidates
        used = [stream for place, stream in enumerate(streams) if place % every < n]
        with self.at_rest():
            found = self.sampler(prompts, self.settings, n, used, "sampling")
        if column is None:
            return found
        texts, tokens, ended = [], [], []
        for place, prompt in enumerate(prompts):
            own = slice(place * n, place * n + n)
            texts += [*found.texts[own], prompt.row[column]]
            tokens += [*found.tokens[own], self.golds[prompt.where]]
            ended += [*found.ended[own], "eos"]
        return Completions([prompt for prompt in prompts for _ in range(every)], texts, tokens, ended)

    def learn(self, rollout: Rollout, kl_coef: float) -> Lesson:
        """The round's pairs, those of earlier rounds that are learnt again, and the reference's log-probabilities of
        both, by the forward pass of the training: where the policy is its own reference, its ratios start at 1."""
        paired = pair_up(rollout.scored, self.rounds, self.budget)
        metrics = self._told(rollout.scored, paired)
        samples = pair_samples(rollout.scored, paired, rollout.number, self.rounds)
        if not samples:
            return Lesson({}, metrics, None, [], str(paired))
        if not self.rounds.online:
            self._keep(rollout, paired, samples)
            earlier = self._earlier(rollout.number)
            again = f", {len(earlier)} of earlier rounds besides" if earlier else ""
            say(f"round {rollout.number}: {paired}{again}; reward {metrics['reward']:.4g}")
            samples += earlier
        extras: dict[str, Tensor] = {}
        if self.needs_reference:
            with self.at_rest():
                progress = "log-probabilities of the reference"
                device, budget, ranks = self.fabric.device, self.budget, self.ranks
                extras = measure(self.ask, samples, budget=budget, device=device, ranks=ranks, progress=progress)
        return Lesson(extras, metrics, None, samples)

    def ask(self, row: Row) -> dict[str, Tensor]:
        """What the reference says of each prediction (P,) of a row: that of the run, or the policy as it stands."""
        module = self.module
        return {REF_LOGPS: module.ref_logps(row) if self.rounds.holds_to_start else module(row).logps}

    def _told(self, scored: Scored, paired: Paired) -> dict[str, float]:
        """Scores of what was sampled, and what became of it."""
        every, totals = self.rounds.candidates, scored.scores.total
        sampled = [
            place for place in range(len(scored.completions)) if place % every < self.rounds.completions_per_prompt
        ]
        differences = [float(totals[better] - totals[worse]) for better, worse in paired.pairs]
        told = about(scored.at(sampled)) | {"pairs": float(len(paired.pairs))}
        told["pairs/share"] = len(paired.pairs) / paired.prompts
        for why, name in ((TIED, "tied"), (IDENTICAL, "identical")):
            told[f"pairs/{name}"] = paired.dropped.get(why, 0) / paired.prompts
        if differences:
            told["pairs/margin"] = float(np.mean(differences))
            if self.rounds.gold is not None:
                golds = [better % every == every - 1 for better, _ in paired.pairs]
                told["pairs/gold_chosen"] = float(np.mean(golds))
        return told

    def _keep(self, rollout: Rollout, paired: Paired, samples: list[Sample]) -> None:
        if self.ranks.writes:
            path = self.folder / f"{rollout.number:06d}"
            if self.rounds.history:
                SampleSet.write(path.with_suffix(".samples"), samples)
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in rows_of(rollout.scored, paired))
            path.with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")
        self.ranks.agree(None)

    def _earlier(self, number: int) -> list[Sample]:
        """Pairs of the rounds before, fewer the older they are; which, is a pure function of seed and rounds."""
        found: list[Sample] = []
        for age in range(1, number):
            share = self.rounds.history / 2 ** (age - 1)
            if share * self.rounds.prompts_per_round < 0.5:
                break
            saved = SampleSet(self.folder / f"{number - age:06d}.samples")
            order = np.random.default_rng([self.seed, number, age]).permutation(len(saved))
            found += [saved[place] for place in sorted(order[: round(share * len(saved))])]
        return found


def rows_of(scored: Scored, paired: Paired) -> list[dict[str, Any]]:
    """The pairs as rows of a preference file."""
    completions, totals = scored.completions, scored.scores.total
    return [
        {
            "prompt": completions.prompts[better].said,
            "chosen": completions.texts[better],
            "rejected": completions.texts[worse],
            "score_chosen": float(totals[better]),
            "score_rejected": float(totals[worse]),
            "prompt_id": completions.prompts[better].where,
        }
        for better, worse in paired.pairs
    ]


@dataclass(frozen=True)
class WinRates:
    """A judge as a source of rewards: how likely a completion is to beat another one of its prompt, on average.

    All are held against all (DNO, 2404.03715), each two both ways round: a judge may like one place better.
    """

    name: str
    judge: Judge
    candidates: int
    """Completions of each prompt, which stand side by side."""

    def __call__(self, completions: Completions) -> list[float | None]:
        """From 0 to 1, ½ on average over each prompt."""
        n = self.candidates
        duels = [
            (first + one, first + other)
            for first in range(0, len(completions), n)
            for one, other in permutations(range(n), 2)
        ]
        sides = zip(*duels, strict=True) if duels else ([], [])  # ranks that share a judge ask it together
        chances = self.judge(*(completions.at(side) for side in sides))
        wins = [0.0] * len(completions)
        for (one, other), chance in zip(duels, chances, strict=True):
            wins[one] += chance
            wins[other] += 1 - chance
        return [won / (2 * (n - 1)) for won in wins]


def gold_answers(prompts: Sequence[Prompt], column: str, tokenizer: Tokenizer, longest: int) -> dict[str, list[int]]:
    """`Prompt.where` → tokens of the answer in a column of its row, with the token that ends it, as if it were sampled.

    Without those of prompts that have none, or one of more than `longest` tokens; it is said how many. Raises
    InputError where no prompt is left.
    """
    given = [one for one in prompts if isinstance(one.row.get(column), str) and one.row[column].strip()]
    if not given:
        hint = did_you_mean(column, {name for prompt in prompts for name in prompt.row})
        raise InputError(f"iterative_dpo.gold: {column}: no row has a text there{hint}")
    found: dict[str, list[int]] = {}
    for prompt, encoded in zip(
        given, tokenizer.encode_batch([one.conversation(one.row[column]) for one in given]), strict=True
    ):
        if isinstance(encoded, RowError):
            raise InputError(f"{prompt.where}: {encoded}")
        ids, start = encoded[0].tolist(), len(prompt.tokens)
        ends = [place for place in range(start, len(ids)) if ids[place] in tokenizer.eos_ids]
        answer = ids[start : ends[0] + 1] if ends else []
        if ids[:start] == prompt.tokens.tolist() and 0 < len(answer) <= longest:
            found[prompt.where] = answer
    if not found:
        cure = "raise max_new_tokens, or remove it"
        raise InputError(f"iterative_dpo.gold: {column}: no answer there fits max_new_tokens {longest}: {cure}")
    if len(found) < len(prompts):
        lost = len(prompts) - len(found)
        warn(
            f"iterative_dpo.gold: {lost} of {counted(len(prompts), 'prompt')} have no answer of up to "
            f"{counted(longest, 'token')}: left out"
        )
    return found
