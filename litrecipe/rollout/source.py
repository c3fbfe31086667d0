"""Rollouts as a source of steps: sample, score, and hand out minibatches until the rollout is used up.

What is sampled is a pure function of the weights, the seed and how far the run is, so a rollout that was interrupted is
simply done again. One that was finished lies in the run directory for as long as a checkpoint stands in its midst, as a
folder of samples; and for people as JSON lines.

Shapes: A completions of a rollout, P tokens of all of them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from litrecipe.checkpoint.state import states
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Train
from litrecipe.config.online import Online
from litrecipe.config.progress import counted, show_table, warn
from litrecipe.data.prompts import Prompt
from litrecipe.data.remembered import predictions
from litrecipe.data.samples import SampleSet, is_complete
from litrecipe.data.source import Order, RecordedSource
from litrecipe.engine.fabric import Ranks
from litrecipe.model.row import Sample
from litrecipe.objectives.advantages import steered, zero_variance
from litrecipe.objectives.online import COUNTED, PTX
from litrecipe.rollout.experience import Rollout, Scored, joined, samples_of, with_extras
from litrecipe.rollout.lessons import Lesson
from litrecipe.rollout.rewards import Scores
from litrecipe.rollout.sources import Completions
from litrecipe.rollout.table import sample_table, write_rollout

RESAMPLED = 10
"""Times that groups which say nothing are replaced by others before the rollout goes on with fewer."""
GROUP = "group"
"""Name of the extra (1,) that holds which prompt of its rollout a sample belongs to."""


class Method(Protocol):
    """What differs between methods that sample."""

    def sample(self, prompts: Sequence[Prompt], streams: Sequence[int]) -> Completions:
        """`completions_per_prompt` completions of each prompt, side by side, each from its own random stream."""
        ...

    def score(self, completions: Completions) -> Scores:
        """What the reward sources say; all ranks call this at the same time, each with its own."""
        ...

    def learn(self, rollout: Rollout, kl_coef: float) -> Lesson:
        """Advantages, and what else the objective needs."""
        ...

    def finished(self) -> None:
        """A rollout was learnt."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What scoring remembers from one rollout to the next, as JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        ...


@dataclass
class Place:
    """How far a run is."""

    prompts: int = 0
    """Prompts that were taken."""
    completions: int = 0
    """Completions that were sampled: the number of the next random stream."""
    rollout: int = 0
    """Rollouts that were begun."""
    minibatch: int = 0
    """Minibatches of the last one that were handed out."""
    minibatches: int = 0
    """How many it has."""
    steps: int = 0
    """Minibatches of the whole run."""
    kl_coef: float = 0.0
    """The KL's coefficient for the next rollout."""
    left_out: tuple[int, ...] = ()
    """Numbers of the prompts whose pass rate was out of range when they were asked last."""


OLDER = (
    "the checkpoint was made in the midst of this rollout: delete that one, and --checkpoint.resume auto goes on from "
    "the one before"
)


