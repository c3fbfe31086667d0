"""Pairs, clustered errors and calibration, against sums done by hand and a bootstrap over prompts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from litrecipe.evaluation.comparing import Pair, calibration, calibration_error, compare, mean_by_prompt, summary
from litrecipe.evaluation.pictures import draw_comparison
from litrecipe.model.row import Row, Sample, Segment


def pair(margin: float, prompt: str = "p", lengths: tuple[int, int] = (2, 1), weight: float = 1.0) -> Pair:
    return Pair("f:1", prompt, margin, 0.0, *lengths, weight)


def test_the_error_of_a_mean_takes_a_prompt_for_one_observation() -> None:
    """Two prompts of two pairs: mean 1/2, residuals ±1/2 summed by prompt 1 and -1: √(2 / 1 · (1 + 1)) / 4 = 1/2.

    Four prompts: √(4 / 3 · 4 · 1/4) / 4 = 0.2887.
    """
    values, weights = [1.0, 1.0, 0.0, 0.0], [1.0] * 4
    assert mean_by_prompt(values, weights, ["a", "a", "b", "b"]) == pytest.approx((0.5, 0.5))
    assert mean_by_prompt(values, weights, list("abcd")) == pytest.approx((0.5, math.sqrt(4 / 3) / 4))
    assert mean_by_prompt(values, weights, ["a"] * 4) == (0.5, None)
    assert mean_by_prompt([1.0, 0.0], [3.0, 1.0], ["a", "b"])[0] == 0.75
    assert math.isnan(mean_by_prompt([], [], [])[0])


def test_the_error_is_that_of_drawing_prompts_again() -> None:
    rng = np.random.default_rng(0)
    prompts = [f"p{n // 4}" for n in range(400)]
    values = np.repeat(rng.random(100) > 0.4, 4).astype(float) * (rng.random(400) > 0.1)
    groups = values.reshape(100, 4)
    again = [groups[rng.integers(0, 100, 100)].mean() for _ in range(4000)]
    assert mean_by_prompt(list(values), [1.0] * 400, prompts)[1] == pytest.approx(np.std(again), rel=0.05)


def test_what_is_summed_up() -> None:
    pairs = [pair(2.0, "a"), pair(-1.0, "b", (1, 2)), pair(0.0, "c", (3, 3)), pair(1.0, "d", (1, 4))]
    found = {name: value for name, (value, _) in summary(pairs).items()}
    assert found["accuracy"] == 2.5 / 4
    assert found["length_accuracy"] == 1.5 / 4
    assert found["shorter_accuracy"] == 1 / 2
    assert found["margin"] == 0.5
    assert found["log_loss"] == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in (2, -1, 0, 1)]))


def test_calibration_of_one_who_is_as_sure_as_right() -> None:
    """σ(log 3) = 3/4: right in three of four is calibrated, right in all is off by a quarter."""
    margin = math.log(3)
    assert calibration_error([pair(margin)] * 3 + [pair(-margin)]) == pytest.approx(0)
    assert calibration_error([pair(margin)] * 4) == pytest.approx(0.25)
    [one] = calibration([pair(1000.0), pair(800.0)])
    assert (one.sure, one.right, one.weight) == (1, 1, 2)


def tree(name: str, *answers: list[int], scores: list[float] | None = None) -> Sample:
    root = Segment(np.array([3, 4]), np.zeros(2, dtype=np.float32))
    branches = [Segment(np.array(ids), np.ones(len(ids), dtype=np.float32), parent=0) for ids in answers]
    extra = np.array(scores or [np.nan] * len(answers), dtype=np.float32)
    return Sample(name, (root, *branches), {"scores": extra})


def test_all_pairs_of_a_list_share_its_weight_and_equals_are_none() -> None:
    def reward(row: Row) -> torch.Tensor:
        return torch.tensor([float(row.tokens[row.spans[span].stop - 1]) for span in row.answers.tolist()])

    samples = [
        tree("list", [9], [5, 7], [1, 1, 8], scores=[3, 2, 2]),
        tree("pair", [4, 6], [9]),
    ]
    found = compare(reward, samples, budget=8, device="cpu")
    assert [(p.where, p.chosen, p.rejected, p.weight) for p in found] == [
        ("list", 9, 7, 0.5),
        ("list", 9, 8, 0.5),
        ("pair", 6, 9, 1),
    ]
    assert [(p.chosen_tokens, p.rejected_tokens) for p in found] == [(1, 2), (1, 3), (2, 1)]
    assert found[0].prompt == found[2].prompt  # the same tokens: one observation
    assert compare(reward, samples, budget=100, device="cpu") == found
    shares = [compare(reward, samples, budget=8, device="cpu", rank=rank, world=2) for rank in (0, 1)]
    assert sorted(map(repr, shares[0] + shares[1])) == sorted(map(repr, found))


def test_pictures_of_few_and_of_equal_margins_are_drawn(tmp_path: Path) -> None:
    sets = {"one": [pair(1.0)], "equal": [pair(0.0)] * 5, "many": [pair(m / 7) for m in range(-9, 30)]}
    for name, pairs in sets.items():
        draw_comparison(pairs, tmp_path / f"{name}.png", name)
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
