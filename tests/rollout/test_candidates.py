"""Best of N: what is chosen, what it gains, and what is left of a file that broke off."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from litrecipe.config.errors import InputError
from litrecipe.config.rounds import RejectionSampling
from litrecipe.rollout.candidates import CandidateFile, choose, conversation, gains
from litrecipe.rollout.experience import Scored
from litrecipe.rollout.rewards import Scores


def candidate(number: int, text: str, reward: float, stop: str = "eos") -> dict[str, Any]:
    return {"candidate": number, "completion": text, "reward": reward, "stop": stop}


SAID = [
    candidate(0, "cut", 9.0, "length"),
    candidate(1, "good", 2.0),
    candidate(2, "good", 2.0),
    candidate(3, "  ", 3.0),
    candidate(4, "better", 2.5),
    candidate(5, "bad", -1.0),
]


@pytest.mark.parametrize(
    ("config", "texts", "left_out"),
    [
        ({}, ["better"], {"cut at max_new_tokens": 1, "empty": 1}),
        ({"keep": 2}, ["better", "good"], {"cut at max_new_tokens": 1, "empty": 1}),
        ({"truncated": "learn"}, ["cut"], {}),
        (
            {"keep": 6, "min_score": 0},
            ["better", "good"],
            {"below min_score": 1, "cut at max_new_tokens": 1, "empty": 1, "said before": 1},
        ),
        ({"min_score": 10}, [], {"below min_score": 6}),
    ],
)
def test_the_best_that_is_fit(ask: Any, config: dict[str, Any], texts: list[str], left_out: dict[str, int]) -> None:
    choice = choose([ask(prompt="?")], [SAID], RejectionSampling(**config), template=True)
    assert [row["messages"][-1]["content"] for row in choice.rows] == texts
    assert choice.left_out == left_out
    assert choice.prompts == bool(texts)


def test_of_equals_the_first_is_learnt(ask: Any) -> None:
    said = [candidate(0, "a", 1.0), candidate(1, "b", 2.0), candidate(2, "c", 2.0)]
    [row] = choose([ask(prompt="?")], [said], RejectionSampling(), template=True).rows
    assert row == {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "b"}],
        "reward": 2.0,
    }


def test_a_question_needs_no_template(ask: Any) -> None:
    assert conversation(ask(prompt="?"), "!", template=False) == {"prompt": "?", "completion": "!"}
    longer = ask(messages=[{"role": "system", "content": "s"}, {"role": "user", "content": "?"}])
    assert len(conversation(longer, "!", template=False)["messages"]) == 3


def test_what_choosing_gains() -> None:
    """Of 1, 2, 3 two drawn give 2, 3, 3, so 8/3 on average; of 0, 0, 6 they give 0, 6, 6, so 4; all give 3 and 6.

    Standard errors of two prompts: half the distance of their values. log 2 - 1/2 and log 3 - 2/3 nats.
    """
    curve = gains(torch.tensor([[2.0, 1, 3], [0, 6, 0]]))
    assert [one["n"] for one in curve] == [1, 2, 3]
    assert [one["reward"] for one in curve] == pytest.approx([2, 10 / 3, 4.5])
    assert [one["stderr"] for one in curve] == pytest.approx([0, 2 / 3, 1.5])
    assert [one["kl_bound"] for one in curve] == pytest.approx([0, math.log(2) - 0.5, math.log(3) - 2 / 3])
    assert [one["n"] for one in gains(torch.zeros(1, 8))] == [1, 2, 4, 8]


def test_a_batch_that_broke_off_is_answered_again(ask: Any, complete: Any, tmp_path: Path) -> None:
    """Five prompts in batches of two, two completions each: batches of 4, 4 and 2 lines.

    A line end within a completion, and what some take for one, are none.
    """
    file = CandidateFile(
        tmp_path / "candidates.jsonl", 5, RejectionSampling(completions_per_prompt=2, prompts_per_batch=2)
    )
    assert file.done() == 0
    for count in (4, 4, 2):
        every = [ask(f"f:{n // 2}", prompt="?") for n in range(count)]
        completions = complete(every, ["a\u2028b\nc"] * count)
        file.add(Scored(completions, Scores(torch.arange(count) / 3, {}, {}), torch.arange(count) // 2))
    whole = file.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert file.done() == 5 and file.path.read_bytes() == whole
    assert [len(one) for one in file.read()] == [2] * 5
    assert [one["candidate"] for one in file.read()[1]] == [0, 1]
    assert file.read()[0][1]["reward"] == float(torch.tensor(1 / 3))
    for kept, done, left in ((9, 4, 8), (8, 4, 8), (7, 2, 4), (3, 0, 0)):
        file.path.write_bytes(b"".join(lines[:kept]))
        assert file.done() == done
        assert file.path.read_bytes() == b"".join(lines[:left])
    file.path.write_bytes(whole[:-1])
    assert file.done() == 4 and file.path.read_bytes() == b"".join(lines[:8])
    file.path.write_bytes(b"{\n" + b"".join(lines[1:]))
    with pytest.raises(InputError, match=r"candidates\.jsonl: .*: damaged: remove it"):
        file.read()
