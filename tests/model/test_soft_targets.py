"""Every expected value is computed from all logits at once."""

from __future__ import annotations

import pytest
import torch
from small import Largest
from torch import Tensor

from litrecipe.model import head, soft_targets
from litrecipe.model.head import Predictions, SoftTargets, predict
from litrecipe.model.soft_targets import Likeliest, WholeVocabulary, divergence, likeliest

P, D, E, V = 11, 6, 8, 13


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tokens at a time, so that every test goes over several blocks and an incomplete one."""
    for module in (head, soft_targets):
        monkeypatch.setattr(module, "block_size", lambda predictions, device: 4)


def inputs(teacher_vocabulary: int = V, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Hidden states and head of a student, the same of a teacher of another width, and targets."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(P, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    other, other_weight = torch.randn(P, E, dtype=dtype), torch.randn(teacher_vocabulary, E, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), other, other_weight, torch.randint(0, V, (P,))


def logits_of(hidden: Tensor, weight: Tensor, temperature: float, softcap: float | None = None) -> Tensor:
    z = hidden @ weight.T
    return (z if softcap is None else softcap * (z / softcap).tanh()) / temperature


def found(soft: SoftTargets, hidden: Tensor, weight: Tensor, target: Tensor, **wanted: float) -> Predictions:
    predictions = predict(hidden, weight, target, soft=soft, **wanted)  # type: ignore[arg-type]
    assert predictions.kl is not None and predictions.teacher_entropy is not None
    assert not predictions.teacher_entropy.requires_grad
    return predictions


def same(
    predictions: Predictions, logps: Tensor, kl: Tensor, entropy: Tensor, leaves: tuple[Tensor, ...], dtype: torch.dtype
) -> None:
    """Values, and gradients of log-probabilities and KL together."""
    torch.testing.assert_close(predictions.logps, logps)
    torch.testing.assert_close(predictions.kl, kl)
    torch.testing.assert_close(predictions.teacher_entropy, entropy)
    directions = tuple(torch.randn(2, P, dtype=dtype))
    grads = torch.autograd.grad((predictions.logps, predictions.kl), leaves, directions)
    torch.testing.assert_close(grads, torch.autograd.grad((logps, kl), leaves, directions, retain_graph=True))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("trained", [True, False])
def test_a_teacher_of_the_whole_vocabulary(trained: bool, temperature: float, softcap: float | None) -> None:
    hidden, weight, other, other_weight, target = inputs()
    weight.requires_grad_(trained)
    soft = WholeVocabulary.read(other, other_weight, 2.5, temperature)
    q = torch.distributions.Categorical(logits=logits_of(other, other_weight, temperature, 2.5))
    p = torch.distributions.Categorical(logits=logits_of(hidden, weight, temperature, softcap))
    kl = torch.distributions.kl_divergence(q, p)
    assert kl.min() > 0.01
    logps = logits_of(hidden, weight, 1, softcap).log_softmax(1).gather(1, target[:, None])[:, 0]
    leaves = (hidden, weight) if trained else (hidden,)
    same(found(soft, hidden, weight, target, softcap=softcap), logps, kl, q.entropy(), leaves, torch.float64)  # type: ignore[arg-type]


def test_the_gradient_towards_the_logits_is_that_of_the_cross_entropy() -> None:
    """p - q (Gemma 2): the student's head is the identity, so its hidden states are its logits."""
    torch.manual_seed(0)
    z, t = torch.randn(P, V, dtype=torch.float64, requires_grad=True), torch.randn(P, V, dtype=torch.float64)
    eye = torch.eye(V, dtype=torch.float64)
    predictions = found(WholeVocabulary(t, eye), z, eye, torch.zeros(P, dtype=torch.int64))
    assert predictions.kl is not None and predictions.teacher_entropy is not None
    torch.testing.assert_close(predictions.kl + predictions.teacher_entropy, -(t.softmax(1) * z.log_softmax(1)).sum(1))
    (grad,) = torch.autograd.grad(predictions.kl.sum(), z)
    torch.testing.assert_close(grad, (z.softmax(1) - t.softmax(1)).detach())


