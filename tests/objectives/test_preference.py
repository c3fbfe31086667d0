"""Losses of preference learning: by hand, beside another implementation's numbers, and what must not change them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litrecipe.objectives import preference

A, B = torch.tensor([2.0], dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64)


def softplus(x):
    """ℓ(-x) = log(1 + eˣ)."""
    return math.log1p(math.exp(x))


def logistic(x):
    return 1 / (1 + math.exp(-x))


BY_HAND = {
    "sigmoid": (preference.sigmoid(A, B, 0.5), softplus(-1.5)),
    "cdpo": (preference.sigmoid(A, B, 0.5, 0.1), 0.9 * softplus(-1.5) + 0.1 * softplus(1.5)),
    "robust": (preference.robust(A, B, 0.5, 0.1), (0.9 * softplus(-1.5) - 0.1 * softplus(1.5)) / 0.8),
    "hinge, beyond the margin": (preference.hinge(A, B, 0.5), 0.0),
    "hinge, within it": (preference.hinge(A, B, 0.1), 0.7),
    "ipo": (preference.ipo(A, B, 0.5), (3 - 1) ** 2),
    "exo": (
        preference.exo(A, B, 0.5, 0.1),
        logistic(1.5) * math.log(logistic(1.5) / 0.9) + logistic(-1.5) * math.log(logistic(-1.5) / 0.1),
    ),
    "nca": (preference.nca(A, B, 0.5), softplus(-1) + softplus(1) / 2 + softplus(-0.5) / 2),
    "sppo": (preference.sppo(A, B, 0.25), (2 - 2) ** 2 + (-1 + 2) ** 2),
    "bco": (preference.bco(A, B, 0.5, 0.25), softplus(-0.75) + softplus(-0.75)),
    "apo_zero": (preference.apo_zero(A, B, 0.5), 1 - logistic(1) + logistic(-0.5)),
    "apo_down": (preference.apo_down(A, B, 0.5), logistic(1) + 1 - logistic(1.5)),
    "discopop": (
        preference.discopop(A, B, 0.02, 0.05),
        (1 - logistic(1.2)) * softplus(-0.06) + logistic(1.2) * math.exp(-0.06),
    ),
    "simpo": (preference.simpo(A, B, 0.5, 0.3), softplus(-1.2)),
    "orpo": (
        preference.orpo(torch.tensor([0.5]).double().log(), torch.tensor([1.0]).double().div(5).log()),
        math.log(1 + 0.25),  # odds 1 and ¼: ℓ(log 4) = log(1 + ¼)
    ),
    "bradley_terry": (preference.bradley_terry(A, B, margin=1.0), softplus(-2)),
    "bradley_terry, soft": (
        preference.bradley_terry(A, B, smoothing=torch.tensor([0.25]).double()),
        0.75 * softplus(-3) + 0.25 * softplus(3),
    ),
    "centering": (preference.centering(A, B), 1.0),
    "forward_kl": (preference.through(A, "forward_kl") - preference.through(B, "forward_kl"), math.e - math.exp(-2)),
    "js": (preference.through(A, "js"), math.log(2 * math.exp(2) / (1 + math.exp(2)))),
    "alpha": (preference.through(A, "alpha", 0.25), (1 - math.exp(-0.5)) / 0.25),
}


@pytest.mark.parametrize("name", list(BY_HAND))
def test_by_hand(name):
    """One pair with a = 2 and b = -1, so h = 3; ℓ(x) = log(1 + e⁻ˣ), σ(x) = 1 / (1 + e⁻ˣ)."""
    found, expected = BY_HAND[name]
    assert found.tolist() == pytest.approx([expected], rel=1e-12)


def test_kto_by_hand():
    """r = (1, 1), z = 0.5, β = 2: desirable 3 (1 - σ(1)), undesirable 4 (1 - σ(-1)) = 4 σ(1)."""
    ratio, desirable = torch.tensor([1.0, 1.0]).double(), torch.tensor([True, False])
    found = preference.kto(ratio, desirable, 0.5, beta=2.0, weights=(3.0, 4.0))
    assert found.tolist() == pytest.approx([3 * logistic(-1), 4 * logistic(1)], rel=1e-12)


def test_aot_sorts_what_it_is_given():
    """Policy margins (3, 1) and reference margins (0, 2): sorted differences (1 - 0, 3 - 2), unsorted (3, -1)."""
    policy, reference = torch.tensor([3.0, 1.0]).double(), torch.tensor([0.0, 2.0]).double()
    assert preference.aot(policy, reference, 1.0).tolist() == pytest.approx([softplus(-1)] * 2)
    assert preference.aot_unpaired(policy, reference, 1.0).tolist() == pytest.approx([softplus(-1)] * 2)


CHOSEN, REJECTED = torch.tensor([-20.0, -35, -12, -28]).double(), torch.tensor([-25.0, -30, -22, -24]).double()
REF_CHOSEN, REF_REJECTED = torch.tensor([-24.0, -30, -13, -33]).double(), torch.tensor([-21.0, -33, -20, -29]).double()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", 0.69742594),
        ("aot", 0.66032186),
        ("aot_unpaired", 0.65907394),
        ("js", 0.69605127),
        ("alpha 0.3", 0.78024059),
        ("alpha 0.5", 0.97180549),
    ],
)
def test_rows_on_which_the_losses_part(name, expected):
    """Means over four pairs at β = 0.1, computed by TRL in float64 (its `alpha` is 1 - ours)."""
    a, b = CHOSEN - REF_CHOSEN, REJECTED - REF_REJECTED
    kind, _, alpha = name.partition(" ")
    if kind == "aot":
        losses = preference.aot(CHOSEN - REJECTED, REF_CHOSEN - REF_REJECTED, 0.1)
    elif kind == "aot_unpaired":
        losses = preference.aot_unpaired(a, b, 0.1)
    else:
        divergence = "reverse_kl" if kind == "sigmoid" else kind
        losses = preference.sigmoid(*(preference.through(r, divergence, float(alpha or 0)) for r in (a, b)), 0.1)
    assert losses.mean().item() == pytest.approx(expected, rel=1e-7)


PAIRWISE = {
    "sigmoid": lambda a, b: preference.sigmoid(a, b, 0.3, 0.1),
    "robust": lambda a, b: preference.robust(a, b, 0.3, 0.1),
    "hinge": lambda a, b: preference.hinge(a, b, 0.3),
    "ipo": lambda a, b: preference.ipo(a, b, 0.3),
    "exo": lambda a, b: preference.exo(a, b, 0.3, 0.01),
    "nca": lambda a, b: preference.nca(a, b, 0.3),
    "sppo": lambda a, b: preference.sppo(a, b, 0.3),
    "bco": lambda a, b: preference.bco(a, b, 0.3, 0.1),
    "apo_zero": lambda a, b: preference.apo_zero(a, b, 0.3),
    "apo_down": lambda a, b: preference.apo_down(a, b, 0.3),
    "discopop": lambda a, b: preference.discopop(a, b, 0.3),
    "simpo": lambda a, b: preference.simpo(a, b, 0.3, 0.2),
    "orpo": lambda a, b: preference.orpo(-a.exp(), -b.exp()),
    "bradley_terry": lambda a, b: preference.bradley_terry(a, b, 0.2),
    "centering": preference.centering,
    "forward_kl": lambda a, b: preference.sigmoid(*(preference.through(r, "forward_kl") for r in (a, b)), 0.3),
    "js": lambda a, b: preference.sigmoid(*(preference.through(r, "js") for r in (a, b)), 0.3),
    "alpha": lambda a, b: preference.sigmoid(*(preference.through(r, "alpha", 0.3) for r in (a, b)), 0.3),
}


@pytest.mark.parametrize("name", list(PAIRWISE))
def test_gradients(name):
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([0.4, -1.2, 2.0], [0.1, 0.5, -0.7]))
    assert torch.autograd.gradcheck(PAIRWISE[name], (a, b))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=1, max_size=6), st.randoms())
def test_the_order_of_the_pairs_and_the_cut_of_the_step_change_nothing(pairs, random):
    """To rounding: torch's vectorised exp and its scalar one for the rest of a tensor differ in the last bit."""
    order = list(range(len(pairs)))
    random.shuffle(order)
    a, b = (torch.tensor(side).double() for side in zip(*pairs, strict=True))
    for loss in PAIRWISE.values():
        whole = loss(a, b)
        torch.testing.assert_close(loss(a[order], b[order]), whole[order], rtol=1e-12, atol=1e-14)
        cut = torch.cat([loss(x, y) for x, y in zip(a.split(1), b.split(1), strict=True)])
        torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-14)
    total = preference.aot_unpaired(a, b, 0.1).sum()
    assert float(preference.aot_unpaired(a[order], b.flip(0), 0.1).sum()) == pytest.approx(float(total))


