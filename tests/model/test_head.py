from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small import Largest
from torch import Tensor

from litrecipe.model import head
from litrecipe.model.head import predict

P, D, V = 11, 6, 13
REAL_BLOCK_SIZE = head.block_size


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tokens at a time, so that every test goes over several blocks and an incomplete one."""
    monkeypatch.setattr(head, "block_size", lambda predictions, device: 4)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(P, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(0, V, (P,))


def with_all_logits(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> Tensor:
    logits = hidden @ weight.T / temperature
    return -torch.nn.functional.cross_entropy(logits, target, reduction="none")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("trained", [True, False])
def test_equals_cross_entropy_of_all_logits(trained: bool, temperature: float) -> None:
    hidden, weight, target = inputs()
    weight.requires_grad_(trained)
    logps, correct, *_ = predict(hidden, weight, target, temperature)
    expected = with_all_logits(hidden, weight, target, temperature)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, expected)
    assert torch.equal(correct, (hidden @ weight.T).argmax(1) == target)
    direction = torch.randn(P)
    leaves = (hidden, weight) if trained else (hidden,)
    grads = torch.autograd.grad(logps, leaves, direction)
    for grad, right in zip(grads, torch.autograd.grad(expected, leaves, direction), strict=True):
        torch.testing.assert_close(grad, right)


@pytest.mark.parametrize("trained", [True, False])
def test_gradient_in_fp64(trained: bool) -> None:
    hidden, weight, target = inputs(torch.float64)
    weight.requires_grad_(trained)
    assert torch.autograd.gradcheck(lambda h, w: predict(h, w, target, 0.7).logps, (hidden, weight))


def test_only_the_weight_is_trained() -> None:
    hidden, weight, target = inputs()
    (grad,) = torch.autograd.grad(predict(hidden.detach(), weight, target).logps.sum(), weight)
    torch.testing.assert_close(grad, torch.autograd.grad(with_all_logits(hidden, weight, target, 1).sum(), weight)[0])


@pytest.mark.parametrize("trained", [True, False])
def test_without_predictions_gradients_are_zero_and_present(trained: bool) -> None:
    hidden, weight, target = inputs()
    weight.requires_grad_(trained)
    logps, correct, *_ = predict(hidden[:0], weight, target[:0], 1.0)
    assert logps.shape == correct.shape == (0,)
    logps.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert not trained or (weight.grad is not None and not weight.grad.any())


def test_of_equally_likely_tokens_the_first_is_the_one_that_greedy_decoding_takes() -> None:
    hidden, weight = torch.ones(V, 1), torch.zeros(V, 1)
    weight[[2, 3, 9]] = 1.0
    assert predict(hidden, weight, torch.arange(V)).correct.nonzero().tolist() == [[2]]


def test_improbable_targets_stay_finite() -> None:
    hidden = torch.tensor([[1.0]])
    weight = torch.tensor([[0.0], [300.0]])
    assert predict(hidden, weight, torch.tensor([0])).logps.tolist() == [-300.0]


@pytest.mark.parametrize("trained", [True, False])
def test_bf16_is_scored_in_fp32(trained: bool) -> None:
    hidden, weight, target = inputs(torch.bfloat16)
    weight.requires_grad_(trained)
    logps, *_ = predict(hidden, weight, target)
    assert logps.dtype == torch.float32
    expected = (hidden @ weight.T).float().log_softmax(1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(logps, expected)
    logps.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_autocast_multiplies_in_bf16_and_gives_fp32_gradients() -> None:
    hidden, weight, target = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        logps, *_ = predict(hidden, weight, target)
    rounded = (hidden.bfloat16() @ weight.bfloat16().T).float().log_softmax(1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(logps, rounded)
    logps.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_collisions_equal_those_of_all_probabilities_and_change_nothing_else(trained: bool, temperature: float) -> None:
    hidden, weight, target = inputs()
    weight.requires_grad_(trained)
    logps, correct, _, log_collisions, *_ = predict(hidden, weight, target, temperature, collisions=True)
    assert log_collisions is not None
    probabilities = (hidden @ weight.T / temperature).softmax(1)
    torch.testing.assert_close(log_collisions, probabilities.square().sum(1).log().detach())
    assert log_collisions.dtype == torch.float32
    assert not log_collisions.requires_grad
    plain = predict(hidden, weight, target, temperature)
    assert plain.log_collisions is None
    assert torch.equal(plain.logps, logps)
    assert torch.equal(plain.correct, correct)
    leaves = (hidden, weight) if trained else (hidden,)
    grads = torch.autograd.grad(logps.sum(), leaves)
    for grad, right in zip(grads, torch.autograd.grad(plain.logps.sum(), leaves), strict=True):
        assert torch.equal(grad, right)


def test_collisions_of_known_distributions() -> None:
    """Even over V tokens: Σ (1/V)² = 1/V. All on one: 1. Probabilities 2/3 and 1/3 by log 2: 4/9 + 1/9."""
    even = predict(torch.zeros(1, 1), torch.ones(V, 1), torch.tensor([0]), collisions=True).log_collisions
    assert even is not None
    assert even.tolist() == pytest.approx([-math.log(V)], rel=1e-6)
    weight = torch.tensor([[math.log(2)], [0.0]])
    found = predict(torch.tensor([[1.0], [1000.0]]), weight, torch.tensor([1, 1]), collisions=True).log_collisions
    assert found is not None
    assert found.tolist() == pytest.approx([math.log(5 / 9), 0.0], rel=1e-6)


def entropy_of_all_logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    logps = (hidden @ weight.T / temperature).log_softmax(1)
    return -(logps.exp() * logps).sum(1)


@pytest.mark.parametrize("block", [1, 4, V])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("trained", [True, False])
def test_a_learnt_entropy_equals_that_of_all_logits(
    trained: bool, temperature: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradient, together with that of the log-probabilities, however the vocabulary is cut."""
    monkeypatch.setattr(head, "block_size", lambda predictions, device: block)
    hidden, weight, target = inputs()
    weight.requires_grad_(trained)
    found = predict(hidden, weight, target, temperature, entropy="learnt")
    right = entropy_of_all_logits(hidden, weight, temperature)
    assert found.entropy is not None
    assert found.entropy.dtype == torch.float32
    torch.testing.assert_close(found.entropy, right, rtol=1e-5, atol=1e-6)
    a, b = torch.randn(2, P)
    leaves = (hidden, weight) if trained else (hidden,)
    grads = torch.autograd.grad((found.logps, found.entropy), leaves, (a, b))
    expected = torch.autograd.grad((with_all_logits(hidden, weight, target, temperature), right), leaves, (a, b))
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trained", [True, False])
def test_gradient_of_the_entropy_in_fp64(trained: bool) -> None:
    hidden, weight, target = inputs(torch.float64)
    weight.requires_grad_(trained)

    def both(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor | None]:
        found = predict(h, w, target, 0.7, entropy="learnt")
        return found.logps, found.entropy

    assert torch.autograd.gradcheck(both, (hidden, weight))