@pytest.mark.parametrize("size", [8, 10, 17])
def test_tables_of_other_sizes_are_compared_on_common_tokens(size: int) -> None:
    """The student's padding is learnt to be improbable; the teacher's is left out of its distribution."""
    hidden, weight, other, other_weight, target = inputs(size)
    soft, common = WholeVocabulary(other, other_weight), min(size, V)
    q = logits_of(other, other_weight, 1)[:, :common].softmax(1)
    logp = logits_of(hidden, weight, 1).log_softmax(1)
    entropy = -(q * q.log()).sum(1)
    kl = -(q * logp[:, :common]).sum(1) - entropy
    logps = logp.gather(1, target[:, None])[:, 0]
    same(found(soft, hidden, weight, target), logps, kl, entropy, (hidden, weight), torch.float64)


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("trained", [True, False])
def test_k_tokens_and_a_bucket_for_the_rest(trained: bool, temperature: float, k: int) -> None:
    hidden, weight, other, other_weight, target = inputs()
    weight.requires_grad_(trained)
    soft = likeliest(other, other_weight, k, temperature)
    q = logits_of(other, other_weight, temperature).softmax(1)
    right = q.topk(k, 1)
    assert torch.equal(soft.ids, right.indices)
    torch.testing.assert_close(soft.logps, right.values.log())
    p = logits_of(hidden, weight, temperature).softmax(1)
    coarse_q, coarse_p = (
        torch.cat([values := every.gather(1, soft.ids), 1 - values.sum(1, keepdim=True)], 1) for every in (q, p)
    )
    kl = (coarse_q * (coarse_q / coarse_p).log()).sum(1)
    entropy = -(coarse_q * coarse_q.log()).sum(1)
    assert (kl < (q * (q / p).log()).sum(1)).all()  # never more than over the whole vocabulary
    logps = logits_of(hidden, weight, 1).log_softmax(1).gather(1, target[:, None])[:, 0]
    leaves = (hidden, weight) if trained else (hidden,)
    same(found(soft, hidden, weight, target), logps, kl, entropy, leaves, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_tokens_in_order_are_the_whole_vocabulary(dtype: torch.dtype) -> None:
    hidden, weight, other, other_weight, target = inputs(dtype=dtype)
    whole = found(WholeVocabulary(other, other_weight), hidden, weight, target)
    named = found(likeliest(other, other_weight, V + 5), hidden, weight, target)
    assert whole.kl is not None and whole.teacher_entropy is not None
    same(named, whole.logps, whole.kl, whole.teacher_entropy, (hidden, weight), dtype)


def test_a_token_that_is_certain_is_a_hard_target() -> None:
    """log q = 0 of one token: the KL is its negative log-probability, nothing is left for the others."""
    hidden, weight, _, _, target = inputs()
    soft = Likeliest(target[:, None], torch.zeros(P, 1, dtype=torch.float64))
    predictions = found(soft, hidden, weight, target)
    logps = logits_of(hidden, weight, 1).log_softmax(1).gather(1, target[:, None])[:, 0]
    same(predictions, logps, -logps, torch.zeros(P, dtype=torch.float64), (hidden, weight), torch.float64)


def test_improbable_tokens_stay_finite() -> None:
    """A student sure of what the teacher excludes: 300 nats, with a gradient that is not lost."""
    z = torch.tensor([[300.0, 0.0, 0.0]], requires_grad=True)
    eye, target = torch.eye(3), torch.tensor([0])
    for soft in (
        WholeVocabulary(torch.tensor([[-300.0, 0.0, -300.0]]), eye),
        Likeliest(torch.tensor([[1]]), torch.zeros(1, 1)),
    ):
        kl = found(soft, z, eye, target).kl
        assert kl is not None and kl.tolist() == [300.0]
        assert torch.autograd.grad(kl, z)[0].tolist() == [[1.0, -1.0, 0.0]]


@pytest.mark.parametrize("kind", ["whole", "k"])
def test_never_all_logits_of_either(kind: str) -> None:
    hidden, weight, other, other_weight, target = inputs()
    with Largest() as largest:
        soft = WholeVocabulary(other, other_weight) if kind == "whole" else likeliest(other, other_weight, 3)
        predictions = found(soft, hidden, weight, target)
        assert predictions.kl is not None
        (predictions.logps + predictions.kl).sum().backward()
    assert largest.elements < P * V


def test_autocast_reads_both_heads_in_bf16_forward_and_backward() -> None:
    hidden, weight, other, other_weight, target = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        kl = found(WholeVocabulary.read(other, other_weight), hidden, weight, target).kl
    assert kl is not None and kl.dtype == torch.float32
    z, t = ((a.bfloat16() @ b.bfloat16().T).float() for a, b in ((hidden, weight), (other, other_weight)))
    expected = (t.softmax(1) * (t.log_softmax(1) - z.log_softmax(1))).sum(1)
    torch.testing.assert_close(kl, expected)
    grads = torch.autograd.grad(kl.sum(), (hidden, weight))
    wanted = torch.autograd.grad(expected.sum(), (hidden, weight))
    torch.testing.assert_close(grads, wanted, rtol=0.02, atol=0.03)  # the logits' gradient is rounded to bf16


@pytest.mark.parametrize("kind", ["whole", "k"])
def test_no_places_give_nothing_on_the_graph(kind: str) -> None:
    hidden, weight, other, other_weight, target = inputs()
    soft = WholeVocabulary(other[:0], other_weight) if kind == "whole" else likeliest(other[:0], other_weight, 3)
    kl = found(soft, hidden[:0], weight, target[:0]).kl
    assert kl is not None and kl.shape == (0,)
    assert not torch.autograd.grad(kl.sum(), weight)[0].any()


# -- the KL of two models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_divergence_is_that_of_whole_distributions(temperature: float) -> None:
    torch.manual_seed(1)
    hidden, other = torch.randn(P, D, dtype=torch.float64), torch.randn(P, D + 2, dtype=torch.float64)
    weight, other_weight = torch.randn(V, D, dtype=torch.float64), torch.randn(V, D + 2, dtype=torch.float64)
    p, q = (
        torch.distributions.Categorical(logits=read @ rows.T / temperature)
        for read, rows in ((hidden, weight), (other, other_weight))
    )
    expected = torch.distributions.kl_divergence(p, q)
    assert expected.min() > 0.01
    torch.testing.assert_close(divergence(hidden, weight, other, other_weight, temperature), expected)
    narrow = divergence(*(one.float() for one in (hidden, weight, other, other_weight)), temperature)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, expected.float())


def test_nothing_is_apart_from_itself() -> None:
    hidden, weight, *_ = inputs(dtype=torch.float32)
    assert not divergence(hidden, weight, hidden, weight).any()
    assert divergence(hidden[:0], weight, hidden[:0], weight).shape == (0,)


def test_divergence_of_capped_logits() -> None:
    hidden, weight, *_ = inputs()
    other = hidden + torch.randn(P, D, dtype=torch.float64)
    p, q = (torch.distributions.Categorical(logits=2 * (x @ weight.T / 2).tanh() / 0.7) for x in (hidden, other))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(divergence(hidden, weight, other, weight, 0.7, softcap=2.0), expected)
