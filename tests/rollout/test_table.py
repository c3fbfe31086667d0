"""What people see of a rollout."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from litrecipe.rollout.rewards import Scores
from litrecipe.rollout.table import SHOWN, places_shown, sample_table, shown, write_rollout


@pytest.fixture
def rollout(ask: Any, complete: Any):
    """Three completions of two prompts, scored by two sources."""
    one, other = ask(prompt="What is 7?"), ask(where="g:2", text="It was 你好")
    completions = complete(
        [one, one, other], ["Seven.\nYes!", "Eight.", "[bold]good[/] \x1b[31mred 🤗"], ["eos", "eos", "length"]
    )
    by_source = {"exact": [1.0, 0.0, None], "brief": [0.5, 0.25, -2.0]}
    return completions, Scores(torch.tensor([1.5, 0.25, -2.0]), by_source, by_source)


def printed(table: Any, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


def test_json_lines_tell_everything(rollout: Any, tmp_path: Path) -> None:
    path = tmp_path / "new" / "rollouts.jsonl"
    completions, scores = rollout
    write_rollout(path, 3, completions, scores, torch.tensor([0.5, 1.0, 2.0]))
    write_rollout(path, 4, completions, scores)
    text = path.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 6 and "你好" in text and "🤗" in text
    assert lines[0] == {
        "step": 3,
        "prompt_id": "f:1",
        "prompt": [{"role": "user", "content": "What is 7?"}],
        "completion": "Seven.\nYes!",
        "tokens": len(completions.tokens[0]),
        "reward": 1.5,
        "rewards": {"exact": 1.0, "brief": 0.5},
        "kl": 0.5,
        "stop": "eos",
    }
    assert lines[2]["prompt"] == "It was 你好" and lines[2]["rewards"]["exact"] is None
    assert lines[5]["stop"] == "length" and lines[5]["kl"] is None and lines[5]["step"] == 4


def test_the_table_shows_best_median_and_worst(rollout: Any) -> None:
    completions, scores = rollout
    said = printed(sample_table(completions, scores, torch.tensor([0.5, 1.0, 2.0]), title="rollout [1]"), 120)
    places = [
        said.index(word)
        for word in ("rollout [1]", "best", "Seven. ⏎ Yes!", "median", "Eight.", "worst", "[bold]good[/]")
    ]
    assert places == sorted(places)
    for told in ("1.5", "exact 1", "exact -", "brief -2", "KL 0.5", "eos", "length", "What is 7?", "It was 你好"):
        assert told in said


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_the_table_keeps_to_the_width(rollout: Any, width: int) -> None:
    """Also with wide characters; and an escape of a completion does nothing."""
    completions, scores = rollout
    said = printed(sample_table(completions, scores), width)
    assert all(cell_len(line) <= width for line in said.splitlines())
    assert "\x1b" not in said


def test_few_completions() -> None:
    assert places_shown([]) == {}
    assert places_shown([1.0]) == {"best": 0}
    assert places_shown([1.0, 2.0]) == {"best": 1, "worst": 0}
    assert places_shown([1.0, 3.0, 2.0]) == {"best": 1, "median": 2, "worst": 0}
    assert places_shown([4.0, 1.0, 3.0, 2.0]) == {"best": 0, "median": 3, "worst": 1}
    assert len(places_shown([5.0] * 3)) == 3


@given(st.text(), st.integers(0, 5))
def test_any_text_can_be_shown(text: str, times: int) -> None:
    found = shown(text * 10**times if times < 4 else text).plain
    assert len(found) <= SHOWN + 3 and (found.isprintable() or not found)
