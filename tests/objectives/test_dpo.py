"""DPO as an objective: beside TRL's numbers, and however the step is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import Table, ranked, rows_of, step

from litrecipe.config.groups import Dpo
from litrecipe.engine.statistics import with_statistics
from litrecipe.model.head import Predictions
from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.objectives import preference
from litrecipe.objectives.dpo import DPO, REF_LOGPS, make_dpo

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
    "wpo 1.16": Dpo(weighting=True),
    "mpo_sigmoid_bco_sft 1.16": Dpo(mix={"sigmoid": 0.8, "bco": 0.2}, nll_coef=1.0),
}
FREE = {
    "sigmoid_alpha1": Dpo(loss="cpo"),
    "simpo": Dpo(loss="simpo", beta=2.0, gamma=0.5),
    "simpo_cpo_alpha1": Dpo(loss="simpo", beta=2.0, gamma=0.5, nll_coef=1.0),
    "simpo_ls0.1": Dpo(loss="simpo", beta=2.0, gamma=0.5, label_smoothing=0.1),
}


def step_of_four(reference, config, size):
    """Loss, gradient norm and metrics of one step on the four pairs, cut into rows of so many."""
    objective = make_dpo(config)
    samples = reference.samples if objective.needs_reference else reference.plain_samples
    rows = [make_row(samples[start : start + size]) for start in range(0, len(samples), size)]
    loss, gradient, metrics = step(objective, reference.policy, rows)
    return loss, float(torch.nn.utils.get_total_norm(gradient)), metrics


@pytest.mark.parametrize("cut", [1, 3, 4])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_beside_trl(reference, name, cut):
    expected = reference.numbers["dpo"][name]
    loss, norm, metrics = step_of_four(reference, SETTINGS[name], cut)
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
    loss, norm, metrics = step_of_four(reference, FREE[name], cut)
    assert loss == pytest.approx(expected["loss"], rel=1e-5)
    assert norm == pytest.approx(expected["grad_norm"], rel=1e-4)
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
        assert metrics[metric] == pytest.approx(expected["metrics"][metric], rel=1e-5), metric


def test_orpo_is_nll_of_the_answer_and_the_odds(reference):
    """As TRL's but for the NLL, which there runs over the prompt too."""
    theirs = reference.numbers["orpo"]["metrics"]
    loss, _, _ = step_of_four(reference, Dpo(loss="orpo"), 4)
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
        DPO(Dpo())(reference.policy(row), row)


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
    known = with_statistics(cut, cut, model, objective, 0, lambda value: [value])
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
        with_statistics(share, share, model, objective, 0, tell)
    both = [
        row
        for rank in (0, 1)
        for row in with_statistics(shares[rank], shares[rank], model, objective, rank, lambda _: told)
    ]
    (alone,) = with_statistics([make_row(samples)], [make_row(samples)], model, objective, 0, lambda value: [value])
    for name in ("partner", "chosen_partner", "rejected_partner"):
        assert torch.cat([row.extra[name] for row in both]).tolist() == alone.extra[name].tolist()


def test_more_than_two_answers_have_no_partners_in_a_sort():
    objective = make_dpo(Dpo(loss="aot"))
    row = make_row([ranked("f:2", [[2], [3], [4]], ref_logps=[0, 0, 0])])
    with pytest.raises(ValueError, match="sample f:2: 3 answers, aot takes two"):
        objective.statistics(Table([0.0] * 5)(row), row)


LOGPS = [0.0, 0.0, -1.0, -2.0, -0.5, -3.0, -1.5, -0.25]
REF = [0.0, 0.0, -1.25, -1.0, -0.75, -2.5, -2.0, -0.5]


def nls(x):
    """-log σ(x)."""
    return math.log1p(math.exp(-x))


def test_a_ranked_list_weighs_as_much_as_a_pair():
    """Log-ratios of tokens 2, 3, 4: ¼, -1, ¼; of 5, 6: -½, ½. With β = 1 the list's pairs have h = 5/4, 0, -5/4, the
    pair h = -1; the loss is the mean of the list's mean and the pair's."""
    samples = [ranked("list", [[2], [3], [4]]), ranked("pair", [[5], [6]])]
    ratios = {token: LOGPS[token] - REF[token] for token in range(2, 7)}
    assert list(ratios.values()) == [0.25, -1.0, 0.25, -0.5, 0.5]
    expected = ((nls(1.25) + nls(0) + nls(-1.25)) / 3 + nls(-1.0)) / 2
    for rows in (rows_of(samples), rows_of(samples, 1), rows_of(samples[::-1], 0, 1)):
        loss, _, metrics = step(make_dpo(Dpo(beta=1.0)), Table(LOGPS, REF), rows)
        assert loss == pytest.approx(expected, rel=1e-12)
        assert metrics["rewards/chosen"] == pytest.approx(((0.25 + 0.25 - 1) / 3 - 0.5) / 2, rel=1e-12)
        assert metrics["rewards/accuracies"] == pytest.approx((1 / 3 + 0) / 2, rel=1e-12)
        assert metrics["logps/rejected"] == pytest.approx(((-2 - 0.5 - 0.5) / 3 - 1.5) / 2, rel=1e-12)


