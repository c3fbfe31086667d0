"""Which completions are held against each other, and what is kept of a round."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from litrecipe.config.errors import InputError
from litrecipe.config.rounds import IterativeDpo
from litrecipe.data.preferences import parse_preference
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.rollout.experience import Scored
from litrecipe.rollout.pairs import Pairing, WinRates, gold_answers, pair_samples, pair_up, rows_of
from litrecipe.rollout.rewards import Scores
from litrecipe.rollout.sources import Completions

MakeScored = Callable[..., Scored]


@pytest.fixture
def score(ask: Any, complete: Any) -> MakeScored:
    """Completions of one prompt after the other, as `(text, score)`."""

    def score(*of_prompts: Sequence[tuple[str, float]]) -> Scored:
        prompts = [ask(f"f:{n}", prompt=f"Question {n}?") for n in range(len(of_prompts))]
        every = [prompt for prompt, said in zip(prompts, of_prompts, strict=True) for _ in said]
        texts, totals = zip(*(one for said in of_prompts for one in said), strict=True)
        groups = [n for n, said in enumerate(of_prompts) for _ in said]
        return Scored(
            complete(every, texts), Scores(torch.tensor(totals, dtype=torch.float32), {}, {}), torch.tensor(groups)
        )

    return score


def test_the_best_stands_against_the_worst(score: MakeScored) -> None:
    """Of equals the first; where all texts are one, or all scores, there is no pair."""
    scored = score(
        [("a", 1.0), ("b", 3.0), ("c", 0.5)],
        [("a", 2.0), ("b", 2.0), ("c", 2.0)],
        [("a", 1.0), ("a", 2.0), ("a", 3.0)],
        [("a", 1.0), ("b", 2.0), ("c", 2.0), ("d", 1.0)],
    )
    paired = pair_up(scored, IterativeDpo(), 1000)
    assert paired.pairs == [(1, 2), (10, 9)]
    assert paired.dropped == {"identical": 1, "tied": 1}
    assert str(paired) == "2 pairs from 4 prompts (1 identical, 1 tied)"


def test_a_text_that_was_said_twice_stands_for_its_first(score: MakeScored) -> None:
    """A judge may score it differently the second time."""
    assert pair_up(score([("a", 1.0), ("b", 0.5), ("a", 9.0)]), IterativeDpo(), 1000).pairs == [(0, 1)]


def test_bars_for_the_better_and_for_the_difference(score: MakeScored) -> None:
    """DNO's filters: the better one must reach 5, the worse one be 2 below; 5 against 3 does, just."""
    scored = score([("a", 5.0), ("b", 3.0)], [("a", 4.0), ("b", 0.0)], [("a", 6.0), ("b", 5.0)])
    paired = pair_up(scored, IterativeDpo(min_chosen=5, margin=2), 1000)
    assert paired.pairs == [(0, 1)]
    assert paired.dropped == {"below min_chosen": 1, "within the margin": 1}


def test_the_datas_own_answer_must_be_better_by_more(score: MakeScored) -> None:
    """DNO's rubric: a negative at least 2 below the data's answer, which stands last, or 1 below the model's own."""
    config = IterativeDpo(gold="good", margin=1, gold_margin=2, completions_per_prompt=2)
    scored = score([("a", 5.0), ("b", 4.0), ("gold", 3.9)], [("a", 4.0), ("b", 4.5), ("gold", 6.0)])
    assert pair_up(scored, config, 1000).pairs == [(0, 2), (5, 3)]
    nearer = score([("a", 5.0), ("b", 4.0), ("gold", 5.5)], [("a", 5.5), ("b", 4.5), ("gold", 4.5)])
    paired = pair_up(nearer, config, 1000)
    assert paired.pairs == [(3, 4)] and paired.dropped == {"within the margin": 1}


ECHO = "so it is so it is so it is so it is"