class Rollouts:
    """A `StepSource` that samples from the policy as it stands.

    Minibatches are made of whole groups of completions, shuffled anew in each epoch; which, is a pure function of seed
    and rollout.
    """

    def __init__(
        self,
        method: Method,
        prompts: Sequence[Prompt],
        config: Online,
        train: Train,
        run_dir: Path,
        ranks: Ranks,
        name: str = "ppo",
        success: float | None = None,
    ) -> None:
        """`name` is that of the recipe's group, for messages; a score of `success` is a pass."""
        self.name, self.success = name, success
        self.method, self.prompts, self.config, self.ranks, self.train = method, prompts, config, ranks, train
        self.run_dir, self.folder = run_dir, run_dir / "rollouts"
        self.order = Order(len(prompts), train.seed)
        self.limit = prompts_of(train, len(prompts))
        """Prompts of the whole run."""
        self.at = Place(kl_coef=config.kl_coef)
        self.samples: Sequence[Sample] = []
        """Of the rollout that is learnt from, with their extras."""
        self.plan: list[list[int]] = []
        """Which of them each minibatch takes."""
        self.metrics: dict[str, float] = {}
        """About it."""
        self.silent = 0
        """Times that rewards said nothing, one after the other; for warnings only."""
        self.beside: RecordedSource | None = None
        """Plain text that is learnt along (PPO-ptx, 2203.02155)."""

    @property
    def groups(self) -> int:
        """Prompts of a rollout."""
        return self.config.rollout_batch_size // self.config.completions_per_prompt

    def next_step(self) -> list[Sample]:
        """The next minibatch; a new rollout first where the last one is used up. Empty when no prompt is left."""
        if self.at.minibatch == self.at.minibatches and not self._roll_out():
            return []
        places = self.plan[self.at.minibatch]
        self.at.minibatch += 1
        self.at.steps += 1
        taken = [self.samples[place] for place in places]
        if self.beside is None:
            return taken
        rollout = [replace(one, extra={**one.extra, PTX: np.zeros(predictions(one))}) for one in taken]
        return rollout + [plain(one, rollout[0].extra) for one in self.beside.next_step()]

    def after_step(self, kl: float) -> None:
        """Told after each step how far the policy is from the one that sampled, nats a token: too far, and what is left
        of the rollout is not learnt."""
        left = self.at.minibatches - self.at.minibatch
        too_far = self.config.max_kl is not None and kl > self.config.max_kl
        self.metrics["policy/left_out"] = float(left) if too_far else 0.0
        if too_far or not left:
            self.at.minibatch = self.at.minibatches
            self.method.finished()

    def told(self) -> dict[str, float]:
        """About the rollout that is learnt from, and how many completions the run has seen."""
        return self.metrics | {"completions": float(self.at.completions)}

    def total_steps(self, train: Train) -> int:
        """The smaller of `max_steps` and the steps of as many rollouts as there are prompts for; fewer are made where
        prompts or minibatches are left out. However far it is, so that a schedule goes on as it was."""
        return steps_of(self.config, train, len(self.prompts))

    def state_dict(self) -> dict[str, Any]:
        """How far it is, what scoring remembers, and what both depend on."""
        beside = {"beside": self.beside.state_dict()} if self.beside else {}
        return {**asdict(self.at), "scoring": self.method.state_dict(), "of_prompts": len(self.prompts), **beside}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue there. Raises InputError when it stands among other prompts or its rollout is missing."""
        if state["of_prompts"] != len(self.prompts):
            was = f"the checkpoint was made with {state['of_prompts']}: resume with the same, or start a new out_dir"
            raise InputError(f"data.train: {counted(len(self.prompts), 'prompt')}: {was}")
        self.at = Place(**{name: state[name] for name in asdict(self.at)})
        self.at.left_out = tuple(self.at.left_out)  # JSON has lists
        self.method.load_state_dict(state["scoring"])
        if self.beside is not None:
            self.beside.load_state_dict(state["beside"])
        if self.at.minibatch < self.at.minibatches:
            saved = SampleSet(self._saved(self.at.rollout), cure=OLDER)
            self.samples = [saved[place] for place in range(len(saved))]
            self.metrics = saved.about["metrics"]
            self._plan()

    def _roll_out(self) -> bool:
        """Sample, score, and save; whether a prompt was left. Who interrupts it finds everything as it was."""
        before = replace(self.at), self.method.state_dict()
        started = time.monotonic()
        try:
            learnt = self._learnt()
            if learnt is None:
                return False
            rollout, lesson, samples, groups = learnt
            if not counts(lesson.extras):
                raise InputError(
                    f"{self.name}.truncated: mask: all completions were cut at {self.name}.max_new_tokens "
                    f"{self.config.max_new_tokens}, none is learnt: give them more room, or use learn"
                )
            if lesson.kl is not None:
                coef, kl, seen = self.at.kl_coef, float(lesson.kl.mean()), len(rollout.scored.completions)
                self.at.kl_coef = steered(coef, kl, self.config.kl_target, self.config.kl_horizon, seen)
        except BaseException:
            self.at = before[0]
            self.method.load_state_dict(before[1])
            raise
        with_group = [
            replace(one, extra={**one.extra, GROUP: np.array([group])})
            for one, group in zip(samples, groups, strict=True)
        ]
        self.samples = with_extras(with_group, lesson.extras)
        self.metrics |= about(rollout.scored) | lesson.metrics
        self._plan()
        self.at.minibatch, self.at.minibatches = 0, len(self.plan)
        if self.ranks.writes:
            self._save(rollout, lesson)
        self.metrics["time/rollout"] = time.monotonic() - started
        self.ranks.agree(None)
        return True

    def _learnt(self) -> tuple[Rollout, Lesson, list[Sample], list[int]] | None:
        """The next rollout, its lesson, and what is learnt with the group of each; None where no prompt is left.

        One that holds nothing to learn is followed by one of the next prompts.
        """
        number = self.at.rollout + 1
        for _ in range(RESAMPLED):
            found = self._sampled()
            if found is None:
                return None
            samples, groups = samples_of(found, number, self.train.micro_batch_tokens)
            rollout = Rollout(number, found, samples)
            lesson = self.method.learn(rollout, self.at.kl_coef)
            if lesson.samples is not None:
                samples, groups = lesson.samples, list(range(len(lesson.samples)))
            if samples:
                self.at.rollout = number
                return rollout, lesson, samples, groups
        raise InputError(
            f"{self.name}: nothing to learn in {RESAMPLED} rollouts of {counted(self.groups, 'prompt')} each, one "
            "after the other "
            f"({lesson.said}): lower the bars, give other rewards, or a higher temperature"
        )

    def _sampled(self) -> Scored | None:
        """Scored completions of the next prompts; None where no prompt is left.

        Groups whose completions all score alike say nothing about which is better. They stay, are dropped, or are
        replaced by groups of other prompts (DAPO, 2503.14476), as the recipe has it.
        """
        kept: list[Scored] = []
        sampled = silent = 0
        for _ in range(RESAMPLED):
            there = sum(one.prompts for one in kept)
            places = self._next_places(self.groups - there)
            if not places:
                break
            found = self._scored(places)
            same = zero_variance(found.scores.total, found.groups)
            sampled, silent = sampled + len(same), silent + int(same.sum())
            if self.config.zero_variance != "keep":
                found = found.at(torch.nonzero(~same).flatten().tolist())
            kept += [found] if len(found.completions) else []
            if kept and self.config.zero_variance != "resample":
                break
            if sum(one.prompts for one in kept) == self.groups:
                break
        grouped = self.config.completions_per_prompt > 1
        self.metrics = {"frac_reward_zero_std": silent / sampled} if sampled and grouped else {}
        if self.config.filters:
            self.metrics["prompts/left_out"] = len(self.at.left_out) / len(self.prompts)
        if sampled and not kept:
            if self.at.rollout and not self._next_places(1):  # a run ends, as others do, with prompts that say nothing
                return None
            raise InputError(
                f"rewards.sources: all completions of a prompt score alike, {sampled} of them over: the model is "
                "always right or always wrong: give other prompts or rewards, or a higher temperature"
            )
        if not kept:
            return None
        rollout = joined(kept)
        self._warn_of_silence(rollout, silent == sampled and grouped)
        return rollout

    def _warn_of_silence(self, found: Scored, each_alike: bool) -> None:
        """Where rewards tell no completion from another: the first time, the second, the fourth, and so on."""
        given, total = found.scores.raw, found.scores.total
        mute = [name for name, scores in given.items() if all(score is None for score in scores)]
        why = None
        if mute:
            why = (
                f"{', '.join(mute)}: no score for any of {counted(len(total), 'completion')}: does it apply to these "
                "prompts?"
            )
        elif each_alike:
            why = "all completions of every prompt score alike: there is nothing to learn which is better"
        elif len(total) > 1 and bool((total == total[0]).all()):
            why = f"all {len(total)} completions score {float(total[0]):.4g}: there is nothing to learn which is better"
        self.silent = self.silent + 1 if why else 0
        if why and self.silent & (self.silent - 1) == 0:
            times = f" ({self.silent} times now, one after the other)" if self.silent > 1 else ""
            warn(f"rollout {self.at.rollout + 1}: {why}{times}")

    def _next_places(self, count: int) -> list[int]:
        """Places in the order of the next prompts that are to be asked."""
        taken: list[int] = []
        left_out = set(self.at.left_out)
        if len(left_out) == len(self.prompts):
            warn(f"the pass rate of every prompt is out of {self.name}.min_pass_rate … max_pass_rate: the run ends")
            return []
        while len(taken) < count and (self.limit is None or self.at.prompts < self.limit):
            if self.order[self.at.prompts] not in left_out:
                taken.append(self.at.prompts)
            self.at.prompts += 1
        return taken

    def _scored(self, places: list[int]) -> Scored:
        """All ranks' completions of the prompts at these places, which they share, in their order."""
        prompts = [self.prompts[self.order[place]] for place in places]
        n = self.config.completions_per_prompt
        mine = range(len(prompts))[self.ranks.rank :: self.ranks.world]
        streams = [self.at.completions + place * n + number for place in mine for number in range(n)]
        self.at.completions += len(prompts) * n
        with self.ranks.apart():
            completions = self.method.sample([prompts[place] for place in mine], streams)
        groups = torch.tensor([places[place] for place in mine], dtype=torch.int64).repeat_interleave(n)
        found = joined(self.ranks.agree(Scored(completions, self.method.score(completions), groups))).in_order()
        if self.config.filters:
            self._leave_out(found)
        return found

    def _leave_out(self, found: Scored) -> None:
        """From now on the prompts whose completions passed too rarely or too often."""
        assert self.success is not None
        passed = (found.scores.total >= self.success).double()
        rates = {place: float(passed[found.groups == place].mean()) for place in found.groups.unique().tolist()}
        low, high = self.config.min_pass_rate, self.config.max_pass_rate
        out = {self.order[place] for place, rate in rates.items() if not low <= rate <= high}
        self.at.left_out = tuple(sorted({*self.at.left_out, *out}))

    def _plan(self) -> None:
        """Which samples each minibatch takes."""
        of_group: dict[int, list[int]] = {}
        for place, sample in enumerate(self.samples):
            of_group.setdefault(int(sample.extra[GROUP][0]), []).append(place)
        groups = list(of_group.values())
        self.plan = []
        for epoch in range(self.config.epochs):
            shuffled = np.random.default_rng([self.train.seed, self.at.rollout, epoch]).permutation(len(groups))
            parts = np.array_split(shuffled, min(self.config.minibatches, len(groups)))
            plan = [[place for group in sorted(part) for place in groups[group]] for part in parts]
            self.plan += [some for some in plan if any(counts(self.samples[place].extra) for place in some)]

    def _saved(self, number: int) -> Path:
        return self.folder / f"{number:06d}.samples"

    def _save(self, rollout: Rollout, lesson: Lesson) -> None:
        """Keep it, remove those that no checkpoint needs, and show some of it now and then."""
        samples = self._saved(rollout.number)
        SampleSet.write(samples, self.samples, about=lambda: {"metrics": self.metrics})
        readable = samples.with_suffix(".jsonl")
        readable.unlink(missing_ok=True)
        write_rollout(readable, self.at.steps, rollout.scored.completions, rollout.scored.scores, lesson.kl)
        saved = states(self.run_dir / "checkpoints")
        needed = {rollout.number, *(state["source"]["rollout"] for state in saved)}
        for old in self.folder.glob("*.samples"):
            if is_complete(old) and int(old.stem) not in needed:
                shutil.rmtree(old)
        if rollout.number & (rollout.number - 1) == 0:  # 1, 2, 4, 8, …
            title = f"rollout {rollout.number}, after {counted(self.at.steps, 'step')} ({readable})"
            show_table(sample_table(rollout.scored.completions, rollout.scored.scores, lesson.kl, title=title))