def test_answers_of_equal_score_are_not_compared():
    """Of scores (2, 1, 1) the pairs with h = 5/4 and 0 are left."""
    row = make_row([ranked("list", [[2], [3], [4]], scores=[2, 1, 1])])
    loss, _, _ = step(make_dpo(Dpo(beta=1.0)), Table(LOGPS, REF), [row])
    assert loss == pytest.approx((nls(1.25) + nls(0)) / 2, rel=1e-12)


def test_the_nll_of_a_ranked_list_is_that_of_its_best_answer():
    """Best answers (2, 3) and (5): the mean over three tokens, (1 + 2 + 3) / 3."""
    samples = [ranked("list", [[2, 3], [3], [4]]), ranked("pair", [[5], [6]])]
    objective = make_dpo(Dpo(nll_coef=10.0, ld_alpha=0.0))
    plain = step(make_dpo(Dpo(ld_alpha=0.0)), Table(LOGPS, REF), rows_of(samples))[0]
    assert step(objective, Table(LOGPS, REF), rows_of(samples, 1))[0] == pytest.approx(plain + 10 * 2, rel=1e-12)


@pytest.mark.parametrize(("loss", "per_token"), [("sigmoid", 1), ("sigmoid_norm", 2)])
def test_doubts_are_learnt_as_probabilities(loss, per_token):
    """Two pairs with h = 2 (per token 1) and β = .5, whose worse answers are the better ones with .1 and .4: DNO's
    -(1 - ε) log σ(x) - ε log σ(-x), however the step is cut. Where x is log (1 - ε) / ε it teaches nothing."""
    samples = [
        ranked(name, [[2, 2], [3, 3]], ref_logps=[-1, -1, -1, -1], doubt=[doubt])
        for name, doubt in (("a", 0.1), ("b", 0.4))
    ]
    model, x = Table([0, 0, -0.5, -1.5, 0]), 0.5 * 2 / per_token
    wanted = [
        -(1 - doubt) * math.log(1 / (1 + math.exp(-x))) - doubt * math.log(1 / (1 + math.exp(x)))
        for doubt in (0.1, 0.4)
    ]
    for rows in (rows_of(samples), rows_of(samples, 1), [*rows_of(samples), make_row([])]):
        loss_of_step = step(make_dpo(Dpo(loss=loss, beta=0.5)), model, rows)[0]
        assert loss_of_step == pytest.approx(sum(wanted) / 2, rel=1e-6)
    at_rest = [ranked("c", [[2, 2], [3, 3]], ref_logps=[-1] * 4, doubt=[1 / (1 + math.exp(x))])]
    _, (gradient,), _ = step(make_dpo(Dpo(loss=loss, beta=0.5)), model, rows_of(at_rest))
    assert gradient.abs().max() < 1e-7


def test_format_tokens_are_left_to_the_nll():
    """Format token 3: of (2, 3) and (4, 4, 3) the preference sees (2) and (4, 4), with log-ratios ¼ and ½, means ¼ and
    ¼; the NLL sees (1 + 2) / 2."""
    row = make_row([ranked("a", [[2, 3], [4, 4, 3]])])
    model = Table(LOGPS, REF)
    masked = make_dpo(Dpo(beta=1.0, mask_format_tokens=True, nll_coef=10.0), format_ids=[3, 9])
    loss, (gradient,), metrics = step(masked, model, [row])
    assert loss == pytest.approx(nls(-0.25) + 10 * 1.5, rel=1e-12)
    assert metrics["logps/chosen"] == -1.0
    assert metrics["logps/rejected"] == -1.0
    assert gradient[3] == -10 / 2  # of the NLL alone
    plain = make_dpo(Dpo(beta=1.0, nll_coef=10.0), format_ids=[3, 9])
    assert step(plain, model, [row])[2]["logps/chosen"] == -3.0
    per_token = make_dpo(Dpo(loss="sigmoid_norm", beta=1.0, mask_format_tokens=True), format_ids=[3])
    assert step(per_token, model, [row])[0] == pytest.approx(nls(0.0), rel=1e-12)


def test_the_shorter_answer_is_counted_without_format_tokens():
    """Of (3, 2) and (4, 4) the chosen one has one token that counts, so with α = 0 the rejected one keeps one."""
    row = make_row([ranked("a", [[3, 2], [4, 4]])])
    objective = make_dpo(Dpo(beta=1.0, mask_format_tokens=True, ld_alpha=0.0), format_ids=[3])
    assert step(objective, Table(LOGPS, REF), [row])[0] == pytest.approx(nls(0.25 - 0.25), rel=1e-12)


def test_an_answer_of_format_tokens_alone_says_nothing():
    row = make_row([ranked("a", [[3], [4]])])
    objective = make_dpo(Dpo(loss="sigmoid_norm", beta=1.0, mask_format_tokens=True), format_ids=[3])
    assert step(objective, Table(LOGPS, REF), [row])[0] == pytest.approx(nls(-0.25), rel=1e-12)