def test_what_repeats_itself_is_rejected_before_all_others(score: MakeScored) -> None:
    """Of ten runs of three words three are new: a share of .7. Whatever its score, and however close."""
    config = IterativeDpo(max_repetition=0.5, margin=1)
    scored = score([(ECHO, 9.0), ("b", 1.0), ("c", 0.5)], [(ECHO, 0.0), (f"{ECHO} it", 1.0)], [("a", 3.0), ("b", 1.0)])
    paired = pair_up(scored, config, 1000)
    assert paired.pairs == [(1, 0), (5, 6)]
    assert paired.dropped == {"all repeating themselves": 1}
    assert pair_up(scored, IterativeDpo(max_repetition=0.8), 1000).pairs[0] == (0, 2)


def test_how_sure_the_scores_are_goes_with_the_pair(score: MakeScored) -> None:
    """Scores 2 and 0.5: the worse is better with σ(-1.5); one that repeats itself never is."""
    config = IterativeDpo(max_repetition=0.5, soft_labels=True)
    scored = score([("a", 2.0), ("b", 0.5)], [(ECHO, 2.0), ("b", 0.5)])
    one, other = pair_samples(scored, pair_up(scored, config, 1000), 1, config)
    assert one.extra["doubt"].tolist() == [pytest.approx(1 / (1 + math.exp(1.5)))]
    assert other.extra["doubt"].tolist() == [0.0]


def test_what_fits_into_no_row_is_dropped(score: MakeScored) -> None:
    """Prompt, better and worse completion count once each."""
    scored = score([("a", 1.0), ("b", 0.0)])
    whole = len(scored.completions.prompts[0].tokens) + sum(map(len, scored.completions.tokens))
    assert pair_up(scored, IterativeDpo(), whole).pairs
    assert pair_up(scored, IterativeDpo(), whole - 1).dropped == {"too long for a row": 1}


def test_a_pair_is_a_prompt_with_two_branches(score: MakeScored) -> None:
    scored = score([("worse", 0.0), ("better", 1.0)])
    [sample] = pair_samples(scored, pair_up(scored, IterativeDpo(), 1000), 3, IterativeDpo())
    root, better, worse = sample.segments
    assert sample.id == "f:0@3:1"
    assert root.tokens.tolist() == scored.completions.prompts[0].tokens.tolist() and not root.weights.any()
    assert better.tokens.tolist() == scored.completions.tokens[1] and better.weights.all() and better.parent == 0
    assert worse.tokens.tolist() == scored.completions.tokens[0] and worse.weights.all() and worse.parent == 0


def test_pairs_are_rows_that_dpo_reads(score: MakeScored) -> None:
    scored = score([("worse", 0.0), ("better", 1.0)])
    [row] = rows_of(scored, pair_up(scored, IterativeDpo(), 1000))
    preference = parse_preference(json.loads(json.dumps(row)), "f:1")
    assert preference.prompt == [{"role": "user", "content": "Question 0?"}]
    assert [answer["content"] for answer in preference.answers] == ["better", "worse"]


def test_all_are_held_against_all_both_ways_round(ask: Any, complete: Any) -> None:
    """A judge that likes the longer one, and the first place by 0.1: that cancels.

    Of a, bb, ccc the win rates are 0, ½ and 1, of two of one length ½ each; the second group has another prompt.
    """
    asked: list[tuple[str, str]] = []

    def judge(a: Completions, b: Completions) -> list[float]:
        asked.extend(zip(a.texts, b.texts, strict=True))
        assert all(one is other for one, other in zip(a.prompts, b.prompts, strict=True))
        sure = [
            (len(one) > len(other)) + 0.5 * (len(one) == len(other))
            for one, other in zip(a.texts, b.texts, strict=True)
        ]
        return [0.1 + 0.8 * chance + 0.1 for chance in sure]

    prompts = [ask("f:1", prompt="1"), ask("f:2", prompt="2")]
    completions = complete([prompts[0]] * 3 + [prompts[1]] * 3, ["a", "bb", "ccc", "dd", "ee", "f"])
    rates = WinRates("judge", judge, 3)(completions)
    assert len(asked) == 12 and ("a", "bb") in asked and ("bb", "a") in asked and ("a", "dd") not in asked
    # For a sure loss a gets (0.2 + (1 - 1.0)) / 2 = 0.1, for a sure win 0.9, for a tie 0.5.
    assert rates == pytest.approx([0.1, 0.5, 0.9, 0.7, 0.7, 0.1])
    assert sum(map(float, rates[:3])) == pytest.approx(1.5)  # type: ignore[arg-type]


