from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from litrecipe.model.attention import Forest, Varlen, attend
from litrecipe.model.row import Span

SHAPES = [(4, 4, 8), (6, 2, 8), (3, 1, 16)]
"""H, G, D"""


def spans_of(segments: list[tuple[int, int]]) -> list[Span]:
    """Spans of (length, parent) laid one after the other."""
    spans, cursor = [], 0
    for length, parent in segments:
        spans.append(Span(cursor, cursor + length, parent))
        cursor += length
    return spans


@st.composite
def forests(draw: st.DrawFn) -> list[Span]:
    count = draw(st.integers(1, 7))
    return spans_of([(draw(st.integers(1, 6)), draw(st.integers(-1, index - 1))) for index in range(count)])


def inputs(spans: list[Span], shape: tuple[int, int, int]) -> list[Tensor]:
    H, G, D = shape
    torch.manual_seed(0)
    return [torch.randn(spans[-1].stop, heads, D, requires_grad=True) for heads in (H, G, G)]


def visible(spans: list[Span]) -> Tensor:
    """(T, T) the definition, token by token."""
    owner = [index for index, span in enumerate(spans) for _ in range(span.start, span.stop)]
    seen = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for i, mine in enumerate(owner):
        path, at = [], mine
        while at >= 0:
            path.append(at)
            at = spans[at].parent
        for j, theirs in enumerate(owner):
            seen[i, j] = theirs in path and (theirs != mine or j <= i)
    return seen


def by_definition(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """All scores of all tokens, masked; fp64."""
    q, k, v = q.double(), k.double(), v.double()
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def assert_equal_forward_and_gradients(spans: list[Span], shape: tuple[int, int, int]) -> None:
    q, k, v = inputs(spans, shape)
    ours, theirs = attend(q, k, v, Forest(spans)), by_definition(q, k, v, visible(spans))
    assert ours.shape == q.shape
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0)
    direction = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, (q, k, v), direction)
    expected = torch.autograd.grad(theirs, (q, k, v), direction.double())
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "segments",
    [
        [(1, -1)],
        [(70, -1)],
        [(5, -1), (1, -1), (9, -1)],
        [(7, -1), (3, 0), (4, 0)],
        [(7, -1), (3, 0), (4, 0), (2, 1), (5, -1), (1, 4)],
    ],
    ids=["token", "one", "packed", "pair", "nested"],
)
def test_equals_the_definition(segments: list[tuple[int, int]], shape: tuple[int, int, int]) -> None:
    assert_equal_forward_and_gradients(spans_of(segments), shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("segments", "kinds", "alone"),
    [
        ([(5, -1), (5, -1), (70, -1), (5, -1)], [3], 1),
        ([(7, -1), (3, 0), (7, -1), (4, 2), (7, -1), (3, 4), (3, 4)], [3, 3], 1),
        ([(2, -1), (3, 0), (3, -1), (3, 2), (2, -1), (3, 4)], [2, 2], 2),
        ([(40, -1), (30, 0), (30, 0), (30, -1), (30, -1)], [2], 3),
    ],
    ids=["roots", "branches", "ancestors-of-other-lengths", "too-long"],
)
def test_short_segments_that_are_alike_are_computed_together(
    segments: list[tuple[int, int]], kinds: list[int], alone: int, shape: tuple[int, int, int]
) -> None:
    spans = spans_of(segments)
    forest = Forest(spans)
    assert [one.count for one in forest.alike] == kinds
    assert len(forest.alone) == alone
    assert_equal_forward_and_gradients(spans, shape)


@settings(max_examples=60, deadline=None)
@given(forests(), st.sampled_from(SHAPES))
def test_equals_the_definition_on_random_forests(spans: list[Span], shape: tuple[int, int, int]) -> None:
    assert_equal_forward_and_gradients(spans, shape)


@settings(max_examples=30, deadline=None)
@given(forests())
def test_variable_length_sequences_are_the_same_forest(spans: list[Span]) -> None:
    """What the GPU kernel is given, computed sequence by sequence with its lower-right causal mask."""
    q, k, v = inputs(spans, (6, 2, 8))
    varlen = Varlen(spans, Forest(spans).paths, torch.device("cpu"))
    keys, values = (k, v) if varlen.key_places is None else (k[varlen.key_places], v[varlen.key_places])
    outputs, longest = [], [0, 0]
    for index in range(len(spans)):
        queries = slice(*varlen.query_bounds[index : index + 2].tolist())
        seen = slice(*varlen.key_bounds[index : index + 2].tolist())
        n, m = queries.stop - queries.start, seen.stop - seen.start
        mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        outputs.append(by_definition(q[queries], keys[seen], values[seen], mask))
        longest = [max(longest[0], n), max(longest[1], m)]
    assert varlen.longest == tuple(longest)
    torch.testing.assert_close(torch.cat(outputs), by_definition(q, k, v, visible(spans)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(4, 4, 64), (6, 2, 64)])
def test_gpu_kernel_equals_the_definition(shape: tuple[int, int, int]) -> None:
    spans = spans_of([(70, -1), (30, 0), (40, 0), (2, 1), (50, -1), (1, 4)])
    q, k, v = (x.detach().cuda().bfloat16().requires_grad_() for x in inputs(spans, shape))
    ours, theirs = attend(q, k, v, Forest(spans, "cuda")), by_definition(q, k, v, visible(spans).cuda())
    torch.testing.assert_close(ours.double(), theirs, atol=2e-2, rtol=2e-2)
    direction = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, (q, k, v), direction)
    expected = torch.autograd.grad(theirs, (q, k, v), direction.double())
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, right, atol=3e-2, rtol=3e-2)
