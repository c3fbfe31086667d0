"""Scoring against a model whose log-prob of a token hangs on all tokens before it, so any wrong context shows."""

from __future__ import annotations

import random
from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from litrecipe.evaluation.scoring import KEYS_PER_TOKEN, loglikelihoods
from litrecipe.model.head import Predictions
from litrecipe.model.row import Row


def chance(path: tuple[int, ...]) -> float:
    """A log-prob that depends on every token of a path, the predicted one included."""
    return -1.0 - crc32(bytes(path)) / 2**32


class PathModel(nn.Module):
    """Reads what a decoder would see at each prediction: the ancestors' tokens, then its own segment's."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.rows: list[Row] = []

    def forward(self, row: Row) -> Predictions:
        self.rows.append(row)
        paths = []
        for place, target in zip(row.predict_from.tolist(), row.target.tolist(), strict=True):
            span = next(index for index, span in enumerate(row.spans) if span.start <= place < span.stop)
            seen = row.tokens[row.spans[span].start : place + 1].tolist()
            while (span := row.spans[span].parent) >= 0:
                seen = row.tokens[row.spans[span].start : row.spans[span].stop].tolist() + seen
            paths.append((*seen, target))
        return Predictions(
            logps=torch.tensor([chance(path) for path in paths], dtype=torch.float64),
            correct=torch.tensor([sum(path) % 3 > 0 for path in paths], dtype=torch.bool),
        )


def expected(context: list[int], continuation: list[int], max_length: int) -> tuple[float, bool]:
    tokens = (context + continuation)[-(max_length + 1) :]
    paths = [tuple(tokens[:end]) for end in range(len(tokens) - len(continuation) + 1, len(tokens) + 1)]
    return sum(map(chance, paths)), all(sum(path) % 3 > 0 for path in paths)


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(
    preambles=st.lists(tokens, min_size=1, max_size=3),
    tails=st.lists(st.tuples(st.integers(0, 2), tokens, tokens), min_size=1, max_size=12),
    batch_tokens=st.integers(1, 200),
    max_length=st.integers(30, 80),
)
def test_every_request_gets_its_own_score(preambles, tails, batch_tokens, max_length) -> None:
    requests = [(preambles[which % len(preambles)] + context, answer) for which, context, answer in tails]
    results = loglikelihoods(PathModel(), requests, batch_tokens=batch_tokens, max_length=max_length)
    for (context, continuation), (logp, greedy) in zip(requests, results, strict=True):
        wanted, wanted_greedy = expected(context, continuation, max_length)
        assert logp == pytest.approx(wanted, abs=1e-9)
        assert greedy == wanted_greedy


def test_order_does_not_matter() -> None:
    draw = random.Random(0)
    preamble = [draw.randrange(50) for _ in range(40)]
    requests = [
        (preamble[: draw.randrange(1, 40)] + [draw.randrange(3)] * draw.randrange(1, 4), [draw.randrange(3), 1])
        for _ in range(60)
    ]
    shuffled = draw.sample(range(60), 60)
    straight = loglikelihoods(PathModel(), requests, batch_tokens=100, max_length=64)
    mixed = loglikelihoods(PathModel(), [requests[i] for i in shuffled], batch_tokens=100, max_length=64)
    assert [straight[i] for i in shuffled] == mixed


def test_shared_beginnings_are_computed_once() -> None:
    fewshot, question = list(range(100)), [101, 102]
    requests = [(fewshot + question + [q], [200 + choice, 7]) for q in range(5) for choice in range(4)]
    model = PathModel()
    loglikelihoods(model, requests, batch_tokens=4096, max_length=512)
    [row] = model.rows
    shared = 100 + 2  # the preamble and what all questions begin with; a token more is not worth a segment
    assert len(row.tokens) == shared + 5 * 4 * (1 + 2)


def test_choices_that_begin_alike_share_their_beginning() -> None:
    same, context = list(range(20, 40)), list(range(10))
    requests = [(context, [*same, 50]), (context, [*same, 51, 52])]
    model = PathModel()
    results = loglikelihoods(model, requests, batch_tokens=4096, max_length=512)
    assert sum(len(row.tokens) for row in model.rows) == 10 + 20 + 1 + 2
    assert [logp for logp, _ in results] == pytest.approx([expected(*request, 512)[0] for request in requests])


def test_rows_keep_to_the_budget() -> None:
    requests = [([1] * 50 + [choice], [choice]) for choice in range(2, 40)]
    model = PathModel()
    loglikelihoods(model, requests, batch_tokens=64, max_length=512)
    assert max(len(row.tokens) for row in model.rows) <= 64


def test_the_keys_of_a_row_are_bounded_too() -> None:
    """A long preamble, whose keys every branch needs, before many short questions of a few short answers."""
    preamble = [1] * 300
    requests = [(preamble + [2 + q] * 20, [100 + choice]) for q in range(40) for choice in range(4)]
    model = PathModel()
    results = loglikelihoods(model, requests, batch_tokens=1024, max_length=512)
    assert [logp for logp, _ in results] == pytest.approx([expected(*request, 512)[0] for request in requests])
    for row in model.rows:
        depths: list[int] = []
        for span in row.spans:
            depths.append(span.stop - span.start + (depths[span.parent] if span.parent >= 0 else 0))
        assert sum(depths) <= 1024 * KEYS_PER_TOKEN
        assert len(row.tokens) <= 1024
    assert 2 < len(model.rows) < 8


def test_a_sequence_longer_than_the_budget_is_still_scored() -> None:
    request = (list(range(90)), [1, 2])
    [(logp, _)] = loglikelihoods(PathModel(), [request], batch_tokens=16, max_length=512)
    assert logp == pytest.approx(expected(*request, 512)[0])


@pytest.mark.parametrize(
    ("request_", "what"),
    [(([], [1]), "context"), (([1], []), "continuation"), (([1], [2] * 9), "9 tokens to predict")],
)
def test_what_cannot_be_scored_is_refused(request_, what) -> None:
    with pytest.raises(ValueError, match=f"request 0: .*{what}"):
        loglikelihoods(PathModel(), [request_], batch_tokens=16, max_length=8)


def test_no_requests_no_results() -> None:
    assert loglikelihoods(PathModel(), [], batch_tokens=16, max_length=8) == []