def test_the_own_answer_of_a_row_ends_as_if_it_were_sampled(
    ask: Any, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to the end token, without the line end that ChatML prints behind it. Too long, or missing: left out."""
    prompts = [
        ask("f:1", prompt="What?", good="the answer"),
        ask("f:2", prompt="What?", good="the answer " * 30),
        ask("f:3", prompt="What?", good=None),
    ]
    found = gold_answers(prompts, "good", tokenizer, 20)
    assert found == {"f:1": [*tokenizer.encode("the answer"), tokenizer.eos_ids[0]]}
    assert "2 of 3 prompts have no answer of up to 20 tokens: left out" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"iterative_dpo\.gold: god: no row has a text there.*good"):
        gold_answers(prompts, "god", tokenizer, 20)
    with pytest.raises(InputError, match="no answer there fits max_new_tokens 2"):
        gold_answers(prompts, "good", tokenizer, 2)


def test_older_rounds_are_learnt_again_less_and_less(score: MakeScored, tmp_path: Path) -> None:
    """Of 8 pairs a round: half of the last round's, a quarter of those of the one before, an eighth of the first's."""
    from litrecipe.data.samples import SampleSet

    scored = score(*([("better", 1.0), ("worse", 0.0)] for _ in range(8)))
    rounds = IterativeDpo(prompts_per_round=8, history=0.5)
    for number in (1, 2, 3):
        samples = pair_samples(scored, pair_up(scored, rounds, 1000), number, rounds)
        SampleSet.write(tmp_path / f"{number:06d}.samples", samples)
    pairing = Pairing.__new__(Pairing)
    pairing.rounds, pairing.folder, pairing.seed = rounds, tmp_path, 0
    found = [one.id for one in pairing._earlier(4)]
    assert [sum(f"@{number}:" in name for name in found) for number in (3, 2, 1)] == [4, 2, 1]
    assert len(set(found)) == 7
    assert [one.id for one in pairing._earlier(4)] == found
    assert pairing._earlier(1) == []


def test_gold_stands_behind_what_was_sampled(ask: Any) -> None:
    """Two prompts with two completions and their own answer: the third stream of each prompt is not drawn from."""
    drawn: list[int] = []

    def sampler(asked: Any, settings: Any, n: int, streams: Sequence[int], _: str) -> Completions:
        drawn.extend(streams)
        every = [prompt for prompt in asked for _ in range(n)]
        return Completions(every, [str(one) for one in streams], [[one] for one in streams], ["length"] * len(streams))

    pairing = Pairing.__new__(Pairing)
    pairing.rounds = IterativeDpo(completions_per_prompt=2, gold="good")
    pairing.config, pairing.seed, pairing.sampler = pairing.rounds.as_rollouts(), 0, sampler
    pairing.golds = {"f:1": [7, 2], "f:2": [8, 2]}
    pairing.module = torch.nn.Module()  # type: ignore[assignment]
    pairing.module.policy = None  # type: ignore[assignment]
    pairing.fabric = SimpleNamespace(autocast=lambda: torch.no_grad())  # type: ignore[assignment]
    found = pairing.sample([ask("f:1", prompt="1", good="x"), ask("f:2", prompt="2", good="y")], range(6))
    assert drawn == [0, 1, 3, 4]
    assert found.texts == ["0", "1", "x", "3", "4", "y"]
    assert found.tokens == [[0], [1], [7, 2], [3], [4], [8, 2]]
    assert found.ended == ["length", "length", "eos"] * 2
    assert [one.where for one in found.prompts] == ["f:1"] * 3 + ["f:2"] * 3