@pytest.mark.parametrize("trained", [True, False])
def test_a_measured_entropy_has_no_gradient_and_changes_nothing_else(trained: bool) -> None:
    hidden, weight, target = inputs()
    weight.requires_grad_(trained)
    plain = predict(hidden, weight, target, 0.7, collisions=True)
    measured = predict(hidden, weight, target, 0.7, collisions=True, entropy="measured")
    assert plain.entropy is None
    assert measured.entropy is not None
    assert not measured.entropy.requires_grad
    torch.testing.assert_close(measured.entropy, entropy_of_all_logits(hidden, weight, 0.7).detach())
    assert torch.equal(plain.logps, measured.logps)
    assert plain.log_collisions is not None
    assert measured.log_collisions is not None
    assert torch.equal(plain.log_collisions, measured.log_collisions)
    leaves = (hidden, weight) if trained else (hidden,)
    grads = torch.autograd.grad(measured.logps.sum(), leaves)
    for grad, right in zip(grads, torch.autograd.grad(plain.logps.sum(), leaves), strict=True):
        assert torch.equal(grad, right)


def test_entropies_of_known_distributions() -> None:
    """Even over V tokens: log V. Probabilities 2/3 and 1/3: log 3 - 2/3 log 2. All on one: 0, with logits of 1000 too,
    whichever block they are in."""
    even = predict(torch.zeros(1, 1), torch.ones(V, 1), torch.tensor([0]), entropy="measured").entropy
    assert even is not None
    assert even.tolist() == pytest.approx([math.log(V)], rel=1e-6)
    weight = torch.tensor([[math.log(2)], [0.0]])
    found = predict(torch.tensor([[1.0], [1000.0]]), weight, torch.tensor([1, 1]), entropy="measured").entropy
    assert found is not None
    assert found.tolist() == pytest.approx([math.log(3) - 2 / 3 * math.log(2), 0.0], rel=1e-6)
    weight = torch.zeros(V, 1)
    weight[9] = 1000
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    late = predict(hidden, weight, torch.tensor([1, 1]), entropy="learnt").entropy
    assert late is not None
    assert late.tolist() == pytest.approx([0.0, math.log(V - 1)], rel=1e-6)
    late.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("trained", [True, False])
