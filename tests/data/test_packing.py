from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import open_model
from litrecipe.data.packing import _spread, pack
from litrecipe.model.row import Sample, Segment, make_row


@given(
    lengths=st.lists(st.integers(1, 60), max_size=40),
    budget=st.integers(1, 50),
    multiple_of=st.integers(1, 5),
)
def test_every_sample_stands_in_one_row_that_keeps_the_budget(
    lengths: list[int], budget: int, multiple_of: int
) -> None:
    packing = pack(lengths, budget, multiple_of)
    assert sorted(packing.oversized + [index for row in packing.rows for index in row]) == list(range(len(lengths)))
    assert packing.oversized == [index for index, length in enumerate(lengths) if length > budget]
    assert all(sum(lengths[index] for index in row) <= budget for row in packing.rows)
    assert len(packing.rows) % multiple_of == 0
    assert packing == pack(lengths, budget, multiple_of)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), multiple_of=st.integers(1, 5))
def test_fuller_rows_come_first_and_empty_ones_last(lengths: list[int], multiple_of: int) -> None:
    fill = [sum(lengths[index] for index in row) for row in pack(lengths, 50, multiple_of).rows]
    assert fill == sorted(fill, reverse=True)


def test_best_fit_leaves_no_room_that_a_sample_could_have_taken() -> None:
    packing = pack([6, 5, 4, 3, 2], budget=10)
    assert packing.rows == [[0, 2], [1, 3, 4]]


def test_rows_are_shared_out_evenly_among_ranks() -> None:
    assert pack([4, 4, 1, 1], budget=100, multiple_of=2).rows == [[0, 2], [1, 3]]
    assert pack([7], budget=10, multiple_of=3).rows == [[0], [], []]
    assert pack([], budget=10, multiple_of=2).rows == []


def test_even_sharing_never_breaks_the_budget() -> None:
    """Longest-first into the emptiest of 13 rows needs more than 100 tokens in one of them; best fit does not."""
    lengths = [82, 78, 68, 65, 59, 58, 53, 52, 48, 47, 42, 42, 41, 41, 40, 38, 38, 35, 33, 33, 32, 29, 26, 25, 22, 22]
    lengths += [18, 17, 16]
    assert len(pack(lengths, budget=100).rows) == 12
    spread = _spread(list(range(len(lengths))), lengths, 13)
    assert max(sum(lengths[index] for index in row) for row in spread) > 100
    rows = pack(lengths, budget=100, multiple_of=13).rows
    assert len(rows) == 13 and sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert max(sum(lengths[index] for index in row) for row in rows) <= 100


def test_the_loss_of_packed_samples_is_the_loss_of_each_alone(varied_model: Path) -> None:
    """With large weights, far from the uniform distribution, so that neighbours would be noticed."""
    model, rng = load_model(open_model(str(varied_model))), np.random.default_rng(0)
    samples = []
    for number, length in enumerate([17, 3, 9, 30, 2, 12, 5]):
        weights = (rng.random(length) < 0.6).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        tokens = rng.integers(0, 320, length).astype(np.int32)
        samples.append(Sample(str(number), (Segment(tokens, weights),)))
    alone = {sample.id: model(make_row([sample])).logps for sample in samples}
    for budget in (30, 40, 200):
        packing = pack([sample.length for sample in samples], budget)
        rows = [[samples[index] for index in row] for row in packing.rows]
        packed = torch.cat([model(make_row(row)).logps for row in rows])
        expected = torch.cat([alone[sample.id] for row in rows for sample in row])
        torch.testing.assert_close(packed, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(packed.mean(), torch.cat(list(alone.values())).mean(), rtol=0, atol=1e-5)
    assert max(len(row) for row in rows) == 7, "the last budget holds all of them"
