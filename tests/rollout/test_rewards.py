"""Scores add up as a recipe says: weights, normalising, running scale, clipping, penalties; and judges."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Fabric
from litrecipe.config.online import Online, Rewards
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.rollout.rewards import FunctionJudge, Moments, ScoreJudge, Scorer, make_judge
from litrecipe.rollout.sources import Completions, Weighted

Values = Sequence[float | None]


@dataclass
class Said:
    """A source that says what it is told to, the next list at each call."""

    name: str
    scores: list[Values]

    def __call__(self, completions: Completions) -> list[float | None]:
        return list(self.scores.pop(0))


def completions(count: int, ended: str = "e", tokens: int | Sequence[int] = 1) -> Completions:
    """`ended` has a letter a completion: e, s, l."""
    words = {"e": "eos", "s": "stop", "l": "length"}
    lengths = [tokens] * count if isinstance(tokens, int) else tokens
    ends = [words[ended[n % len(ended)]] for n in range(count)]
    return Completions([None] * count, [""] * count, [[0] * n for n in lengths], ends)  # type: ignore[list-item]


def scorer(*sources: tuple[float, Values], online: Online | None = None, gather: Any = None, **config: Any) -> Scorer:
    weighted = [Weighted(Said(f"s{place}", [values]), weight) for place, (weight, values) in enumerate(sources)]
    found = Scorer(weighted, Rewards(**config), online or Online())
    if gather is not None:
        found.gather = gather
    return found


def test_sources_are_weighed_and_added() -> None:
    """2·(1, 0, none) - 0.5·(none, 4, none); where nothing applies, 0."""
    found = scorer((2.0, [1, 0, None]), (-0.5, [None, 4, None]))(completions(3))
    assert found.total.tolist() == [2.0, -2.0, 0.0] and found.total.dtype == torch.float32
    assert found.by_source == {"s0": [2.0, 0.0, None], "s1": [None, -2.0, None]}
    assert found.raw == {"s0": [1, 0, None], "s1": [None, 4, None]}


def test_normalised_sources() -> None:
    """(1, 3, none) has mean 2 and spread 1; (5, 5, 5) has none and adds 0: 2·(-1, 1) and 0."""
    found = scorer((2.0, [1, 3, None]), (9.0, [5, 5, 5]), combine="normalise")(completions(3))
    assert found.total.tolist() == [-2.0, 2.0, 0.0]
    assert found.by_source["s1"] == [0.0, 0.0, 0.0] and found.by_source["s0"] == [-2.0, 2.0, None]


@given(
    values=st.lists(st.floats(-50, 50), min_size=2, max_size=8),
    scale=st.floats(0.1, 10),
    shift=st.floats(-20, 20),
)
def test_normalising_takes_away_units(values: list[float], scale: float, shift: float) -> None:
    moved = [scale * value + shift for value in values]
    if np.std(values) < 1e-2:
        return
    one, other = (
        scorer((1.0, given), combine="normalise")(completions(len(values))).total for given in (values, moved)
    )
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert one.mean().item() == pytest.approx(0, abs=1e-5)
    assert one.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_running_scale_divides_by_the_spread_so_far_and_keeps_the_mean() -> None:
    """First (0, 2): spread 1. Then of (0, 2, 4, 6): √5. A single score has no spread and stays."""
    source = Said("s", [[0, 2], [4, 6]])
    running = Scorer([Weighted(source, 1.0)], Rewards(scale="running"), Online())
    assert running(completions(2)).total.tolist() == [0.0, 2.0]
    assert running(completions(2)).total.tolist() == pytest.approx([4 / math.sqrt(5), 6 / math.sqrt(5)])
    assert scorer((1.0, [7.0]), scale="running")(completions(1)).total.tolist() == [7.0]


def test_policies_of_all_times_are_compared_by_plain_sums() -> None:
    """Normalised and scaled, scores of 1 and 3 are -1 and 1 in every rollout; held-out answers are told 2 and 6, less
    what a cut costs, and scaling has not seen them."""
    found = scorer((2.0, [1, 3]), combine="normalise", scale="running", online=Online(missing_eos=0.5))
    plain = found.plain()
    assert plain(completions(2, "el")).total.tolist() == [2.0, 5.5]
    assert found.moments.count == 0 and found.config.combine == "normalise"


def test_running_scale_goes_on_where_it_stood() -> None:
    rollouts: list[Values] = [[0.1, 2.7], [4.3, -6.0], [1.1, 1.2]]
    whole = Scorer([Weighted(Said("s", rollouts.copy()), 1.0)], Rewards(scale="running"), Online())
    totals = [whole(completions(2)).total for _ in rollouts]
    first = Scorer([Weighted(Said("s", rollouts[:2]), 1.0)], Rewards(scale="running"), Online())
    for _ in range(2):
        first(completions(2))
    again = Scorer([Weighted(Said("s", rollouts[2:]), 1.0)], Rewards(scale="running"), Online())
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert torch.equal(again(completions(2)).total, totals[2])
    assert again.state_dict() == whole.state_dict()


@given(st.lists(st.lists(st.floats(-100, 100), max_size=5), max_size=5))
def test_moments_are_those_of_all_numbers_at_once(parts: list[list[float]]) -> None:
    found = Moments()
    for part in parts:
        found.add(part)
    together = [value for part in parts for value in part]
    assert found.count == len(together)
    if together:
        assert found.mean == pytest.approx(np.mean(together), abs=1e-9)
        assert found.std == pytest.approx(np.std(together), abs=1e-6)


@pytest.mark.parametrize("config", [{"combine": "normalise"}, {"scale": "running"}, {"clip": 1.0}])
def test_ranks_together_score_as_one_would(config: dict[str, Any]) -> None:
    """Two ranks with 1 and 3 completions; what each gathers is what both have."""
    values = [3.0, None, 1.0, 10.0]
    whole = scorer((2.0, values), (1.0, [1.0, 2.0, 3.0, 4.0]), **config)(completions(4)).total
    shares = [(slice(0, 1), values[:1], [1.0]), (slice(1, 4), values[1:], [2.0, 3.0, 4.0])]
    sums = [7.0, 2.0, 5.0, 24.0]
    known = {0: [values, [1.0, 2.0, 3.0, 4.0]], 1: [sums]}

    for part, mine, others in shares:
        calls = iter(known[config.get("scale") == "running"])

        def gather(value: Any, calls: Any = calls, part: slice = part) -> list[Any]:
            everything = next(calls)
            assert list(value) == everything[part]
            return [everything[:1], everything[1:]]

        found = scorer((2.0, mine), (1.0, others), gather=gather, **config)(completions(len(mine)))
        assert torch.equal(found.total, whole[part])


def test_clipping_comes_after_scaling_and_before_penalties() -> None:
    """(0, 40) scaled by its spread 20 is (0, 2), clipped to (0, 1.5), and cut completions lose 1."""
    online = Online(missing_eos=1.0)
    found = scorer((1.0, [0, 40]), online=online, scale="running", clip=1.5)(completions(2, "l"))
    assert found.total.tolist() == [-1.0, 0.5]
    assert scorer((1.0, [-9, 9]), clip=2.0)(completions(2)).total.tolist() == [-2.0, 2.0]


def test_a_missing_end_costs_or_sets_the_score() -> None:
    """Only what was cut at max_new_tokens: a stop string is an end."""
    for mode, expected in (("subtract", [3.0, 3.0, 2.0]), ("set", [3.0, 3.0, -1.0])):
        online = Online(missing_eos=1.0, missing_eos_mode=mode)  # type: ignore[arg-type]
        found = scorer((1.0, [3, 3, 3]), online=online)(completions(3, "esl"))
        assert found.total.tolist() == expected
        assert found.by_source["missing_eos"] == [0.0, 0.0, expected[2] - 3]
    untouched = scorer((1.0, [3]))(completions(1, "l"))
    assert untouched.total.tolist() == [3.0] and set(untouched.by_source) == {"s0"}


def test_the_last_tokens_cost_more_and_more() -> None:
    """DAPO's (13) with 10 tokens, the last 4 of them soft: none up to 6, then 1/4 a token. What is set stays set."""
    online = Online(soft_limit=4, max_new_tokens=10)
    found = scorer((1.0, [1] * 5), online=online)(completions(5, tokens=[1, 6, 7, 8, 10]))
    assert found.total.tolist() == [1.0, 1.0, 0.75, 0.5, 0.0]
    assert found.by_source["soft_limit"] == [0.0, 0.0, -0.25, -0.5, -1.0]
    online = Online(soft_limit=4, max_new_tokens=10, missing_eos=1.0, missing_eos_mode="set")
    found = scorer((1.0, [1, 1]), online=online)(completions(2, "el", tokens=10))
    assert found.total.tolist() == [0.0, -1.0]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.sampled_from(["subtract", "set"]), st.booleans())