def prompts_of(train: Train, prompts: int) -> int | None:
    """How many prompts a run takes in all; None where only its steps are limited."""
    epochs = 1.0 if train.epochs is None and train.max_steps is None else train.epochs
    return None if epochs is None else max(1, round(epochs * prompts))


def steps_of(config: Online, train: Train, prompts: int) -> int:
    """Most steps of a run over so many prompts."""
    limits = [] if train.max_steps is None else [train.max_steps]
    in_all = prompts_of(train, prompts)
    if in_all is not None:
        rollouts = -(-in_all // (config.rollout_batch_size // config.completions_per_prompt))
        limits.append(rollouts * config.minibatches * config.epochs)
    return min(limits)


def plain(sample: Sample, like: Mapping[str, Any]) -> Sample:
    """Plain text beside a rollout: it has the same extras, which mean nothing there."""
    zeros = np.zeros(predictions(sample))
    return replace(sample, extra={**dict.fromkeys(like, zeros), GROUP: np.array([-1]), PTX: zeros + 1})


def counts(extras: Mapping[str, Any]) -> bool:
    """Whether a token counts in the loss; all do where that is not said."""
    return COUNTED not in extras or bool((extras[COUNTED] > 0).any())


def about(found: Scored) -> dict[str, float]:
    """Mean and spread of scores, of each source, and lengths, by the field's names."""
    lengths = found.lengths.float()
    total = found.scores.total
    told = {
        "reward": float(total.mean()),
        "reward_std": float(total.std(correction=0)),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(found.truncated.float().mean()),
    }
    return told | {f"rewards/{name}": mean for name, mean in found.scores.means().items()}