def test_bf16_gives_an_entropy_in_fp32(trained: bool) -> None:
    hidden, weight, target = inputs(torch.bfloat16)
    weight.requires_grad_(trained)
    found = predict(hidden, weight, target, entropy="learnt").entropy
    logps = (hidden @ weight.T).float().log_softmax(1)
    expected = -(logps.exp() * logps).sum(1)
    assert found is not None
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found.sum(), hidden)
    (right,) = torch.autograd.grad(expected.sum(), hidden)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, right, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("trained", [True, False])
def test_without_predictions_there_is_an_empty_entropy_on_the_graph(trained: bool) -> None:
    hidden, weight, target = inputs()
    weight.requires_grad_(trained)
    found = predict(hidden[:0], weight, target[:0], entropy="learnt").entropy
    assert found is not None
    assert found.shape == (0,)
    found.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize(
    ("trained", "wanted", "products_a_block"),
    [
        (False, {}, 2),
        (False, {"collisions": True}, 2),
        (False, {"entropy": "measured"}, 2),
        (False, {"entropy": "learnt"}, 3),
        (True, {}, 4),
        (True, {"collisions": True}, 4),
        (True, {"entropy": "measured"}, 4),
        (True, {"entropy": "learnt"}, 4),
        (False, {"log_z": True}, 2),
        (True, {"log_z": True}, 4),
    ],
)
def test_never_all_logits_and_no_product_too_many(trained: bool, wanted: Any, products_a_block: int) -> None:
    hidden, weight, target = inputs()
    weight.requires_grad_(trained)
    with Largest() as largest:
        found = predict(hidden, weight, target, **wanted)
        values = [x for x in (found.logps, found.entropy, found.log_z) if x is not None and x.requires_grad]
        torch.stack(values).sum().backward()
    assert largest.elements == (D * V if trained else P * D)  # the weight's gradient, the Jacobian
    assert largest.elements < P * V
    assert largest.products == 4 * products_a_block
    assert bool(largest.kept) == ("entropy" in wanted)


def test_no_gradient_no_second_product() -> None:
    hidden, weight, target = inputs()
    with Largest() as largest, torch.no_grad():
        predict(hidden.detach(), weight, target)
    assert largest.products == 4


def test_a_block_is_never_too_narrow_for_a_product() -> None:
    assert REAL_BLOCK_SIZE(0, "cpu") == 2**20
    assert REAL_BLOCK_SIZE(378, "cpu") == 2**20 // 378
    assert REAL_BLOCK_SIZE(10**6, "cuda") == head.SMALLEST_BLOCK