@pytest.mark.parametrize("name", [name for name in PAIRWISE if name != "orpo"])  # which takes means, not sums
def test_far_apart_pairs_stay_finite_in_fp32(name):
    a, b = torch.tensor([900.0, -900.0], requires_grad=True), torch.tensor([-900.0, 900.0], requires_grad=True)
    loss = PAIRWISE[name](a, b)
    loss.sum().backward()
    assert loss.isfinite().all() and a.grad.isfinite().all() and b.grad.isfinite().all()


def per_token(loss, *settings):
    def mean_loss(pc, pr, rc, rr, nc, nr):
        return loss((pc - rc) / nc, (pr - rr) / nr, *settings)

    return mean_loss


def summed(loss, *settings):
    def sum_loss(pc, pr, rc, rr, nc, nr):
        return loss(pc - rc, pr - rr, *settings)

    return sum_loss


def diverging(kind, alpha=0.5):
    return summed(lambda a, b: preference.sigmoid(*(preference.through(r, kind, alpha) for r in (a, b)), 0.1))


def free(loss, *settings):
    def without_reference(pc, pr, rc, rr, nc, nr):
        return loss(pc, pr, *settings)

    return without_reference


DPO = {
    "sigmoid": summed(preference.sigmoid, 0.1),
    "sigmoid_beta0.5": summed(preference.sigmoid, 0.5),
    "cdpo_ls0.1": summed(preference.sigmoid, 0.1, 0.1),
    "hinge": summed(preference.hinge, 0.1),
    "ipo": per_token(preference.ipo, 0.1),
    "robust_ls0.1": summed(preference.robust, 0.1, 0.1),
    "exo_pair_ls1e-3": summed(preference.exo, 0.1, 1e-3),
    "nca_pair": summed(preference.nca, 0.1),
    "sppo_hard": summed(preference.sppo, 0.1),
    "apo_zero": summed(preference.apo_zero, 0.1),
    "apo_down": summed(preference.apo_down, 0.1),
    "aot": lambda pc, pr, rc, rr, nc, nr: preference.aot(pc - pr, rc - rr, 0.1),
    "aot_pair": summed(preference.aot_unpaired, 0.1),
    "reference_free": free(preference.sigmoid, 0.1),
    "js_divergence": diverging("js"),
    "alpha_divergence_0.5": diverging("alpha"),
    "bco_pair": summed(lambda a, b: preference.bco(a, b, 0.1, 0.1 * (a.mean() + b.mean()).detach() / 2)),
    "sigmoid 1.16": summed(preference.sigmoid, 0.1),
    "ipo 1.16": per_token(preference.ipo, 0.1),
    "bco_pair 1.16": summed(preference.bco, 0.1),
    "aot_unpaired 1.16": summed(preference.aot_unpaired, 0.1),
    "discopop 1.16": summed(preference.discopop, 0.1),
    "sigmoid_norm 1.16": per_token(preference.sigmoid, 0.1),
    "forward_kl 1.16": diverging("forward_kl"),
    "robust_ls0.1 1.16": summed(preference.robust, 0.1, 0.1),
    "exo_pair_ls1e-3 1.16": summed(preference.exo, 0.1, 1e-3),
}


