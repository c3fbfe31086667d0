"""Rollouts as steps: what is handed out, how often, and from where a run goes on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Train
from litrecipe.config.online import Online
from litrecipe.engine.fabric import Ranks
from litrecipe.model.row import Sample
from litrecipe.rollout.experience import Rollout, Scored, samples_of, with_extras
from litrecipe.rollout.lessons import Lesson
from litrecipe.rollout.rewards import Scores
from litrecipe.rollout.source import Rollouts
from litrecipe.rollout.sources import Completions

ALONE = Ranks(SimpleNamespace(global_rank=0, world_size=1, strategy=None))  # type: ignore[arg-type]


class Dice:
    """A method whose completions are their own random stream, scored by `judge`."""

    def __init__(self, judge: Callable[[int], float] = float) -> None:
        self.judge = judge
        self.seen = 0
        self.done = 0
        self.breaks = False

    def sample(self, prompts: Sequence[Any], streams: Sequence[int]) -> Completions:
        n = len(streams) // len(prompts)
        tokens = [[3] * (stream % 3) + [stream % 97, 2] for stream in streams]
        every = [prompt for prompt in prompts for _ in range(n)]
        return Completions(every, [str(stream) for stream in streams], tokens, ["eos"] * len(streams))

    def score(self, completions: Completions) -> Scores:
        self.seen += len(completions)
        scores = [self.judge(int(text)) for text in completions.texts]
        return Scores(torch.tensor(scores), {"dice": list(scores)}, {"dice": list(scores)})

    def learn(self, rollout: Rollout, kl_coef: float) -> Lesson:
        if self.breaks:
            raise KeyboardInterrupt
        lengths = rollout.scored.lengths
        kl = torch.full((len(lengths),), 3.0)
        return Lesson({"advantages": rollout.scored.scores.total.repeat_interleave(lengths)}, {"kl_coef": kl_coef}, kl)

    def finished(self) -> None:
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def prompts(count: int = 12) -> list[Any]:
    return [
        SimpleNamespace(where=f"p:{n}", tokens=np.arange(1, 3 + n % 4), said=f"prompt {n}", row={})
        for n in range(count)
    ]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Rollouts]:
    def rollouts(
        method: Dice | None = None,
        train: Train | None = None,
        count: int = 12,
        success: float | None = None,
        **keys: Any,
    ) -> Rollouts:
        keys = {"rollout_batch_size": 8, "completions_per_prompt": 2, "minibatches": 2, "epochs": 2} | keys
        config, train = Online(**keys), train or Train()
        return Rollouts(method or Dice(), prompts(count), config, train, tmp_path, ALONE, "ppo", success)

    return rollouts


def texts(samples: Sequence[Sample]) -> list[tuple[str, tuple[int, ...]]]:
    """Prompt and completion of each branch."""
    return [
        (one.id.partition("@")[0], tuple(int(token) for token in segment.tokens))
        for one in samples
        for segment in one.segments[1:]
    ]


def test_each_completion_is_learnt_once_an_epoch_and_groups_stay_whole(make: Callable[..., Rollouts]) -> None:
    """16 completions of 8 prompts, 2 minibatches, 2 epochs: 4 steps of 4 prompts with both of their completions."""
    source = make(rollout_batch_size=16, count=16)
    steps = [source.next_step() for _ in range(4)]
    for first in (0, 2):
        seen = Counter(texts([*steps[first], *steps[first + 1]]))
        assert len(seen) == 16 and set(seen.values()) == {1}
    for step in steps:
        assert Counter(prompt for prompt, _ in texts(step)) == {prompt: 2 for prompt, _ in texts(step)}
    assert [texts(step) for step in steps[:2]] != [texts(step) for step in steps[2:]]
    source.after_step(0.0)
    next_rollout = texts(source.next_step())
    assert not {prompt for prompt, _ in next_rollout} & {prompt for step in steps for prompt, _ in texts(step)}


def test_the_run_ends_with_the_prompts(make: Callable[..., Rollouts]) -> None:
    """12 prompts in rollouts of 5: three, the last of two prompts; 2 · 2 steps each."""
    source = make(rollout_batch_size=10)
    assert source.total_steps(Train()) == 12
    steps = 0
    while source.next_step():
        steps += 1
        assert source.total_steps(Train()) == 12
    assert (steps, source.at.prompts, source.at.completions) == (12, 12, 24)
    assert source.total_steps(Train(max_steps=7)) == 7


def test_more_epochs_than_one_go_on_when_only_steps_are_limited(make: Callable[..., Rollouts]) -> None:
    source = make(train=Train(max_steps=100))
    for _ in range(20):
        assert source.next_step()
    assert source.at.prompts == 20


def checkpoint(source: Rollouts) -> dict[str, Any]:
    """What a run's checkpoint holds of its source, as it is read again."""
    path = source.run_dir / "checkpoints" / f"step-{source.at.steps:08d}" / "state.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"source": source.state_dict()}))
    state: dict[str, Any] = json.loads(path.read_text())["source"]
    return state


