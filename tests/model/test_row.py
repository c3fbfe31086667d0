from __future__ import annotations

import numpy as np
import pytest
import torch

from litrecipe.model.row import Sample, Segment, Span, make_row


def segment(tokens: list[int], weights: list[float], parent: int = -1) -> Segment:
    return Segment(np.array(tokens), np.array(weights, dtype=np.float32), parent)


def test_conversations_lie_one_after_the_other_and_positions_restart() -> None:
    row = make_row(
        [Sample("a", (segment([5, 6, 7], [0, 1, 0.5]),)), Sample("b", (segment([8, 9], [0, 1]),))],
    )
    assert row.tokens.tolist() == [5, 6, 7, 8, 9]
    assert row.positions.tolist() == [0, 1, 2, 0, 1]
    assert row.spans == (Span(0, 3, -1), Span(3, 5, -1))
    assert row.predict_from.tolist() == [0, 1, 3]
    assert row.target.tolist() == [6, 7, 9]
    assert row.weight.tolist() == [1, 0.5, 1]
    assert row.segment.tolist() == [0, 0, 1]
    assert row.answers.tolist() == [0, 1]
    assert row.sample_ids == ("a", "b")
    assert row.sample_of_span == (0, 1)


def test_a_parents_last_token_predicts_the_first_of_every_branch() -> None:
    tree = Sample(
        "tree",
        (
            segment([1, 2, 3], [0, 0, 0]),
            segment([4, 5], [1, 1], parent=0),
            segment([6], [1], parent=0),
            segment([7], [1], parent=1),
        ),
    )
    row = make_row([Sample("before", (segment([9], [0]),)), tree])
    assert row.tokens.tolist() == [9, 1, 2, 3, 4, 5, 6, 7]
    assert row.positions.tolist() == [0, 0, 1, 2, 3, 4, 3, 5]
    assert row.spans == (Span(0, 1, -1), Span(1, 4, -1), Span(4, 6, 1), Span(6, 7, 1), Span(7, 8, 2))
    assert row.predict_from.tolist() == [3, 4, 3, 5]
    assert row.target.tolist() == [4, 5, 6, 7]
    assert row.segment.tolist() == [2, 2, 3, 4]
    assert row.answers.tolist() == [2, 3, 4]
    assert row.sample_of_span == (0, 1, 1, 1, 1)
    assert tree.length == 7


def test_no_samples_give_one_token_and_nothing_to_predict() -> None:
    row = make_row([])
    assert row.tokens.tolist() == [0]
    assert row.positions.tolist() == [0]
    assert row.spans == (Span(0, 1, -1),)
    assert row.answers.tolist() == []
    assert row.target.numel() == row.predict_from.numel() == row.weight.numel() == 0
    assert row.sample_ids == ()


def test_types() -> None:
    row = make_row([Sample("a", (segment([1, 2], [0, 1]),))])
    for tensor in (row.tokens, row.positions, row.predict_from, row.target, row.segment, row.answers):
        assert tensor.dtype == torch.int64
    assert row.weight.dtype == torch.float32
    assert make_row([]).answers.dtype == torch.int64


def test_a_first_token_cannot_be_predicted() -> None:
    with pytest.raises(ValueError, match=r"x\.jsonl:3: its first token"):
        make_row([Sample("x.jsonl:3", (segment([1, 2], [1, 1]),))])


def test_moving_a_row_moves_every_tensor_and_keeps_the_rest() -> None:
    row = make_row([Sample("a", (segment([1, 2], [0, 1]),))])
    moved = row.to("meta")
    assert {t.device.type for t in vars(moved).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert (moved.spans, moved.sample_ids, moved.sample_of_span) == (row.spans, row.sample_ids, row.sample_of_span)


def test_extras_lie_end_to_end() -> None:
    def scored(*scores: float, **more: list[float]) -> Sample:
        segment = Segment(np.array([1, 2]), np.array([0, 1], dtype=np.float32))
        extra = {"scores": np.array(scores, dtype=float), **{name: np.array(values) for name, values in more.items()}}
        return Sample("a", (segment,), extra)

    row = make_row([scored(1, 2), scored(), scored(3)]).to("cpu")
    assert row.extra["scores"].tolist() == [1, 2, 3]
    assert row.extra["scores"].dtype == torch.float32
    named = make_row([scored(1, ids=[7, 70_000]), scored(2, ids=[9])]).extra["ids"]  # type: ignore[list-item]
    assert named.tolist() == [7, 70_000, 9] and named.dtype == torch.int64
    assert make_row([]).extra == {}
    with pytest.raises(ValueError, match=r"sample a: has extras \['scores', 'label'\], not \['scores'\]"):
        make_row([scored(1), scored(1, label=[1])])
