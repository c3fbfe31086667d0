"""DPO as an objective: beside TRL's numbers, and however the step is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from litrecipe.config.groups import Dpo
from litrecipe.engine.statistics import with_statistics
from litrecipe.model.head import Predictions
from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.objectives import preference
from litrecipe.objectives.dpo import DPO, REF_LOGPS, make_dpo
from litrecipe.objectives.loss import add_up, metric_sums, quotients, step_loss

SETTINGS = {
    "sigmoid": Dpo(),
    "sigmoid_beta0.5": Dpo(beta=0.5),
    "cdpo_ls0.1": Dpo(label_smoothing=0.1),
    "hinge": Dpo(loss="hinge"),
    "ipo": Dpo(loss="ipo"),
    "robust_ls0.1": Dpo(loss="robust", label_smoothing=0.1),
    "exo_pair_ls1e-3": Dpo(loss="exo", label_smoothing=1e-3),
    "nca_pair": Dpo(loss="nca"),
    "sppo_hard": Dpo(loss="sppo"),
    "aot": Dpo(loss="aot"),
    "aot_pair": Dpo(loss="aot_unpaired"),
    "apo_zero": Dpo(loss="apo_zero"),
    "apo_down": Dpo(loss="apo_down"),
    "js_divergence": Dpo(divergence="js"),
    "alpha_divergence_0.5": Dpo(divergence="alpha", divergence_alpha=0.5),
    "rpo_alpha1.0": Dpo(nll_coef=1.0),
    "bco_pair 1.16": Dpo(loss="bco"),
    "discopop 1.16": Dpo(loss="discopop"),
    "sigmoid_norm 1.16": Dpo(loss="sigmoid_norm"),
    "forward_kl 1.16": Dpo(divergence="forward_kl"),
    "ld_alpha0.5 1.16": Dpo(ld_alpha=0.5),
    "mpo_sigmoid_bco_sft 1.16": Dpo(mix={"sigmoid": 0.8, "bco": 0.2}, nll_coef=1.0),
}
FREE = {
    "sigmoid_alpha1": Dpo(loss="cpo"),
    "simpo": Dpo(loss="simpo", beta=2.0, gamma=0.5),
    "simpo_cpo_alpha1": Dpo(loss="simpo", beta=2.0, gamma=0.5, nll_coef=1.0),
    "simpo_ls0.1": Dpo(loss="simpo", beta=2.0, gamma=0.5, label_smoothing=0.1),
}


def step(reference, config, cut):
    """Loss, gradient norm and metrics of one step on the four pairs, cut into rows of so many."""
    objective = make_dpo(config)
    samples = reference.samples if objective.needs_reference else reference.plain_samples
    rows = [make_row(samples[start : start + cut]) for start in range(0, len(samples), cut)]
    rows = list(with_statistics(rows, reference.policy, objective, 0, lambda value: [value]))
    counts = add_up([objective.counts(row) for row in rows])
    losses = [objective(reference.policy(row), row) for row in rows]
    total = torch.stack([step_loss(loss, counts) for loss in losses]).sum()
    return total.item(), reference.gradient_norm(total), quotients(metric_sums(losses))


@pytest.mark.parametrize("cut", [1, 3, 4])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_beside_trl(reference, name, cut):
    expected = reference.numbers["dpo"][name]
    loss, norm, metrics = step(reference, SETTINGS[name], cut)
    assert loss == pytest.approx(expected["loss"], rel=1e-5)
    assert norm == pytest.approx(expected["grad_norm"], rel=1e-4)
    rounding = 4e-7 if name.endswith("1.16") else 0.0  # sums near 30 in fp32, times β
    if name != "ipo":  # TRL 0.11 tells its rewards per token, 1.16 as sums
        for metric, value in metrics.items():
            assert value == pytest.approx(expected["metrics"][metric], rel=1e-5, abs=rounding), metric


@pytest.mark.parametrize("cut", [2, 4])
@pytest.mark.parametrize("name", list(FREE))
def test_without_a_reference_beside_trl(reference, name, cut):
    expected = reference.numbers["cpo"][name]
    loss, norm, metrics = step(reference, FREE[name], cut)
    assert loss == pytest.approx(expected["loss"], rel=1e-5)
    assert norm == pytest.approx(expected["grad_norm"], rel=1e-4)
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
        assert metrics[metric] == pytest.approx(expected["metrics"][metric], rel=1e-5), metric


def test_orpo_is_nll_of_the_answer_and_the_odds(reference):
    """As TRL's but for the NLL, which there runs over the prompt too."""
    theirs = reference.numbers["orpo"]["metrics"]
    loss, _, _ = step(reference, Dpo(loss="orpo"), 4)
    nll = reference.numbers["dpo"]["sigmoid"]["nll_chosen_mean"]
    assert loss == pytest.approx(nll - 0.1 * theirs["log_odds_ratio"], rel=1e-5)


def test_a_policy_that_is_its_reference_loses_log_2(reference):
    row = make_row(reference.plain_samples)
    predictions = reference.policy(row)
    same = predictions._replace(ref_logps=predictions.logps.detach())
    loss = DPO(Dpo())(same, row)
    assert float(loss.terms[0].sum.detach()) / 4 == pytest.approx(np.log(2), rel=1e-12)
    assert float(loss.metrics["rewards/margins"][0]) == 0


