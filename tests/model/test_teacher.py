"""A student beside its teacher: what is asked, what learns, and answers that were kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from small import decoder

from litrecipe.config.groups import Adapter
from litrecipe.model.adapters import add_adapter
from litrecipe.model.row import Row, Sample, Segment, make_row
from litrecipe.model.teacher import TEACHER_IDS, TEACHER_LOGPS, StudentAndTeacher, Teacher


def row() -> Row:
    """A prompt with two answers, and a text: eleven predictions."""
    prompt = Segment(np.arange(3, 9), np.zeros(6, np.float32))
    answers = [Segment(np.arange(start, start + 4), np.ones(4, np.float32), parent=0) for start in (20, 40)]
    text = Segment(np.arange(60, 64), np.array([0, 1, 1, 1], np.float32))
    return make_row([Sample("a", (prompt, *answers)), Sample("b", (text,))])


def teacher_of(k: int | None = None, **changes: Any) -> Teacher:
    larger = decoder(seed=1, spread=0.1, **{"hidden_size": 96, "num_hidden_layers": 3} | changes)
    teacher = Teacher(larger.architecture)
    teacher.load_state_dict(larger.state_dict())
    teacher.k = k
    return teacher.requires_grad_(False)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_kl_is_that_of_the_two_models(softcap: float | None) -> None:
    family = {} if softcap is None else {"model_type": "gemma2", "final_logit_softcapping": softcap}
    teacher, student = teacher_of(**family), decoder(spread=0.1)
    found = StudentAndTeacher(student, teacher)(row())
    # The text of the row alone, so that all logits can be asked for.
    alone = row().tokens[-4:]
    q, p = (torch.distributions.Categorical(logits=one.logits(alone)[:-1]) for one in (teacher, student))
    assert found.kl is not None and found.teacher_entropy is not None
    torch.testing.assert_close(found.kl[-3:], torch.distributions.kl_divergence(q, p), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.teacher_entropy[-3:], q.entropy(), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.logps, student(row()).logps)


def test_only_the_student_learns_and_only_it_has_dropout() -> None:
    student = decoder()
    add_adapter(student, Adapter(method="lora", r=4, dropout=0.5), seed=0)
    module = StudentAndTeacher(student, teacher_of()).train()
    assert module.student.training and not module.teacher.training  # type: ignore[union-attr]
    found = module(row())
    (found.kl.sum() + found.logps.sum()).backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert {name.partition(".")[0] for name, p in module.named_parameters() if p.requires_grad} == {"student"}


@pytest.mark.parametrize("hard", [False, True])
def test_answers_that_were_kept_are_as_those_that_are_given(hard: bool) -> None:
    """Also where all tokens are kept: then they are the whole distribution, but for the order of sums."""
    student = decoder(spread=0.1)
    asked = teacher_of(k=1 if hard else 7)
    live = StudentAndTeacher(student, asked, hard=hard)(row())
    said = asked(row())
    extra = {TEACHER_IDS: said.ids.flatten(), TEACHER_LOGPS: said.logps.flatten()}
    kept = StudentAndTeacher(student, hard=hard)(replace(row(), extra=extra))
    assert torch.equal(live.kl, kept.kl) and torch.equal(live.logps, kept.logps)
    assert not hard or not kept.teacher_entropy.any()
    whole, all_of_it = (
        StudentAndTeacher(student, teacher_of())(row()),
        StudentAndTeacher(student, teacher_of(120))(row()),
    )
    torch.testing.assert_close(whole.kl, all_of_it.kl, rtol=1e-5, atol=1e-6)


def test_an_empty_row_hangs_on_the_graph_and_a_row_that_knows_no_teacher_is_refused() -> None:
    student = decoder()
    for module in (StudentAndTeacher(student), StudentAndTeacher(student, teacher_of())):
        module(make_row([])).kl.sum().backward()
        assert all(parameter.grad is not None for parameter in student.parameters())
    with pytest.raises(ValueError, match="there is no teacher"):
        StudentAndTeacher(student)(row())
