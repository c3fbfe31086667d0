"""KTO as an objective: beside TRL's numbers, by hand, and however the step is cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import Table, alone, ranked, rows_of, step

from litrecipe.config.groups import Dpo
from litrecipe.engine.statistics import with_statistics
from litrecipe.model.head import Predictions
from litrecipe.model.reference import PolicyAndReference
from litrecipe.model.row import make_row
from litrecipe.objectives.dpo import make_dpo
from litrecipe.objectives.kto import KTO
from litrecipe.objectives.loss import StepGlobal


def logistic(x):
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def rated(reference):
    """TRL's four rated answers, and the policy beside its reference."""
    batch = reference.numbers["inputs"]["kto_batch"]
    samples = []
    for n, (ids, labels, good) in enumerate(
        zip(batch["completion_input_ids"], batch["completion_labels"], batch["label"], strict=True)
    ):
        answer = [token for token in labels if token >= 0]
        prompt = [token for token, label in zip(ids, labels, strict=True) if label < 0 and token != 0]
        samples.append(ranked(str(n), [answer], prompt, label=[good]))
    return samples, PolicyAndReference(reference.policy, reference.frozen)


@pytest.mark.parametrize("sizes", [(), (1, 1, 1), (3,), (0, 2)])
@pytest.mark.parametrize(("name", "config"), [("kto", {}), ("kto_weights", {"desirable_weight": 1.33})])
def test_beside_trl(reference, rated, name, config, sizes):
    """TRL gives each prompt the answer before its own, ours the one behind it: the step is turned around."""
    expected = reference.numbers["kto"][name]
    samples, model = rated[0][::-1], rated[1]
    objective = make_dpo(Dpo(loss="kto", undesirable_weight=0.7 if config else 1.0, **config))
    looked_at = rows_of(objective.statistics_samples(samples), 1)
    trained = list(model.policy.parameters())
    loss, gradient, metrics = step(objective, model, rows_of(samples, *sizes), looked_at, trained)
    assert loss == pytest.approx(expected["loss"], rel=1e-5)
    assert float(torch.nn.utils.get_total_norm(gradient)) == pytest.approx(expected["grad_norm"], rel=1e-4)
    theirs = expected["metrics"]
    assert metrics["kl"] == pytest.approx(theirs["kl"], rel=1e-5)
    for side in ("chosen", "rejected"):
        for metric in (f"rewards/{side}", f"logps/{side}"):
            mean = theirs[f"{metric}_sum"] / theirs[f"count/{side}"]
            assert metrics[metric] == pytest.approx(mean, rel=1e-5), metric
    margin = (theirs["rewards/chosen_sum"] - theirs["rewards/rejected_sum"]) / 2
    assert metrics["rewards/margins"] == pytest.approx(margin, rel=1e-5)


def test_mismatched_log_probabilities_beside_trl(reference, rated):
    expected = reference.numbers["kto"]["kto"]
    objective = make_dpo(Dpo(loss="kto"))
    row = make_row(objective.statistics_samples(rated[0][::-1]))
    theirs = [p - r for p, r in zip(expected["policy_KL_logps"], expected["ref_KL_logps"], strict=True)]
    ours = objective.statistics(rated[1](row), row)["ratio"]
    assert ours.tolist() == pytest.approx(theirs[::-1], rel=1e-5, abs=1e-6)  # differences of numbers near 30


LOGPS = [0.0, 0.0, -1.0, -2.0, -0.5, -3.0]
REF = [0.0, 0.0, -1.5, -1.5, -0.75, -2.75]


def test_each_prompt_gets_the_answers_of_the_next_sample():
    samples = [ranked("a", [[2], [3, 3]], [10, 11]), ranked("b", [[4]], [12]), ranked("c", [[5]], [13])]
    found = KTO(Dpo(loss="kto")).statistics_samples(samples)
    assert [[segment.tokens.tolist() for segment in sample.segments] for sample in found] == [
        [[10, 11], [4]],
        [[12], [5]],
        [[13], [2], [3, 3]],
    ]
    assert all(segment.parent == 0 for sample in found for segment in sample.segments[1:])
    assert [sample.id for sample in found] == ["a", "b", "c"]
    assert not KTO(Dpo(loss="kto")).statistics_samples(samples[:1])


def test_of_several_answers_the_first_is_good():
    """Log-ratios ½ | -½, ¼ | and ½ | -¼: z = (½ - ½ + ¼ + ½ - ¼) / 5 = 0.1. With β = 2, λ_D = 3 and λ_U = 4 the loss
    is the mean over five answers of 3 σ(-2 (½ - z)) twice, 4 σ(-2 (z + ½)), 4 σ(-2 (z - ¼)) and 4 σ(-2 (z + ¼))."""
    objective = make_dpo(Dpo(loss="kto", beta=2.0, desirable_weight=3.0, undesirable_weight=4.0))
    samples = [ranked("a", [[2], [3], [4]]), ranked("b", [[2], [5]])]
    looked_at = rows_of(objective.statistics_samples(samples))
    loss, _, metrics = step(objective, Table(LOGPS, REF), rows_of(samples), looked_at)
    good, bad = 3 * logistic(-2 * 0.4), [4 * logistic(-2 * x) for x in (0.6, -0.15, 0.35)]
    assert loss == pytest.approx((2 * good + sum(bad)) / 5, rel=1e-12)
    assert metrics["kl"] == pytest.approx(0.1, rel=1e-12)
    assert metrics["rewards/chosen"] == pytest.approx(2 * 0.5, rel=1e-12)
    assert metrics["rewards/rejected"] == pytest.approx(2 * (-0.5 + 0.25 - 0.25) / 3, rel=1e-12)
    assert metrics["logps/rejected"] == pytest.approx((-2 - 0.5 - 3) / 3, rel=1e-12)