@pytest.mark.parametrize("name", list(DPO))
def test_beside_trl(reference, name):
    """Log-probabilities and losses to 1e-5, gradient norms to 1e-4; means over the four pairs."""
    expected = reference.numbers["dpo"][name]
    pc, pr, nc, nr = reference.answers(reference.policy)
    rc, rr, _, _ = reference.ref
    losses = DPO[name](pc, pr, rc, rr, nc, nr)
    if "losses" in expected and not name.startswith("aot"):
        assert losses.tolist() == pytest.approx(expected["losses"], rel=1e-5)
    assert losses.mean().item() == pytest.approx(expected["loss"], rel=1e-5)
    assert reference.gradient_norm(losses.mean()) == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_log_probabilities_beside_trl(reference):
    expected = reference.numbers["dpo"]["sigmoid"]
    pc, pr, _, _ = reference.answers(reference.policy)
    assert pc.tolist() == pytest.approx(expected["policy_chosen_logps"], rel=1e-5)
    assert pr.tolist() == pytest.approx(expected["policy_rejected_logps"], rel=1e-5)
    assert reference.ref[0].tolist() == pytest.approx(expected["ref_chosen_logps"], rel=1e-5)
    assert reference.ref[1].tolist() == pytest.approx(expected["ref_rejected_logps"], rel=1e-5)