def test_parts_add_up_to_the_total(values: list[float], mode: Any, cut: bool) -> None:
    """Where nothing is scaled or clipped."""
    online = Online(soft_limit=2, max_new_tokens=6, missing_eos=0.5, missing_eos_mode=mode)
    found = scorer((0.5, values), (2.0, values[::-1]), online=online)(
        completions(len(values), "l" if cut else "e", tokens=5)
    )
    for place, total in enumerate(found.total.tolist()):
        assert total == pytest.approx(sum(parts[place] or 0.0 for parts in found.by_source.values()), abs=1e-5)


def test_a_source_of_the_wrong_length() -> None:
    with pytest.raises(InputError, match=r"rewards.sources: s0: 2 scores of 3 completions"):
        scorer((1.0, [1, 2]))(completions(3))


def test_no_completions_are_no_trouble() -> None:
    """Of several ranks one may have none."""
    assert scorer((1.0, []), combine="normalise", scale="running")(completions(0)).total.shape == (0,)


def test_a_source_as_a_judge() -> None:
    """σ(1 - 1) = 1/2, σ(log 3) = 3/4, σ(-1000) = 0; where one says nothing, 1/2."""
    judge = ScoreJudge(Said("s", [[1, math.log(3), -1000, None, 1], [1, 0, 0, 1, None]]))
    found = judge(completions(5), completions(5))
    assert found == pytest.approx([0.5, 0.75, 0.0, 0.5, 0.5], abs=1e-12)


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_a_judge_does_not_mind_the_order(a: float, b: float) -> None:
    [one] = ScoreJudge(Said("s", [[a], [b]]))(completions(1), completions(1))
    [other] = ScoreJudge(Said("s", [[b], [a]]))(completions(1), completions(1))
    assert one + other == pytest.approx(1) and (one >= 0.5) == (a >= b or one == 0.5)