@pytest.mark.parametrize("taken", [1, 3, 4])
def test_a_run_goes_on_where_it_stood(make: Callable[..., Rollouts], tmp_path: Path, taken: int) -> None:
    unbroken = make()
    for _ in range(taken):
        unbroken.next_step()
    state, metrics = checkpoint(unbroken), unbroken.told()
    rest = [unbroken.next_step() for _ in range(7)]
    resumed = make()
    resumed.load_state_dict(state)
    if taken < 4:
        assert {**resumed.told(), "time/rollout": 0} == {**metrics, "time/rollout": 0}
    for wanted, found in zip(rest, [resumed.next_step() for _ in range(7)], strict=True):
        assert texts(wanted) == texts(found)
        assert all((a.extra["advantages"] == b.extra["advantages"]).all() for a, b in zip(wanted, found, strict=True))
    assert resumed.state_dict() == unbroken.state_dict()


def test_a_rollout_that_is_lost_is_told_with_what_can_be_done(make: Callable[..., Rollouts]) -> None:
    source = make()
    source.next_step()
    state = checkpoint(source)
    (source.folder / "000001.samples" / "tokens.bin").unlink()
    with pytest.raises(InputError, match=r"000001\.samples/tokens\.bin: missing: .*and --checkpoint\.resume auto"):
        make().load_state_dict(state)


def test_other_prompts_are_refused(make: Callable[..., Rollouts]) -> None:
    state = make().state_dict()
    with pytest.raises(InputError, match=r"data\.train: 11 prompts: the checkpoint was made with 12"):
        make(count=11).load_state_dict(state)


def test_an_interrupted_rollout_leaves_everything_as_it_was(make: Callable[..., Rollouts]) -> None:
    method = Dice()
    source = make(method, kl_target=1.0)
    for _ in range(4):
        source.next_step()
    before = source.state_dict()
    method.breaks = True
    with pytest.raises(KeyboardInterrupt):
        source.next_step()
    assert source.state_dict() == before
    method.breaks = False
    assert source.next_step()


def test_the_coefficient_is_steered_once_a_rollout(make: Callable[..., Rollouts]) -> None:
    """A KL of 3 for a target of 1 is too much by more than .2: · (1 + .2 · 8 / 100)."""
    source = make(kl_target=1.0, kl_horizon=100, kl_coef=0.1)
    source.next_step()
    assert source.told()["kl_coef"] == 0.1
    assert source.at.kl_coef == pytest.approx(0.1 * 1.016)
    for _ in range(4):
        source.next_step()
    assert source.told()["kl_coef"] == pytest.approx(0.1 * 1.016)


def test_a_policy_that_went_too_far_learns_no_more_of_the_rollout(make: Callable[..., Rollouts]) -> None:
    method = Dice()
    source = make(method, max_kl=0.1)
    first = source.next_step()
    source.after_step(0.05)
    assert source.told()["policy/left_out"] == 0
    source.next_step()
    source.after_step(0.2)
    assert source.told()["policy/left_out"] == 2
    assert method.done == 1
    assert not set(texts(source.next_step())) & set(texts(first))
    assert source.at.rollout == 2


