"""The step source: an order that is a pure function of seed, epoch and index."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Train
from litrecipe.data.source import RecordedSource
from litrecipe.model.row import Sample, Segment


class Numbers(list):
    """Samples 0..n-1; sample i has i % 5 + 1 tokens."""

    def __init__(self, n):
        parts = [Segment(np.full(i % 5 + 1, i), np.zeros(i % 5 + 1, dtype=np.float32)) for i in range(n)]
        super().__init__(Sample(str(i), (part,)) for i, part in enumerate(parts))
        self.lengths = np.array([sample.length for sample in self])


def drain(source):
    steps = []
    while step := source.next_step():
        steps.append([sample.id for sample in step])
    return steps


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([0.5, 1.0, 2.0, 2.5]), st.integers(0, 3))
def test_every_epoch_has_every_sample_once(n, batch, epochs, seed):
    train = Train(global_batch_size=batch, epochs=epochs, seed=seed)
    source = RecordedSource(Numbers(n), train)
    steps = drain(source)
    assert len(steps) == source.total_steps(train)
    seen = [name for step in steps for name in step]
    assert len(seen) == max(1, round(n * epochs))
    for epoch in range(int(epochs)):
        assert Counter(seen[epoch * n : (epoch + 1) * n]) == Counter(str(i) for i in range(n))


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 7), st.integers(0, 20))
def test_resuming_anywhere_continues_the_same_order(n, batch, stop_after):
    train = Train(global_batch_size=batch, epochs=3)
    unbroken = drain(RecordedSource(Numbers(n), train))
    first = RecordedSource(Numbers(n), train)
    head = [[sample.id for sample in first.next_step()] for _ in range(min(stop_after, len(unbroken)))]
    second = RecordedSource(Numbers(n), train)
    second.load_state_dict(first.state_dict())
    assert head + drain(second) == unbroken


def test_epochs_have_orders_of_their_own():
    source = RecordedSource(Numbers(50), Train(global_batch_size=50, epochs=2))
    first, second = drain(source)
    assert first != second != [str(i) for i in range(50)]


def test_max_tokens_stops_at_the_first_step_that_reaches_it():
    train = Train(global_batch_size=4, max_tokens=70)
    source = RecordedSource(Numbers(20), train)
    total = source.total_steps(train)
    sizes = [sum(sample.length for sample in source.next_step()) for _ in range(total)]
    assert sum(sizes) >= 70 > sum(sizes[:-1])


def test_other_data_another_seed_or_batch_is_refused_on_resume():
    source = RecordedSource(Numbers(5), Train(seed=1, global_batch_size=2))
    with pytest.raises(InputError) as error:
        source.load_state_dict({"cursor": 3, "samples": 6, "seed": 0, "batch": 3})
    data, seed, batch = error.value.mistakes
    assert data.startswith("data.train: 5 samples: the checkpoint was made with 6")
    assert seed.startswith("train.seed: 1: the checkpoint was made with 0")
    assert batch.startswith("train.global_batch_size: 2: the checkpoint was made with 3")
    assert source.cursor == 0


@pytest.mark.parametrize("epochs", [None, 1.3])
def test_the_samples_of_a_step_are_known_without_taking_it(epochs):
    train = Train(global_batch_size=4, epochs=epochs, max_steps=5)
    source = RecordedSource(Numbers(10), train)
    looked_up = [source.indices_from(4 * step) for step in range(source.total_steps(train))]
    assert source.cursor == 0
    assert [[int(sample.id) for sample in source.next_step()] for _ in looked_up] == looked_up


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 7), st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_a_lengthened_run_loses_no_sample(n, batch, more):
    """Each time it ends, perhaps with a short step, and goes on to a later end."""
    state, seen, steps, epochs = None, [], 0, 0
    for add in more:
        epochs += add
        train = Train(global_batch_size=batch, epochs=epochs)
        source = RecordedSource(Numbers(n), train)
        if state:
            source.load_state_dict(state)
        while steps < source.total_steps(train):
            seen += [sample.id for sample in source.next_step()]
            steps += 1
        assert source.next_step() == []
        state = source.state_dict()
    assert Counter(seen) == {str(i): epochs for i in range(n)}


def test_samples_that_fit_no_row_are_told_at_the_start(capfd):
    samples = Numbers(5)
    del samples[0]
    samples.lengths = samples.lengths[1:]  # 2 to 5
    with pytest.raises(InputError, match=r"micro_batch_tokens: 1: no sample fits, the shortest has 2 .* give 5"):
        RecordedSource(samples, Train(micro_batch_tokens=1))
    assert capfd.readouterr().err == ""
    RecordedSource(samples, Train(micro_batch_tokens=3))
    assert "data.train: 2 of 4 samples do not fit train.micro_batch_tokens 3" in capfd.readouterr().err
    RecordedSource(samples, Train(micro_batch_tokens=5))
    assert capfd.readouterr().err == ""