# -- a soft cap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [4, V])
@pytest.mark.parametrize("trained", [True, False])
def test_capped_logits_and_their_gradients(trained: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """c tanh(z / c) before the temperature: log-probabilities, entropy, and both gradients, of all logits at once."""
    monkeypatch.setattr(head, "block_size", lambda predictions, device: block)
    hidden, weight, target = inputs(torch.float64)
    weight.requires_grad_(trained)
    found = predict(hidden, weight, target, 0.7, collisions=True, entropy="learnt", softcap=1.5)
    logits = 1.5 * (hidden @ weight.T / 1.5).tanh() / 0.7
    right = torch.distributions.Categorical(logits=logits)
    logps = right.log_prob(target)
    assert found.entropy is not None and found.log_collisions is not None
    torch.testing.assert_close(found.logps, logps)
    torch.testing.assert_close(found.entropy, right.entropy())
    torch.testing.assert_close(found.log_collisions, right.probs.square().sum(1).log())
    a, b = torch.randn(2, P, dtype=torch.float64)
    leaves = (hidden, weight) if trained else (hidden,)
    grads = torch.autograd.grad((found.logps, found.entropy), leaves, (a, b))
    wanted = torch.autograd.grad((logps, right.entropy()), leaves, (a, b), retain_graph=True)
    torch.testing.assert_close(grads, wanted)
    (alone,) = torch.autograd.grad(predict(hidden, weight, target, 0.7, softcap=1.5).logps, hidden, a)
    torch.testing.assert_close(alone, torch.autograd.grad(logps, hidden, a)[0])


# -- log Z ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("trained", [True, False])
def test_log_z_is_the_logsumexp_of_all_logits(trained: bool, temperature: float, softcap: float | None) -> None:
    """Value and gradient, together with those of the log-probabilities and of an entropy that is learnt."""
    hidden, weight, target = inputs(torch.float64)
    weight.requires_grad_(trained)
    found = predict(hidden, weight, target, temperature, entropy="learnt", softcap=softcap, log_z=True)
    logits = hidden @ weight.T
    logits = (logits if softcap is None else softcap * (logits / softcap).tanh()) / temperature
    right = torch.distributions.Categorical(logits=logits)
    expected = right.log_prob(target), right.entropy(), logits.logsumexp(1)
    assert found.entropy is not None and found.log_z is not None
    torch.testing.assert_close(found.log_z, expected[2])
    directions = tuple(torch.randn(3, P, dtype=torch.float64))
    leaves = (hidden, weight) if trained else (hidden,)
    grads = torch.autograd.grad((found.logps, found.entropy, found.log_z), leaves, directions)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, directions))
    assert predict(hidden, weight, target).log_z is None


@pytest.mark.parametrize("trained", [True, False])
def test_log_z_changes_nothing_else_and_is_fp32_under_autocast(trained: bool) -> None:
    hidden, weight, target = inputs()
    weight.requires_grad_(trained)
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = (predict(hidden, weight, target, log_z=wanted) for wanted in (False, True))
    assert found.log_z is not None
    assert torch.equal(plain.logps, found.logps)
    torch.testing.assert_close(found.log_z, (hidden.bfloat16() @ weight.bfloat16().T).float().logsumexp(1))
    leaves = (hidden, weight) if trained else (hidden,)
    grads = [torch.autograd.grad(one.logps.sum(), leaves, retain_graph=True) for one in (plain, found)]
    assert all(map(torch.equal, *grads))
    assert torch.autograd.grad(found.log_z.square().mean(), hidden)[0].dtype == torch.float32


@pytest.mark.parametrize("trained", [True, False])
def test_log_z_of_no_predictions_is_on_the_graph(trained: bool) -> None:
    hidden, weight, target = inputs()
    weight.requires_grad_(trained)
    found = predict(hidden[:0], weight, target[:0], log_z=True).log_z
    assert found is not None and found.shape == (0,)
    assert not torch.autograd.grad(found.sum(), hidden)[0].any()