def test_the_empty_row_of_another_rank_adds_nothing(reference):
    row = make_row([])
    loss = DPO(Dpo(nll_coef=1.0))(reference.policy(row), row)
    total = sum(term.sum for term in loss.terms)
    assert float(total.detach()) == 0
    assert reference.gradient_norm(total) == 0
    assert DPO(Dpo(nll_coef=1.0)).counts(row) == {"sigmoid": 0, "nll": 0}


def test_a_loss_without_its_reference_is_a_mistake_of_ours(reference):
    row = make_row(reference.plain_samples)
    with pytest.raises(ValueError, match="needs a reference"):
        DPO(Dpo())(reference.policy(row), row)


def test_a_sample_without_two_answers_is_named(reference):
    prompt, chosen, _ = reference.plain_samples[0].segments
    row = make_row([Sample("f:3", (prompt, chosen))])
    with pytest.raises(ValueError, match="sample f:3: 1 answers, a pair has two"):
        DPO(Dpo()).counts(row)


def test_reference_log_probabilities_may_come_either_way(reference):
    row = make_row(reference.samples)
    predictions = reference.policy(row)
    inside = DPO(Dpo())(predictions, row)
    beside = DPO(Dpo())(Predictions(*predictions[:2], row.extra[REF_LOGPS]), make_row(reference.plain_samples))
    assert torch.equal(inside.terms[0].sum, beside.terms[0].sum)


class Given(torch.nn.Module):
    """Log-probabilities that are given, of pairs of one-token answers."""

    def __init__(self, chosen, rejected):
        super().__init__()
        self.logps = torch.nn.Parameter(torch.stack([torch.tensor(chosen), torch.tensor(rejected)], 1).double())

    def forward(self, row):
        places = [int(name) for name in row.sample_ids]
        return Predictions(self.logps[places].flatten(), torch.ones(2 * len(places), dtype=torch.bool))


CHOSEN, REJECTED = [-20.0, -35.0, -12.0, -28.0], [-25.0, -30.0, -22.0, -24.0]
REF_CHOSEN, REF_REJECTED = [-24.0, -30.0, -13.0, -33.0], [-21.0, -33.0, -20.0, -29.0]


def one_token_pairs():
    prompt = Segment(np.array([1]), np.zeros(1, np.float32))
    answers = [Segment(np.array([token]), np.ones(1, np.float32), parent=0) for token in (2, 3)]
    references = zip(REF_CHOSEN, REF_REJECTED, strict=True)
    return [
        Sample(str(n), (prompt, *answers), {REF_LOGPS: np.array(pair, dtype=np.float32)})
        for n, pair in enumerate(references)
    ]


@pytest.mark.parametrize("rows", [[[0, 1, 2, 3]], [[2], [0, 3], [1]], [[3, 2], [], [1, 0]]])
@pytest.mark.parametrize(("name", "expected"), [("aot", 0.66032186), ("aot_unpaired", 0.65907394)])
def test_sorting_losses_do_not_see_how_the_step_is_cut(name, expected, rows):
    """On pairs whose order matters: TRL's losses, and the gradient of the sorted loss over all pairs at once."""
    objective, model, samples = make_dpo(Dpo(loss=name)), Given(CHOSEN, REJECTED), one_token_pairs()
    cut = [make_row([samples[place] for place in row]) for row in rows]
    known = with_statistics(cut, model, objective, 0, lambda value: [value])
    total = sum(objective(model(row), row).terms[0].sum for row in known) / 4
    assert total.item() == pytest.approx(expected, rel=1e-7)
    total.backward()

    at_once = Given(CHOSEN, REJECTED)
    pc, pr = at_once.logps.unbind(1)
    rc, rr = (torch.tensor(values).double() for values in (REF_CHOSEN, REF_REJECTED))
    both = (pc - pr, rc - rr) if name == "aot" else (pc - rc, pr - rr)
    getattr(preference, name)(*both, 0.1).mean().backward()
    torch.testing.assert_close(model.logps.grad, at_once.logps.grad, rtol=1e-12, atol=0)


def test_ranks_share_their_statistics():
    """Two ranks with two pairs each get the partners that one rank with all four gets."""
    objective, model, samples = make_dpo(Dpo(loss="aot")), Given(CHOSEN, REJECTED), one_token_pairs()
    shares = [[make_row(samples[:1]), make_row(samples[1:2])], [make_row(samples[2:3]), make_row(samples[3:])]]
    told: list = []

    def tell(value):
        told.append(value)
        return [value]

    for share in shares:
        with_statistics(share, model, objective, 0, tell)
    both = [row for rank in (0, 1) for row in with_statistics(shares[rank], model, objective, rank, lambda _: told)]
    (alone,) = with_statistics([make_row(samples)], model, objective, 0, lambda value: [value])
    for name in ("partner", "chosen_partner", "rejected_partner"):
        assert torch.cat([row.extra[name] for row in both]).tolist() == alone.extra[name].tolist()