CPO = {
    "sigmoid_alpha1": (free(preference.sigmoid, 0.1), 1.0),
    "hinge_alpha0": (free(preference.hinge, 0.1), 0.0),
    "ipo_alpha0": (lambda pc, pr, rc, rr, nc, nr: preference.ipo(pc / nc, pr / nr, 0.1), 0.0),
    "simpo": (lambda pc, pr, rc, rr, nc, nr: preference.simpo(pc / nc, pr / nr, 2.0, 0.5), 0.0),
    "simpo_cpo_alpha1": (lambda pc, pr, rc, rr, nc, nr: preference.simpo(pc / nc, pr / nr, 2.0, 0.5), 1.0),
    "simpo_ls0.1": (lambda pc, pr, rc, rr, nc, nr: preference.simpo(pc / nc, pr / nr, 2.0, 0.5, 0.1), 0.0),
}


@pytest.mark.parametrize("name", list(CPO))
def test_without_a_reference_beside_trl(reference, name):
    """CPO and SimPO; the NLL is the mean over the chosen answers' tokens."""
    expected = reference.numbers["cpo"][name]
    loss, weight = CPO[name]
    pc, pr, nc, nr = reference.answers(reference.policy)
    total = loss(pc, pr, None, None, nc, nr).mean() - weight * pc.sum() / nc.sum()
    assert total.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert reference.gradient_norm(total) == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_orpo_beside_trl(reference):
    """TRL's NLL runs over prompt and answer; ours is over the answer, as in the paper's equation 6. The odds term, all
    of ORPO that is not NLL, is the same."""
    expected = reference.numbers["orpo"]
    pc, pr, nc, nr = reference.answers(reference.policy)
    odds = preference.orpo(pc / nc, pr / nr).mean()
    assert odds.item() == pytest.approx(-expected["metrics"]["log_odds_ratio"], rel=1e-5)
    assert expected["loss"] == pytest.approx(expected["metrics"]["nll_loss"] + 0.1 * odds.item(), rel=1e-5)


@pytest.mark.parametrize(("name", "weights"), [("kto", (1.0, 1.0)), ("kto_weights", (1.33, 0.7))])
def test_kto_beside_trl(reference, name, weights):
    expected = reference.numbers["kto"][name]
    sides = ("chosen", "rejected")
    ratios = [
        torch.tensor(expected[f"policy_{side}_logps"]).double() - torch.tensor(expected[f"ref_{side}_logps"]).double()
        for side in sides
    ]
    mismatched = torch.tensor(expected["policy_KL_logps"]).double() - torch.tensor(expected["ref_KL_logps"]).double()
    kl = mismatched.mean().clamp(min=0)
    assert float(kl) == pytest.approx(expected["metrics"]["kl"], rel=1e-5)
    desirable = torch.tensor([True, True, False, False])
    losses = preference.kto(torch.cat(ratios), desirable, kl, 0.1, weights)
    assert losses.mean().item() == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["bt", "bt_margin", "bt_center0.01"])
def test_reward_losses_beside_trl(reference, name):
    expected = reference.numbers["reward_model"][name]
    chosen, rejected = (torch.tensor(expected[f"rewards_{side}"]).double()[:, 0] for side in ("chosen", "rejected"))
    margin = torch.tensor(expected["margin"]).double()[:, 0] if name == "bt_margin" else 0.0
    loss = preference.bradley_terry(chosen, rejected, margin).mean()
    loss += 0.01 * preference.centering(chosen, rejected).mean() * (name == "bt_center0.01")
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
