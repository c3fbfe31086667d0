"""What is counted, against torch's own counter on transformers' model, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import CONFIG

from litrecipe.model.families import read_architecture
from litrecipe.model.flops import training_flops, visible_pairs
from litrecipe.model.row import Sample, Segment


def sample(*lengths: int, parents: tuple[int, ...] = ()) -> Sample:
    """Segments of so many tokens, all learnt but the first of those without a parent."""
    segments = []
    for place, length in enumerate(lengths):
        weights = np.ones(length, dtype=np.float32)
        parent = parents[place] if parents else -1
        weights[0] = parent >= 0
        segments.append(Segment(np.arange(length), weights, parent))
    return Sample("x", tuple(segments))


@pytest.mark.parametrize("tied", [True, False])
def test_a_sequence_counts_as_in_transformers_but_for_what_nobody_sees_or_predicts(tied: bool) -> None:
    """Their attention computes all T² pairs and logits of the last token too; they do not count norms' weights."""
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    config = CONFIG | {"tie_word_embeddings": tied}
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**config), attn_implementation="eager"
    )
    length, layers, hidden, width = 24, 2, 64, 4 * 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(torch.arange(length)[None])
    ours = training_flops(read_architecture(config), [sample(length)]) / 3
    unseen = 4 * width * layers * (length * length - length * (length + 1) // 2)
    norms = 2 * length * hidden * (2 * layers + 1)
    assert ours + unseen + 2 * hidden * 120 - norms == counter.get_total_flops()


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
def test_visible_pairs_of_a_tree_are_those_of_its_mask(window: int | None) -> None:
    """A prompt of 5 with branches of 4 and 6, one of which has a branch of 3: each path counted token by token."""
    tree = sample(5, 4, 6, 3, parents=(-1, 0, 0, 1))
    starts = {0: 0, 1: 5, 2: 5, 3: 9}
    counted = sum(
        min(starts[place] + token + 1, window or 99)
        for place, segment in enumerate(tree.segments)
        for token in range(len(segment.tokens))
    )
    assert visible_pairs(tree, window) == counted


def test_experts_count_as_far_as_they_are_chosen() -> None:
    experts = {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2}
    some, more = (
        training_flops(read_architecture(CONFIG | experts | changes), [sample(10)])
        for changes in ({}, {"num_experts_per_tok": 3})
    )
    assert more - some == 3 * 2 * 10 * 2 * (3 * 64 * 128)