def test_the_length_of_a_run_is_what_it_was_at_its_start(make: Callable[..., Rollouts]) -> None:
    """12 prompts, four a rollout, four steps a rollout: 12, though each rollout is broken off after its first step. A
    schedule depends on it, and must not change where a run goes on."""
    source = make(max_kl=0.1)
    assert source.total_steps(Train()) == 12
    while source.next_step():
        source.after_step(1.0)
        assert source.total_steps(Train()) == 12
    assert source.at.steps == 3
    resumed = make(max_kl=0.1)
    resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert resumed.total_steps(Train()) == 12


class Graded(Dice):
    """Each prompt has a pass rate: of the two completions of prompt n, n % 3 pass."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def sample(self, prompts: Sequence[Any], streams: Sequence[int]) -> Completions:
        self.asked += [int(prompt.where[2:]) for prompt in prompts]
        found = super().sample(prompts, streams)
        return Completions(found.prompts, [str(place % 2) for place in range(len(streams))], found.tokens, found.ended)

    def score(self, completions: Completions) -> Scores:
        numbers = [int(prompt.where[2:]) for prompt in completions.prompts]
        scores = [float(n % 3 > int(text)) for n, text in zip(numbers, completions.texts, strict=True)]
        return Scores(torch.tensor(scores), {"dice": list(scores)}, {"dice": list(scores)})


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        ({"min_pass_rate": 0.5}, {1, 2, 4, 5, 7, 8, 10, 11}),
        ({"max_pass_rate": 0.5}, {0, 1, 3, 4, 6, 7, 9, 10}),
        ({"min_pass_rate": 0.3, "max_pass_rate": 0.7}, {1, 4, 7, 10}),
    ],
)
def test_prompts_out_of_the_range_of_pass_rates_are_asked_once(
    make: Callable[..., Rollouts], keys: dict[str, float], left: set[int]
) -> None:
    """Rates 0, ½ and 1. In the first epoch all twelve are asked, in the second and third those that are left; and a run
    that goes on asks the same."""
    train = Train(epochs=3)
    source = make(Graded(), train, success=1.0, **keys)
    for _ in range(8):
        source.next_step()
    state = checkpoint(source)
    while source.next_step():
        pass
    asked = source.method.asked  # type: ignore[attr-defined]
    assert sorted(asked[:12]) == list(range(12))
    assert sorted(asked[12:]) == sorted([*left, *left])
    assert source.told()["prompts/left_out"] == pytest.approx(1 - len(left) / 12)
    resumed = make(Graded(), train, success=1.0, **keys)
    resumed.load_state_dict(state)
    while resumed.next_step():
        pass
    assert resumed.method.asked == asked[8:]  # type: ignore[attr-defined]
    assert resumed.state_dict()["left_out"] == source.state_dict()["left_out"]


def test_a_run_ends_when_no_prompt_is_left(make: Callable[..., Rollouts], capsys: pytest.CaptureFixture[str]) -> None:
    source = make(Dice(lambda _: 1.0), Train(max_steps=100), success=1.0, max_pass_rate=0.9)
    steps = 0
    while source.next_step():
        steps += 1
    assert steps == 12
    assert "the pass rate of every prompt is out of ppo.min_pass_rate … max_pass_rate: the run ends" in (
        " ".join(capsys.readouterr().err.split())
    )


def alike(stream: int) -> float:
    """Both completions of every other prompt score 1."""
    return 1.0 if stream // 2 % 2 else float(stream)


@pytest.mark.parametrize(("kind", "groups", "seen"), [("keep", 4, 8), ("drop", 2, 8), ("resample", 4, 14)])
def test_groups_that_say_nothing(make: Callable[..., Rollouts], kind: str, groups: int, seen: int) -> None:
    """Of four groups two say nothing; of two more one; of one more none: 4 + 2 + 1 prompts are asked."""
    method = Dice(alike)
    source = make(method, zero_variance=kind)
    source.next_step()
    assert len({one.id.partition("@")[0] for one in source.samples}) == groups
    assert method.seen == seen
    assert source.told()["frac_reward_zero_std"] == {"keep": 0.5, "drop": 0.5, "resample": 3 / 7}[kind]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_rewards_that_say_nothing_are_told_now_and_then(
    make: Callable[..., Rollouts], capsys: pytest.CaptureFixture[str]
) -> None:
    """The first time, the second, the fourth: of five rollouts in three lines; without groups as well."""
    source = make(Dice(lambda _: 0.5), completions_per_prompt=1, count=40)
    while source.at.rollout < 5:
        source.next_step()
    told = said(capsys)
    assert told.count("there is nothing to learn which is better") == 3
    assert "rollout 1: all 8 completions score 0.5: there is nothing" in told
    assert "which is better (4 times now, one after the other)" in told


def test_a_source_that_never_applies_is_told(make: Callable[..., Rollouts], capsys: pytest.CaptureFixture[str]) -> None:
    method = Dice()
    given = method.score

    def mute(completions: Completions) -> Scores:
        return replace(given(completions), raw={"unit": [None] * len(completions)})

    method.score = mute  # type: ignore[method-assign]
    make(method).next_step()
    assert "rollout 1: unit: no score for any of 8 completions: does it apply to these prompts?" in said(capsys)


@pytest.mark.parametrize("kind", ["drop", "resample"])
def test_nothing_to_learn_at_all_is_said(make: Callable[..., Rollouts], kind: str) -> None:
    with pytest.raises(InputError, match=r"rewards.sources: all completions of a prompt score alike, 80 of them"):
        make(Dice(lambda _: 1.0), zero_variance=kind, count=100).next_step()


@pytest.mark.parametrize("kind", ["drop", "resample"])
def test_a_run_may_end_with_prompts_that_say_nothing(make: Callable[..., Rollouts], kind: str) -> None:
    """Of three rollouts of four prompts the last has none that says anything, and no prompt is left behind it."""
    source = make(Dice(lambda stream: 1.0 if stream >= 16 else float(stream)), zero_variance=kind)
    steps = 0
    while source.next_step():
        steps += 1
    assert (steps, source.at.prompts) == (8, 12)


def test_a_rollout_lies_there_for_people_and_for_resuming(make: Callable[..., Rollouts], tmp_path: Path) -> None:
    source = make()
    for _ in range(9):
        source.next_step()
    readable = sorted(path.name for path in (tmp_path / "rollouts").glob("*.jsonl"))
    assert readable == ["000001.jsonl", "000002.jsonl", "000003.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "rollouts/000002.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert lines[0].keys() >= {"prompt", "completion", "reward", "rewards", "kl", "stop"}
    assert lines[0]["step"] == 4
    assert [path.name for path in (tmp_path / "rollouts").glob("*.samples")] == ["000003.samples"]


def test_samples_that_a_checkpoint_needs_are_kept(make: Callable[..., Rollouts], tmp_path: Path) -> None:
    source = make(count=40)
    for _ in range(6):
        source.next_step()
    checkpoint(source)
    for _ in range(4):
        source.next_step()

    def there() -> list[str]:
        return sorted(path.name for path in (tmp_path / "rollouts").glob("*.samples"))

    assert there() == ["000002.samples", "000003.samples"]
    while source.at.rollout < 5:
        source.next_step()
    assert there() == ["000002.samples", "000005.samples"], "of those in between none can be asked for again"


def test_a_group_is_cut_where_a_row_is_full() -> None:
    """A prompt of 3 tokens with completions of 2, 3, 4 and 2, at most 9 together: 3 + 2 + 3, 3 + 4 + 2."""
    prompt = SimpleNamespace(where="p", tokens=np.array([1, 5, 6]))
    tokens = [[9] * length for length in (2, 3, 4, 2)]
    completions = Completions([prompt] * 4, [""] * 4, tokens, ["eos"] * 4)  # type: ignore[list-item]
    scored = Scored(completions, Scores(torch.zeros(4), {}, {}), torch.zeros(4, dtype=torch.int64))
    samples, groups = samples_of(scored, 1, 9)
    assert [one.length for one in samples] == [8, 9]
    assert groups == [0, 0]
    parts = with_extras(samples, {"advantages": torch.arange(11.0)})
    assert [list(one.extra["advantages"]) for one in parts] == [list(range(5)), list(range(5, 11))]
