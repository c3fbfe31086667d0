"""The flight recorder names the first step at which two runs part, and the cause that comes first."""

import json
import re

import numpy as np
import pytest

from litrecipe.config.errors import InputError
from litrecipe.config.recipes import RECIPES
from litrecipe.config.schema import keys
from litrecipe.engine.recorder import NAMED, REASONS, diff, flight_record, hash_samples
from litrecipe.model.row import Sample, Segment


def sample(name, *tokens, weight=1.0):
    weights = np.full(len(tokens), weight, dtype=np.float32)
    return Sample(name, (Segment(np.array(tokens), weights),))


def write(folder, records):
    folder.mkdir()
    (folder / "flight.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def records(loss=0.5, name="x", tokens=(1, 2), rng="r", norm=1.0):
    return [flight_record(step, [sample(name, *tokens)], rng, loss, norm) for step in (1, 2, 3)]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"loss": 0.5 + 1e-16 * 2}, "loss"),
        ({"name": "y", "loss": 9}, "samples"),
        ({"tokens": (1, 3), "loss": 9}, "batch"),
        ({"rng": "other", "norm": 9}, "rng"),
        ({"norm": 2.0}, "grad_norm"),
    ],
)
def test_names_the_first_cause(tmp_path, change, field):
    ours, other = records(), records()
    other[1] = records(**change)[1]
    lines = diff(write(tmp_path / "a", ours), write(tmp_path / "b", other))
    assert lines[0].startswith(f"step 2: {field} differs")


def test_the_advice_names_keys_of_runs_that_sample_too():
    known = {name for kind in RECIPES.values() for key in keys(kind) for name in (key, key.rpartition(".")[2])}
    named = re.findall(r"[a-z]+(?:[._][a-z]+)+", " ".join(REASONS.values()))
    assert {"train.global_batch_size", "rollout_batch_size", "prompts_per_round"} <= set(named) <= known


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ("abcdef", "8 and 6, from number 7 on [g, h] and []"),
        ("abcdefgx", "8 and 8, from number 8 on [h] and [x]"),
        ("xbcdefgh", "8 and 8, from number 1 on [a, b, c, d, …] and [x, b, c, d, …]"),
    ],
)
def test_lists_are_shown_from_where_they_part(tmp_path, theirs, said):
    ours = [flight_record(1, [sample(name, 1) for name in "abcdefgh"], "r", 1, 1)]
    other = [flight_record(1, [sample(name, 1) for name in theirs], "r", 1, 1)]
    lines = diff(write(tmp_path / "a", ours), write(tmp_path / "b", other))
    assert lines[0] == f"step 1: samples differs: {said}"


def test_equal_runs_and_tolerance(tmp_path):
    a, b = write(tmp_path / "a", records()), write(tmp_path / "b", records(loss=0.5 * (1 + 1e-6)))
    assert diff(a, a) == []
    assert diff(a, b) != []
    assert diff(a, b, tolerance=1e-5) == []


def test_a_shorter_run_is_said(tmp_path):
    lines = diff(write(tmp_path / "a", records()), write(tmp_path / "b", records()[:2]))
    assert lines[0] == f"step 3: only in {tmp_path / 'a'}"


def test_no_record_is_wrong_input(tmp_path):
    with pytest.raises(InputError, match=r"flight\.jsonl"):
        diff(tmp_path, tmp_path)


def test_hash_sees_weights_and_trees():
    branch = Sample("x", (Segment(np.array([1]), np.zeros(1)), Segment(np.array([2]), np.ones(1), parent=0)))
    loose = Sample("x", (Segment(np.array([1]), np.zeros(1)), Segment(np.array([2]), np.ones(1))))
    hashes = {hash_samples([s]) for s in (sample("x", 1, 2), sample("x", 1, 2, weight=0.5), branch, loose)}
    assert len(hashes) == 4


def test_hash_sees_extras():
    def sample(**extra):
        segment = Segment(np.array([1, 2]), np.array([0, 1], dtype=np.float32))
        return Sample("a", (segment,), {name: np.array(values, dtype=np.float32) for name, values in extra.items()})

    hashes = {hash_samples([s]) for s in (sample(), sample(scores=[1]), sample(scores=[2]), sample(label=[1]))}
    assert len(hashes) == 4


def test_of_large_steps_the_first_samples_are_named_and_the_others_count(tmp_path):
    many = [sample(str(number), 1) for number in range(NAMED + 40)]
    record = flight_record(1, many, "r", 1, 1)
    assert record["samples"][:-1] == [str(number) for number in range(NAMED)]
    assert record["samples"][-1].startswith("40 more: ")
    swapped = [*many[:-2], many[-1], many[-2]]
    assert flight_record(1, swapped, "r", 1, 1)["samples"] != record["samples"]
    assert flight_record(1, many[:NAMED], "r", 1, 1)["samples"] == record["samples"][:-1]
