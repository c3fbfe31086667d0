"""What a model says of samples, kept beside them in parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from litrecipe.data import remembered
from litrecipe.data.remembered import Witness
from litrecipe.data.samples import SampleSet
from litrecipe.model.row import Row, Sample, Segment, make_row

COUNT = 23


class Echo:
    """Names of each prediction the target twice, and its half; notes which samples it was asked about."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, row: Row) -> dict[str, torch.Tensor]:
        self.asked += row.sample_ids
        ids = torch.stack((row.target, row.target), 1).to(torch.uint16)
        return {"ids": ids, "halves": row.target.float() / 2}


def sample(number: int) -> Sample:
    weights = np.ones(number % 5 + 2, np.float32)
    weights[0] = 0
    return Sample(f"f:{number}", (Segment(np.full(len(weights), 60_000 + number, dtype=np.int32), weights),))


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SampleSet:
    monkeypatch.setattr(remembered, "PART", 5)
    return SampleSet.write(tmp_path / "samples", map(sample, range(COUNT)))


def asked(samples: SampleSet, echo: Echo, cache: Path, rank: int = 0, world: int = 1) -> remembered.WithExtras:
    return remembered.remembered(samples, Witness("echo", echo, ["weights"], 12), cache, rank, world)


def test_numbers_of_any_kind_and_number_come_back_with_their_sample(samples: SampleSet, tmp_path: Path) -> None:
    found = asked(samples, Echo(), tmp_path / "cache")
    for number in [*range(COUNT), -1]:
        one, count = found[number], number % COUNT % 5 + 1
        assert one.segments[0].tokens.tolist() == samples[number].segments[0].tokens.tolist()
        assert one.extra["ids"].tolist() == [60_000 + number % COUNT] * 2 * count
        assert one.extra["ids"].dtype == np.uint16
        assert one.extra["halves"].tolist() == [(60_000 + number % COUNT) / 2] * count
    row = make_row([found[3], found[4]])
    assert row.extra["ids"].view(len(row.target), 2).tolist() == [[token, token] for token in row.target.tolist()]
    with pytest.raises(IndexError):
        found[COUNT]


def test_processes_begin_apart_and_find_what_others_made(samples: SampleSet, tmp_path: Path) -> None:
    """One after the other here: the first makes all, in its order, the second nothing. Alone, the second begins at the
    third of five parts."""
    first, second, alone = Echo(), Echo(), Echo()
    one, two = (asked(samples, echo, tmp_path / "a", rank, 2) for rank, echo in enumerate((first, second)))
    assert one.fingerprint == two.fingerprint
    assert (sorted(first.asked), second.asked) == (sorted(f"f:{n}" for n in range(COUNT)), [])
    asked(samples, alone, tmp_path / "b", 1, 2)
    assert sorted(alone.asked[:5]) == sorted(f"f:{n}" for n in range(10, 15))


def test_a_pass_that_was_cut_short_goes_on_behind_its_last_whole_part(samples: SampleSet, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    class Stopping(Echo):
        def __call__(self, row: Row) -> dict[str, torch.Tensor]:
            if len(self.asked) > 12:
                raise Stopped
            return super().__call__(row)

    with pytest.raises(Stopped):
        asked(samples, Stopping(), tmp_path)
    rest = Echo()
    asked(samples, rest, tmp_path)
    assert sorted(rest.asked) == sorted(f"f:{n}" for n in range(10, COUNT))
