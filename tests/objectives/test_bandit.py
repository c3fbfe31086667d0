"""What DPO does to answers that no pair is about: the bandit of 2404.10719, section 4.2, without its networks.

Three answers, of which a reference gives (0.1, 0.8, 0.1); one pair says that the first is better than the second. The
policy is a softmax over three logits, so the loss pushes the first up and the second down by the same d and leaves the
third where it is. Its probability is 0.1 / (0.1 e^d + 0.8 e^-d + 0.1): it rises from 0.1 to 0.1502, at e^2d = 8, that
is d = ln(8) / 2 = 1.0397 and h = 2 d = 2.0794, and only then falls.
"""

from __future__ import annotations

import math

import pytest
import torch

from litrecipe.objectives.preference import sigmoid

REFERENCE = torch.tensor([0.1, 0.8, 0.1], dtype=torch.float64)


def train(steps: int, beta: float = 0.1, lr: float = 0.5) -> list[tuple[float, torch.Tensor]]:
    """h and the probabilities before each step of gradient descent."""
    logits = REFERENCE.log().requires_grad_()
    seen = []
    for _ in range(steps):
        logps = logits.log_softmax(0)
        ratios = logps - REFERENCE.log()
        loss = sigmoid(ratios[:1], ratios[1:2], beta).sum()
        seen.append((float((ratios[0] - ratios[1]).detach()), logps.detach().exp()))
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - lr * gradient).detach().requires_grad_()
    return seen


def test_an_answer_nobody_compared_rises_by_half_before_it_falls() -> None:
    seen = train(3000)
    for h, probabilities in seen:
        d = h / 2
        assert float(probabilities[2]) == pytest.approx(0.1 / (0.1 * math.exp(d) + 0.8 * math.exp(-d) + 0.1), rel=1e-9)
    thirds = [float(probabilities[2]) for _, probabilities in seen]
    highest = thirds.index(max(thirds))
    assert thirds[0] == pytest.approx(0.1)
    assert thirds[highest] == pytest.approx(0.1502, abs=5e-5)
    assert seen[highest][0] == pytest.approx(math.log(8), abs=0.03)
    assert thirds[: highest + 1] == sorted(thirds[: highest + 1])
    assert thirds[highest:] == sorted(thirds[highest:], reverse=True)
    assert thirds[-1] < 0.1


def test_the_better_answer_overtakes_the_worse_one_where_the_third_is_highest() -> None:
    """At e^2d = 8 the first has 0.1 e^d = 0.8 e^-d of the second."""
    h, probabilities = min(train(3000), key=lambda one: abs(one[0] - math.log(8)))
    assert float(probabilities[0]) == pytest.approx(float(probabilities[1]), rel=0.05)
    assert h > 2
