from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from litrecipe.data.packing import pack


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
    """Longest-first into the emptiest of 4 rows would give 9 + 3 + 3 + 3 tokens or the like; best fit does not."""
    lengths = [5, 5, 4, 4, 3, 3, 3]
    packing = pack(lengths, budget=9, multiple_of=2)
    assert all(sum(lengths[index] for index in row) <= 9 for row in packing.rows)
