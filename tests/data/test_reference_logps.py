"""Log-probabilities of the reference, kept with the samples they belong to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import decoder

from litrecipe.config.groups import Data, Dpo
from litrecipe.data import remembered
from litrecipe.data.reference_logps import with_reference
from litrecipe.data.samples import SampleSet
from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.objectives.dpo import DPO, REF_LOGPS

BUDGET = 40


def pair(number, length):
    random = np.random.default_rng(number)
    prompt = Segment(random.integers(3, 100, length).astype(np.int32), np.zeros(length, np.float32))
    answers = []
    for n in (number % 3 + 2, number % 4 + 1):
        weights = np.ones(n, np.float32)
        weights[0] = number % 2  # not every token is predicted
        answers.append(Segment(random.integers(3, 100, n).astype(np.int32), weights, parent=0))
    answers[1].weights[-1] = 1
    answers[0].weights[-1] = 1
    return Sample(f"f:{number}", (prompt, *answers), {"scores": np.array([number, 0], dtype=np.float32)})


@pytest.fixture
def samples(tmp_path):
    return SampleSet.write(tmp_path / "pairs", [pair(n, n % 7 + 3) for n in range(30)])


class Reference:
    """A tiny model that counts how often it is asked."""

    def __init__(self):
        self.model = decoder()
        self.rows = 0

    def __call__(self, row):
        self.rows += 1
        assert not torch.is_grad_enabled()
        return self.model(row).logps


def test_each_sample_carries_what_the_reference_says_of_it_alone(samples, monkeypatch):
    monkeypatch.setattr(remembered, "WINDOW", 8)
    monkeypatch.setattr(remembered, "PART", 13)
    reference = Reference()
    found = with_reference(samples, reference, ["weights"], Data(), BUDGET)
    assert reference.rows < len(samples)  # several share a row
    assert len(found) == len(samples)
    for index in range(len(samples)):
        sample, plain = found[index], samples[index]
        assert sample.id == plain.id and sample.extra["scores"].tolist() == plain.extra["scores"].tolist()
        alone = reference.model(make_row([plain])).logps.detach()
        torch.testing.assert_close(torch.tensor(sample.extra[REF_LOGPS]), alone, atol=2e-6, rtol=1e-5)


def test_a_row_of_them_goes_to_the_objective_as_it_is(samples):
    """The policy is its reference, so each pair loses log 2."""
    reference = Reference()
    found = with_reference(samples, reference, ["weights"], Data(), BUDGET)
    row = make_row([found[index] for index in (4, 2, 9)])
    loss = DPO(Dpo())(reference.model(row), row)
    assert float(loss.terms[0].sum.detach()) / 3 == pytest.approx(np.log(2), rel=1e-6)


def test_the_same_is_not_computed_twice_and_anything_else_is(samples):
    reference = Reference()
    first = with_reference(samples, reference, ["weights", "fp32"], Data(), BUDGET)
    asked = reference.rows
    again = with_reference(samples, reference, ["weights", "fp32"], Data(), BUDGET)
    assert reference.rows == asked and again.fingerprint == first.fingerprint
    with_reference(samples, reference, ["other weights", "fp32"], Data(), BUDGET)
    assert reference.rows == 2 * asked
    with_reference(samples.subset(range(20)), reference, ["weights", "fp32"], Data(), BUDGET)
    assert reference.rows > 2 * asked


def test_a_damaged_one_is_made_anew(samples, capfd):
    reference = Reference()
    found = with_reference(samples, reference, ["weights"], Data(), BUDGET)
    [part] = found.parts
    asked, path = reference.rows, part.folder / f"extra-{REF_LOGPS}.bin"
    path.write_bytes(path.read_bytes()[:-4])
    again = with_reference(samples, reference, ["weights"], Data(), BUDGET)
    assert reference.rows == 2 * asked and again.fingerprint == found.fingerprint
    assert "damaged and made anew" in capfd.readouterr().err


def test_samples_that_fit_into_no_row_carry_nothing(samples):
    found = with_reference(samples, Reference(), ["weights"], Data(), 12)
    for index, length in enumerate(samples.lengths):
        assert (len(found[index].extra[REF_LOGPS]) == 0) == (length > 12)
