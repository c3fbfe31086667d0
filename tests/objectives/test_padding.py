"""Pairs of a row beside the padded batch they would be elsewhere: left, right, or more than needed, it changes nothing.

The other side is transformers, which reads each answer with its prompt, and the loss by its formula. Its rotary
embedding is computed in fp32 whatever the weights are, which is where the tolerance comes from.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from made import ranked
from small import decoder

from litrecipe.checkpoint.hf import to_hf_config
from litrecipe.config.groups import Dpo
from litrecipe.model.reference import PolicyAndReference
from litrecipe.model.row import make_row
from litrecipe.objectives.dpo import make_dpo

IDS = st.lists(st.integers(3, 119), min_size=1, max_size=6)
PAIRS = st.lists(st.tuples(IDS, IDS, IDS), min_size=1, max_size=3)
PADDING = st.tuples(st.sampled_from(["left", "right"]), st.integers(0, 5))
PAD = 2
POLICY, FROZEN = (decoder(spread=0.3, seed=seed).double() for seed in (0, 1))


@pytest.fixture(scope="module")
def theirs():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**to_hf_config(POLICY.architecture))
    models = [LlamaForCausalLM(config).double().eval() for _ in range(2)]
    for model, ours in zip(models, (POLICY, FROZEN), strict=True):
        model.load_state_dict(ours.state_dict(), strict=False)
    return models


def padded(pairs, side, more):
    """Token ids, mask, and where answers stand (2N, T): chosen and rejected of each pair, with the prompt before."""
    texts = [(prompt + answer, len(prompt)) for prompt, *answers in pairs for answer in answers]
    width = max(len(ids) for ids, _ in texts) + more
    ids = torch.full((len(texts), width), PAD)
    mask, answer = torch.zeros(2, len(texts), width, dtype=torch.int64)
    for line, (text, asked) in enumerate(texts):
        start = width - len(text) if side == "left" else 0
        ids[line, start : start + len(text)] = torch.tensor(text)
        mask[line, start : start + len(text)] = 1
        answer[line, start + asked : start + len(text)] = 1
    return ids, mask, answer


def sums(model, ids, mask, answer):
    """Log-probability (2N,) of each answer, by the whole logits."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logps = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.log_softmax(-1)
    return (logps[:, :-1].gather(2, ids[:, 1:, None])[..., 0] * answer[:, 1:]).sum(1)


@settings(deadline=None, max_examples=25)
@given(PAIRS, PADDING)
def test_loss_and_gradient_of_pairs_are_those_of_a_padded_batch(theirs, pairs, padding):
    batch = padded(pairs, *padding)
    with torch.no_grad():
        reference = sums(theirs[1], *batch)
    chosen, rejected = (sums(theirs[0], *batch) - reference).view(-1, 2).unbind(1)
    expected = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
    (gradient,) = torch.autograd.grad(expected, [theirs[0].model.embed_tokens.weight])

    row = make_row([ranked(str(n), [c, r], prompt) for n, (prompt, c, r) in enumerate(pairs)])
    [term] = make_dpo(Dpo(beta=0.1))(PolicyAndReference(POLICY, FROZEN)(row), row).terms
    ours = term.sum / len(pairs)
    (own,) = torch.autograd.grad(ours, [POLICY.model.embed_tokens.weight])
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    torch.testing.assert_close(own, gradient, rtol=1e-5, atol=1e-6)
