"""Scaling laws against numbers computed by others, and against a search."""

import numpy as np
import pytest

from litrecipe.objectives.scaling import CHINCHILLA, REPLICATION


@pytest.mark.parametrize(
    ("law", "parameters", "tokens_each"),
    [(REPLICATION, 70e9, 18.4), (REPLICATION, 135e6, 25.1), (CHINCHILLA, 70e9, 109)],
)
def test_tokens_a_parameter_are_those_of_the_papers(law, parameters, tokens_each):
    assert law.best_tokens(parameters) / parameters == pytest.approx(tokens_each, rel=0.01)


@pytest.mark.parametrize("law", [REPLICATION, CHINCHILLA])
def test_the_best_model_of_a_budget_has_the_least_loss_of_all_sizes(law):
    """A / N^α + B / D^β, of which E is left out: it is the same for all."""
    compute = 1e21
    sizes = np.geomspace(1e7, 1e12, 200001)
    losses = law.a / sizes**law.alpha + law.b / (compute / 6 / sizes) ** law.beta
    found = sizes[np.argmin(losses)]
    assert law.best_parameters(compute) == pytest.approx(found, rel=1e-3)
    best = law.best_parameters(compute)
    assert law.best_tokens(best) == pytest.approx(compute / 6 / best)
