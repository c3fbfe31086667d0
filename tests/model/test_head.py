from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    logps, correct, _, log_collisions = predict(hidden, weight, target, temperature, collisions=True)
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


class Largest(TorchDispatchMode):
    """Most elements of any tensor made, and products with something of size V."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        self.products += func.overloadpacket is torch.ops.aten.mm
        return result


@pytest.mark.parametrize("collisions", [False, True])
@pytest.mark.parametrize(("trained", "products_a_block"), [(False, 2), (True, 4)])
def test_never_all_logits_and_no_product_too_many(trained: bool, products_a_block: int, collisions: bool) -> None:
    hidden, weight, target = inputs()
    weight.requires_grad_(trained)
    with Largest() as largest:
        predict(hidden, weight, target, collisions=collisions).logps.sum().backward()
    assert largest.elements == (D * V if trained else P * D)  # the weight's gradient, the Jacobian
    assert largest.elements < P * V
    assert largest.products == 4 * products_a_block


def test_no_gradient_no_second_product() -> None:
    hidden, weight, target = inputs()
    with Largest() as largest, torch.no_grad():
        predict(hidden.detach(), weight, target)
    assert largest.products == 4


def test_a_block_is_never_too_narrow_for_a_product() -> None:
    assert REAL_BLOCK_SIZE(0, "cpu") == 2**20
    assert REAL_BLOCK_SIZE(378, "cpu") == 2**20 // 378
    assert REAL_BLOCK_SIZE(10**6, "cuda") == head.SMALLEST_BLOCK