def test_z_is_not_negative_and_a_single_sample_has_none():
    objective, model = make_dpo(Dpo(loss="kto", beta=1.0)), Table(LOGPS, REF)
    samples = [ranked("a", [[3]], label=[1]), ranked("b", [[5]], label=[0])]
    for chosen in (samples, samples[:1]):
        looked_at = rows_of(objective.statistics_samples(chosen))
        loss, _, metrics = step(objective, model, rows_of(chosen), looked_at)
        losses = [logistic(0.5), logistic(-0.25)][: len(chosen)]
        assert metrics["kl"] == 0
        assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_a_side_without_answers_is_not_told():
    objective, samples = make_dpo(Dpo(loss="kto")), [ranked("a", [[3]], label=[1])]
    _, _, metrics = step(objective, Table(LOGPS, REF), rows_of(samples), [make_row([])])
    assert metrics.keys() == {"kl", "rewards/chosen", "logps/chosen"}


def test_z_has_no_gradient():
    """Of a good answer to r = ½ with z = ½: d/dr (1 - σ(r - z)) = -¼, and none towards the other token."""
    objective, model = make_dpo(Dpo(loss="kto", beta=1.0)), Table(LOGPS, REF)
    row = make_row([ranked("a", [[2]], label=[1])])
    looked_at = [make_row([ranked("b", [[2]])])]
    _, (gradient,), _ = step(objective, model, [row], looked_at)
    assert gradient.tolist() == pytest.approx([0, 0, -0.25, 0, 0, 0])


def test_empty_rows_add_nothing():
    objective, model = make_dpo(Dpo(loss="kto")), Table(LOGPS, REF)
    samples = [ranked("a", [[2]], label=[1]), ranked("b", [[5]], label=[0])]
    looked_at = objective.statistics_samples(samples)
    whole = step(objective, model, rows_of(samples), rows_of(looked_at))
    padded = step(objective, model, rows_of(samples, 0, 1, 0), rows_of(looked_at, 0))
    assert padded[0] == pytest.approx(whole[0], rel=1e-12)
    assert padded[2] == pytest.approx(whole[2], rel=1e-12)


def test_a_reference_that_lies_in_the_row_is_taken():
    objective, model = make_dpo(Dpo(loss="kto")), Table(LOGPS, REF)
    beside, inside = (
        with_statistics([make_row([sample])], [make_row([])], model, objective, 0, alone)[0]
        for sample in (ranked("a", [[2, 5]], label=[1]), ranked("a", [[2, 5]], label=[1], ref_logps=[-1.5, -2.75]))
    )
    with_ref = objective(model(beside), beside)
    assert torch.equal(with_ref.terms[0].sum, objective(Table(LOGPS)(inside), inside).terms[0].sum)
    with pytest.raises(ValueError, match="needs a reference"):
        objective.statistics(Table(LOGPS)(beside), beside)


def test_kto_is_never_one_of_several():
    assert isinstance(make_dpo(Dpo(mix={"kto": 1.0})), KTO)
    assert isinstance(make_dpo(Dpo(loss="kto")), StepGlobal)
    with pytest.raises(ValueError, match="kto"):
        make_dpo(Dpo(mix={"kto": 0.5, "sigmoid": 0.5}))


ANSWERS = st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=3), min_size=1, max_size=3)


@settings(deadline=None)
@given(st.lists(ANSWERS, min_size=1, max_size=5), st.data())
def test_neither_the_cut_of_a_step_nor_where_it_begins_changes_anything(lists, data):
    """Rows of the step and rows that are looked at are cut independently; turning the step round keeps neighbours."""
    objective, model = make_dpo(Dpo(loss="kto", beta=0.7, desirable_weight=1.3)), Table(LOGPS, REF)
    samples = [ranked(str(n), answers) for n, answers in enumerate(lists)]
    expected = step(objective, model, rows_of(samples), rows_of(objective.statistics_samples(samples)))
    first = data.draw(st.integers(0, len(samples) - 1))
    turned = samples[first:] + samples[:first]
    sizes = st.lists(st.integers(0, len(samples)), max_size=3)
    looked_at = rows_of(objective.statistics_samples(turned), *data.draw(sizes))
    loss, (gradient,), metrics = step(objective, model, rows_of(turned, *data.draw(sizes)), looked_at)
    assert loss == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(gradient, expected[1][0], rtol=1e-10, atol=1e-12)
    assert metrics == pytest.approx(expected[2], rel=1e-10, abs=1e-12)


def test_gradients():
    objective, model = make_dpo(Dpo(loss="kto", beta=0.7, undesirable_weight=1.3)), Table(LOGPS, REF)
    samples = [ranked("a", [[2, 3], [4]]), ranked("b", [[5], [2, 2]])]
    looked_at = rows_of(objective.statistics_samples(samples))
    (row,) = with_statistics(rows_of(samples), looked_at, model, objective, 0, alone)

    def loss(logps):
        return objective(Predictions(logps[row.target], row.target > 0, model.ref[row.target]), row).terms[0].sum

    assert torch.autograd.gradcheck(loss, (torch.tensor(LOGPS).double().requires_grad_(),))
