"""A student and a teacher from files: how far they are apart is what transformers' logits of both say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from litrecipe.checkpoint.hf import save_model
from litrecipe.checkpoint.load import load_model, load_teacher
from litrecipe.checkpoint.source import open_model
from litrecipe.config.groups import Quantize
from litrecipe.model.row import Row, Sample, Segment, make_row
from litrecipe.model.teacher import StudentAndTeacher


def text(ids: list[int]) -> Row:
    weights = np.ones(len(ids), np.float32)
    weights[0] = 0
    return make_row([Sample("a", (Segment(np.array(ids, dtype=np.int32), weights),))])


@torch.no_grad()
def logps_of(model: Any, ids: list[int]) -> torch.Tensor:
    """What a model of transformers says of all tokens at all places that predict, in float64."""
    return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(1)


def kl_of(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Of each place, from all log-probabilities."""
    return (q.exp() * (q - p)).sum(1)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_kl_is_that_of_what_transformers_says(tmp_path: Path, make_llama, family: str) -> None:
    ids = [5, 3, 90, 41, 2, 7, 7, 60, 13, 88]
    theirs = [
        make_llama(tmp_path / name, family=family, **changes)
        for name, changes in (("teacher", {"num_hidden_layers": 3, "initializer_range": 0.3}), ("student", {}))
    ]
    teacher, student = open_model(str(tmp_path / "teacher")), open_model(str(tmp_path / "student"))
    found = StudentAndTeacher(load_model(student), load_teacher(teacher))(text(ids)).kl
    expected = kl_of(*(logps_of(model, ids) for model in theirs))
    assert expected.min() > 0.01
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_is_frozen_and_may_be_quantised(tmp_path: Path, make_llama) -> None:
    make_llama(tmp_path)
    files = open_model(str(tmp_path))
    teacher = load_teacher(files, dtype=torch.bfloat16, quantize=Quantize(method="nf4"))
    assert not any(parameter.requires_grad for parameter in teacher.parameters()) and not teacher.training
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16, torch.uint8}
    said = teacher(text([5, 3, 90]))
    assert said.hidden.shape == (2, 64) and not said.hidden.requires_grad


@pytest.mark.slow
def test_the_real_model_teaches_its_own_first_half(tmp_path: Path, real_model: Path) -> None:
    """Half of SmolLM2's layers, inherited, against the whole: ours block by block, transformers' from all logits."""
    from transformers import AutoModelForCausalLM

    files = open_model(str(real_model))
    ids = [504, 3575, 282, 4649, 314, 7042, 30, 657, 314, 260, 5480, 2470]
    teacher, student = load_teacher(files), load_model(open_model(str(real_model), layers=15))
    with torch.no_grad():
        found = StudentAndTeacher(student, teacher)(text(ids)).kl
    save_model(tmp_path / "whole", teacher, files.tokenizer_dir)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    whole = logps_of(model, ids)
    model.model.layers = model.model.layers[:15]
    torch.testing.assert_close(found.double(), kl_of(whole, logps_of(model, ids)), rtol=1e-3, atol=1e-4)
