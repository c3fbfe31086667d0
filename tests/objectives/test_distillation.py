"""Learning from a teacher and the z-loss, on numbers that are made up, and on small decoders cut into rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made import float64, rows_of, step
from small import decoder

from litrecipe.model.head import Predictions
from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.model.teacher import StudentAndTeacher, Teacher
from litrecipe.objectives.causal_lm import CausalLM
from litrecipe.objectives.distillation import Distillation
from litrecipe.objectives.loss import metric_sums, quotients, step_loss


def sample(number, length=9):
    random = np.random.default_rng(number)
    weights = (np.arange(length) > number % 3).astype(np.float32)
    return Sample(f"f:{number}", (Segment(random.integers(3, 100, length).astype(np.int32), weights),))


def predictions(**more):
    """Two places that are predicted with 1/2 and 1/4."""
    return Predictions(float64(-np.log(2), -np.log(4)), torch.tensor([True, False]), **more)


TWO = make_row([sample(2, 5)])


def told(objective, found):
    loss = objective(found, TWO)
    return step_loss(loss, objective.counts(TWO)).item(), quotients(metric_sums([loss]))


def test_the_teacher_has_what_alpha_leaves_with_temperature_squared():
    """NLL (log 2 + log 4) / 2 = 1.5 log 2; cross-entropy ((0.3 + 0.1) + (0.5 + 0.3)) / 2 = 0.6; 0.25 · 1.5 log 2 +
    0.75 · 2² · 0.6."""
    found = predictions(kl=float64(0.3, 0.5), teacher_entropy=float64(0.1, 0.3))
    loss, metrics = told(Distillation(0.25, 2.0), found)
    assert loss == pytest.approx(0.25 * 1.5 * np.log(2) + 0.75 * 4 * 0.6)
    expected = {"mean_token_accuracy": 0.5, "nll": 1.5 * np.log(2), "kl": 0.4, "teacher_entropy": 0.2}
    assert metrics == pytest.approx(expected)


def test_a_z_loss_is_the_mean_of_squares():
    """(2² + 4²) / 2 = 10, and 0.01 of it in the loss, beside a teacher too."""
    found = predictions(log_z=float64(2, -4), kl=float64(0, 0), teacher_entropy=float64(1, 1))
    loss, metrics = told(CausalLM(z_loss=0.01), found)
    assert loss == pytest.approx(1.5 * np.log(2) + 0.1)
    expected = {"mean_token_accuracy": 0.5, "nll": 1.5 * np.log(2), "z_loss": 10, "log_z": -1}
    assert metrics == pytest.approx(expected)
    loss, metrics = told(Distillation(0.0, z_loss=0.01), found)
    assert loss == pytest.approx(1 + 0.1)
    assert metrics["z_loss"] == pytest.approx(10)


def test_what_the_predictions_lack_is_said():
    with pytest.raises(ValueError, match="z-loss needs log_z"):
        CausalLM(z_loss=1e-4)(predictions(), TWO)
    with pytest.raises(ValueError, match="needs the KL from a teacher"):
        Distillation(0.5)(predictions(), TWO)
    assert CausalLM().counts(TWO) == {"nll": 2}


def taught(method, z_loss):
    """A student of two layers, a teacher of other widths and with a larger table."""
    torch.manual_seed(0)
    larger = decoder(hidden_size=96, num_hidden_layers=3, vocab_size=136, seed=1, spread=0.1)
    teacher = Teacher(larger.architecture)
    teacher.load_state_dict(larger.state_dict())
    teacher.requires_grad_(False)
    teacher.k = {"full": None, "top_k": 5, "top_1": 1}[method]
    temperature = 1.0 if method == "top_1" else 2.0
    teacher.temperature, teacher.tokens = temperature, 118
    student = decoder(spread=0.1)
    student.with_log_z = bool(z_loss)
    module = StudentAndTeacher(student, teacher, temperature=temperature, hard=method == "top_1").double()
    return module, Distillation(0.3, temperature, z_loss)


@pytest.mark.parametrize("method", ["full", "top_k", "top_1"])
def test_a_step_is_the_same_however_it_is_cut(method):
    module, objective = taught(method, z_loss=1e-2)
    samples = [sample(number, 5 + number % 4) for number in range(7)]
    trained = list(module.student.parameters())
    whole = step(objective, module, rows_of(samples), trained=trained)
    for sizes in ((1, 2), (1, 1, 1, 1, 1, 1), (0, 4)):
        loss, gradient, metrics = step(objective, module, rows_of(samples, *sizes), trained=trained)
        assert loss == pytest.approx(whole[0], rel=1e-9)
        assert metrics == pytest.approx(whole[2], rel=1e-9)
        torch.testing.assert_close(gradient, whole[1], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("method", ["full", "top_k", "top_1"])
def test_the_loss_is_that_of_all_logits_of_both(method):
    """As a plain program would write it: whole logits, cross_entropy, kl_div; and the gradient of every weight."""
    module, objective = taught(method, z_loss=1e-2)
    row = make_row([sample(4, 8)])
    trained = list(module.student.parameters())
    loss, gradient, metrics = step(objective, module, [row], trained=trained)
    student, teacher = (one.logits(row.tokens)[row.predict_from] for one in (module.student, module.teacher))
    teacher = teacher.detach()[:, :118]  # all that there is
    nll = torch.nn.functional.cross_entropy(student, row.target)
    if method == "full":
        q = (teacher / 2).softmax(1)
        soft = 4 * -(q * (student / 2).log_softmax(1)[:, :118]).sum(1).mean()
    elif method == "top_1":
        soft = torch.nn.functional.cross_entropy(student, teacher.argmax(1))
    else:
        values, ids = (teacher / 2).softmax(1).topk(5, 1)
        p = (student / 2).softmax(1).gather(1, ids)
        rest = (1 - values.sum(1)) * (1 - p.sum(1)).log()
        soft = 4 * -((values * p.log()).sum(1) + rest).mean()
    expected = 0.3 * nll + 0.7 * soft + 1e-2 * student.logsumexp(1).square().mean()
    assert loss == pytest.approx(expected.item(), rel=1e-9)
    assert metrics["nll"] == pytest.approx(nll.item(), rel=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, trained), rtol=1e-7, atol=1e-11)