@pytest.mark.parametrize("format_ids", [(), (4,)])
def test_likely_pairs_weigh_more(format_ids):
    """log π - log Σ π² of tokens 2, 3, 5: 1, -1, ½. Answers (2, 3) and (5): w_w w_l = exp((1 - 1) / 2) exp(½), which
    the tokens of the second sample, 6 with -2 and 7 with ½, make exp(-3/2). Format tokens weigh nothing."""
    log_collisions = [0.0, 0.0, -2.0, -1.0, 5.0, -3.5, 0.5, -0.75]
    samples = [ranked("a", [[2, 3, *format_ids], [5]]), ranked("b", [[6], [7]])]
    objective = make_dpo(Dpo(beta=1.0, weighting=True, mask_format_tokens=True), format_ids)
    assert objective.needs_collisions
    model = Table(LOGPS, REF, log_collisions)
    loss, (gradient,), metrics = step(objective, model, rows_of(samples, 1))
    h = [(0.25 - 1) - (-0.5), 0.5 - 0.25]
    weights = [math.exp(0.5), math.exp(-1.5)]
    assert loss == pytest.approx((weights[0] * nls(h[0]) + weights[1] * nls(h[1])) / 2, rel=1e-12)
    slopes = [-w / (1 + math.exp(x)) / 2 for w, x in zip(weights, h, strict=True)]  # none through the weights
    assert gradient.tolist() == pytest.approx([0, 0, slopes[0], slopes[0], 0, -slopes[0], slopes[1], -slopes[1]])
    assert metrics["rewards/margins"] == pytest.approx(sum(h) / 2, rel=1e-12)


def test_weights_without_what_they_are_made_of_are_a_mistake_of_ours():
    row = make_row([ranked("a", [[2], [3]])])
    assert not make_dpo(Dpo()).needs_collisions
    with pytest.raises(ValueError, match="log_collisions"):
        make_dpo(Dpo(weighting=True))(Table(LOGPS, REF)(row), row)


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo"])
def test_losses_without_a_reference_do_not_see_that_of_others(name):
    """In a mix, and where the row happens to hold one."""
    config = Dpo(loss=name, nll_coef=0.0)
    model, rows = Table(LOGPS, REF), rows_of([ranked("a", [[2, 3], [4]], ref_logps=[-9, -9, -9])])
    free = step(make_dpo(config), Table(LOGPS), rows_of([ranked("a", [[2, 3], [4]])]))
    assert step(make_dpo(config), model, rows)[::2] == free[::2]
    mixed = step(make_dpo(Dpo(mix={name: 0.5, "sigmoid": 2.0}, nll_coef=0.0)), model, rows)[0]
    assert mixed == pytest.approx(0.5 * free[0] + 2 * step(make_dpo(Dpo()), model, rows)[0], rel=1e-12)


ANSWER = st.lists(st.integers(2, 7), min_size=1, max_size=4)
LISTS = st.lists(st.lists(ANSWER, min_size=2, max_size=4), min_size=1, max_size=5)
CONFIGS = [
    Dpo(),
    Dpo(nll_coef=0.5, ld_alpha=0.3),
    Dpo(weighting=True, mask_format_tokens=True),
    Dpo(loss="simpo", label_smoothing=0.1),
    Dpo(mix={"ipo": 0.5, "apo_zero": 1.0, "orpo": 0.1}),
]


@settings(deadline=None)
@given(LISTS, st.sampled_from(CONFIGS), st.randoms(), st.data())
def test_neither_the_cut_nor_the_order_of_a_step_changes_anything(lists, config, random, data):
    model, objective = Table(LOGPS, REF, [-1.0] * 8), make_dpo(config, format_ids=[6])
    samples = [ranked(str(n), answers) for n, answers in enumerate(lists)]
    expected = step(objective, model, rows_of(samples))
    random.shuffle(samples)
    sizes = data.draw(st.lists(st.integers(0, len(samples)), max_size=3))
    loss, (gradient,), metrics = step(objective, model, rows_of(samples, *sizes))
    assert loss == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(gradient, expected[1][0], rtol=1e-10, atol=1e-12)
    assert metrics == pytest.approx(expected[2], rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("config", CONFIGS[:2] + CONFIGS[3:])
def test_gradients_of_ranked_lists(config):
    """A weighted pair has no such gradient: what multiplies it is held fast."""
    model, objective = Table(LOGPS, REF), make_dpo(config)
    rows = rows_of([ranked("a", [[2, 3, 5], [4], [5, 6]]), ranked("b", [[7], [2, 4]])], 1)

    def loss(logps):
        predictions = [Predictions(logps[row.target], row.target > 0, model.ref[row.target]) for row in rows]
        terms = [t for p, row in zip(predictions, rows, strict=True) for t in objective(p, row).terms]
        return sum(term.weight * term.sum for term in terms)

    assert torch.autograd.gradcheck(loss, (torch.tensor(LOGPS).double().requires_grad_(),))
