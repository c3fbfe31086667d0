"""Which answers are held against each other, and what they got."""

from __future__ import annotations

import pytest
import torch
from made import ranked

from litrecipe.model.row import make_row
from litrecipe.objectives.answers import pairs_of, places_of, siblings_of, sum_by_pair, sum_by_segment, without_targets

NAN = float("nan")


def test_all_pairs_of_a_list_and_how_many_they_are():
    """Spans: prompt 0 and answers 1, 2, 3; prompt 4 and answers 5, 6. Three pairs of the first share its weight."""
    row = make_row([ranked("a", [[2], [3], [4]]), ranked("b", [[5], [6]])])
    pairs = pairs_of(row)
    assert pairs.tolist() == [[1, 2], [1, 3], [2, 3], [5, 6]]
    assert siblings_of(row, pairs).tolist() == [3, 3, 3, 1]
    assert places_of(row, pairs).tolist() == [[0, 1], [0, 2], [1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([3, 2, 1], [[1, 2], [1, 3], [2, 3]]),
        ([2, 2, 1], [[1, 3], [2, 3]]),
        ([2, 1, 1], [[1, 2], [1, 3]]),
        ([NAN, NAN, NAN], [[1, 2], [1, 3], [2, 3]]),
        ([2, NAN, 2], [[1, 2], [2, 3]]),
    ],
)
def test_answers_with_the_same_score_are_no_pair(scores, expected):
    """And the scores of the next sample are its own."""
    row = make_row([ranked("a", [[2], [3], [4]], scores=scores), ranked("b", [[2], [3]], scores=[1, 0])])
    assert pairs_of(row).tolist() == [*expected, [5, 6]]


def test_a_sample_without_a_pair_is_named():
    with pytest.raises(ValueError, match="sample f:1: all its answers have the same score"):
        pairs_of(make_row([ranked("f:1", [[2], [3]], scores=[1, 1])]))
    with pytest.raises(ValueError, match="sample f:3: 1 answers, a pair has two"):
        pairs_of(make_row([ranked("f:3", [[2]])]))


def test_beyond_the_shorter_answer_of_each_pair():
    """Answers (1, 2, 4), (8), (16, 32) with α = ½: against the second, 1 + (2 + 4)/2 = 4 and 16 + 32/2 = 32; the first
    against the third 1 + 2 + 4/2 = 5 and 48."""
    row = make_row([ranked("a", [[2, 2, 2], [2], [2, 2]]), ranked("b", [[2, 2], [2]])])
    pairs = pairs_of(row)
    values = torch.tensor([1.0, 2, 4, 8, 16, 32, 64, 128, 256], requires_grad=True)
    assert sum_by_pair(values, row, pairs, 0.5).tolist() == [[4, 8], [5, 48], [8, 32], [128, 256]]
    assert sum_by_pair(values, row, pairs).tolist() == [[7, 8], [7, 48], [8, 48], [192, 256]]
    sum_by_pair(values, row, pairs, 0.5).sum().backward()
    assert values.grad.tolist() == [2, 1.5, 1, 2, 2, 1.5, 1, 0.5, 1]


def test_pairs_of_two_answers_are_summed_alike_either_way():
    row = make_row([ranked(str(n), [[2] * (n + 1), [3] * (5 - n)]) for n in range(4)])
    values = torch.randn(len(row.target), generator=torch.Generator().manual_seed(0))
    assert torch.equal(sum_by_pair(values, row, pairs_of(row)), sum_by_segment(values, row)[pairs_of(row)])
    laid_out = sum_by_pair(values, row, pairs_of(row), beyond=1 + 1e-12)
    assert torch.equal(laid_out, sum_by_segment(values, row)[pairs_of(row)])


def test_a_row_without_some_targets():
    row = make_row([ranked("a", [[2, 9], [9, 3]])])
    seen, left = without_targets(row, [9, 8])
    assert left.tolist() == [True, False, False, True]
    assert seen.target.tolist() == [2, 3]
    assert seen.segment.tolist() == [1, 2]
    assert pairs_of(seen).tolist() == [[1, 2]]