def test_functions_as_judges(ask: Any, complete: Any) -> None:
    prompts = [ask(prompt="a", best="x"), ask(prompt="b", where="g:2", best="y")]
    a, b = complete(prompts, ["x", "x"]), complete(prompts, ["y", "y"])
    judge = FunctionJudge(
        "function:m:f", lambda prompts, a, b, rows: [float(r["best"] == one) for r, one in zip(rows, a, strict=True)]
    )
    assert judge(a, b) == [1.0, 0.0]
    for given_back, mistake in (
        ([0.5, 1.5], r"^function:m:f: g:2: 1.5: give the probability"),
        ([0.5, None], r"^function:m:f: g:2: None: not a finite number"),
        ([0.5], r"^function:m:f: returned 1 value for 2"),
    ):
        with pytest.raises(InputError, match=mistake):
            FunctionJudge("function:m:f", lambda given_back=given_back, **_: given_back)(a, b)


def test_judges_of_specs(tokenizer: Tokenizer, ask: Any, complete: Any) -> None:
    prompt = ask(prompt="a", answer="7")
    judge = make_judge("exact", tokenizer, Fabric(accelerator="cpu"), "cpu")
    assert judge(complete([prompt], ["7"]), complete([prompt], ["8"])) == pytest.approx([1 / (1 + math.exp(-1))])
    assert isinstance(make_judge("function:math:sqrt", tokenizer, Fabric(), "cpu"), FunctionJudge)
